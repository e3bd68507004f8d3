"""The kernels' library: where and when it is built, and the fallback if it cannot be."""

import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.kernels.cpu import build, library


def test_load_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / name)
    assert library.load_library() is None
    for name in library.INSTRUCTION_SETS:
        (tmp_path / name).write_bytes(b"not a library")
    assert library.load_library() is None


def test_load_skips_a_library_for_another_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler here")
    source = tmp_path / "a.cc"
    source.write_text('extern "C" int logprobd_runs_here() { return 0; }')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", tmp_path / "avx512"], check=True)
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / name)
    assert library.load_library() is None


def owned_by_another_user(status: os.stat_result) -> os.stat_result:
    fields = list(status)
    fields[stat.ST_UID] = os.geteuid() + 1
    return os.stat_result(fields)


@pytest.mark.parametrize(
    ("folder_mode", "mode", "foreign", "trusted"),
    [
        (0o700, 0o755, False, True),
        (0o755, 0o600, False, True),
        (0o700, 0o775, False, False),
        (0o700, 0o757, False, False),
        (0o770, 0o755, False, False),
        (0o1777, 0o755, False, False),
        (0o700, 0o755, True, False),
    ],
)
def test_load_opens_no_library_that_other_users_could_have_written(
    folder_mode: int, mode: int, foreign: bool, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name in library.INSTRUCTION_SETS:
        (folder / name).touch()
        (folder / name).chmod(mode)
    folder.chmod(folder_mode)
    opened: list[str] = []

    def refuse(path: str) -> None:
        opened.append(path)
        raise OSError("not a library")

    if foreign:
        monkeypatch.setattr(Path, "lstat", lambda path: owned_by_another_user(path.stat()))
    monkeypatch.setattr("ctypes.CDLL", refuse)
    monkeypatch.setattr(library, "library_path", lambda name: folder / name)
    assert library.load_library() is None
    assert opened == ([str(folder / name) for name in library.INSTRUCTION_SETS] if trusted else [])


def test_is_trusted_rejects_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "own.so").touch(mode=0o644)
    (tmp_path / "link.so").symlink_to(tmp_path / "own.so")
    assert library.is_trusted(tmp_path / "own.so")
    assert not library.is_trusted(tmp_path / "link.so")


@pytest.mark.parametrize("writable", ["library", "folder"])
def test_build_replaces_a_library_but_not_a_folder_that_others_can_write(
    writable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-1]).write_text("ours")
        Path(command[-1]).chmod(0o777)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", write)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    path = tmp_path / "kernels" / "a-1.so"
    path.parent.mkdir(0o700)
    path.write_text("another user's")
    (path if writable == "library" else path.parent).chmod(0o777)
    if writable == "folder":
        with pytest.raises(RuntimeError, match="other users can write to "):
            build.build_library([], path)
        return
    build.build_library([], path)
    assert path.read_text() == "ours"
    assert library.is_trusted(path)


def test_build_on_a_machine_without_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build.main() == 0
    assert capsys.readouterr().err == "CPU kernels: none are written for riscv64; using XLA instead\n"


def run_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str | None) -> int:
    """`python -m model.kernels.cpu.build` into an empty folder, with only `compiler` (a shell script) on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    if compiler is not None:
        (tools / "c++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tools / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(build, "library_path", lambda name: tmp_path / "_build" / name)
    return build.main()


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "no C++ compiler on PATH"),
        ("echo 'linear.cc:1: error: no such header' >&2; exit 1", "error: no such header"),
        ("exit 3", "exit code 3"),
    ],
)
def test_build_failure_is_one_line(
    compiler: str | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_build(monkeypatch, tmp_path, compiler) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert err.endswith("; using XLA instead\n")
    assert not list((tmp_path / "_build").glob("*"))


def test_build_skips_an_instruction_set_that_the_compiler_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    knows_one = 'case "$*" in *-mavx512f*) echo "error: no -mavx512f" >&2; exit 1;; esac; for o; do :; done; : > "$o"'
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert run_build(monkeypatch, tmp_path, knows_one) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("CPU kernels: not built for avx512: ")
    assert out.splitlines()[1].startswith("CPU kernels: built avx2 with ")
    assert [path.name for path in (tmp_path / "_build").iterdir()] == ["avx2"]


def test_build_is_skipped_if_the_library_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Sequence[str]] = []

    def compile_nothing(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        Path(command[-1]).write_text("library")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compile_nothing)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    units, folder = [tmp_path / "a.cc"], tmp_path / "_build"
    assert build.build_library(units, folder / "a-1.so") == "CPU kernels: built a-1.so with bin/c++"
    assert (folder / "a-1.so").stat().st_mode & folder.stat().st_mode & 0o777 == 0o755  # an image has another user
    assert build.build_library(units, folder / "a-1.so") == "CPU kernels: a-1.so is up to date"
    assert len(calls) == 1
    build.build_library(units, folder / "b-1.so")
    build.build_library(units, folder / "a-2.so")
    assert sorted(path.name for path in folder.iterdir()) == [
        "a-1.so",
        "a-2.so",
        "b-1.so",
    ]  # other checkouts may use the older one


def test_build_leaves_no_unfinished_file_if_the_compiler_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-1]).write_text("half")
        return subprocess.CompletedProcess(command, 1, "", "error: disk full")

    monkeypatch.setattr(subprocess, "run", write_half)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    with pytest.raises(RuntimeError, match="disk full"):
        build.build_library([], tmp_path / "cache" / "a-1.so")
    assert list((tmp_path / "cache").iterdir()) == []


def test_build_accepts_a_library_that_another_process_finished_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "a-1.so"

    def finish_second(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert not library.exists()
        library.write_text("the other's")
        Path(command[-1]).write_text("ours")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", finish_second)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    build.build_library([], library)
    assert library.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [library]


def test_library_path_prefers_the_bundled_library_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    path = library.library_path("avx2")
    assert path.parent == tmp_path / "home" / ".cache" / "logprobd" / "kernels"
    bundled = tmp_path / "_build" / path.name
    bundled.parent.mkdir(0o755)
    bundled.touch(0o644)
    assert library.library_path("avx2") == bundled


def test_ensure_built_builds_once_and_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (tmp_path / "c++").write_text('#!/bin/sh\nfor o; do :; done; : > "$o"\n')
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    lines: list[str] = []
    build.ensure_built(lines.append)
    assert lines[0] == "CPU kernels: building for neon; this happens once"
    assert lines[1].startswith(f"CPU kernels: built {library.library_name('neon')} with ")
    lines.clear()
    build.ensure_built(lines.append)
    assert lines == []


@pytest.mark.parametrize(("compiler", "says"), [("", "no C++ compiler on PATH"), ("exit 1", "failed: exit code 1")])
def test_ensure_built_reports_why_xla_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, says: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    if compiler:
        (tmp_path / "c++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    lines: list[str] = []
    build.ensure_built(lines.append)
    assert says in lines[-1]
    assert lines[-1].endswith("; using XLA instead")


def test_ensure_built_reports_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").touch()  # a file: no folder can be made in it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "_build")
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    lines: list[str] = []
    build.ensure_built(lines.append)
    assert "Not a directory" in lines[-1]
    assert lines[-1].endswith("; using XLA instead")


def test_library_path_depends_on_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of older sources is never loaded, even if the new one cannot be built."""
    source = tmp_path / "a.cc"
    monkeypatch.setattr(library, "UNITS", [source])
    monkeypatch.setattr(library, "digest", library.digest.__wrapped__)
    names = set()
    for text in ("one", "two"):
        source.write_text(text)
        names.add(library.library_path("avx2").name)
    assert len(names) == 2


def test_build_tries_the_next_compiler_if_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_clang(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "bin/clang++":
            Path(command[-1]).write_text("library")
        return subprocess.CompletedProcess(command, int(command[0] != "bin/clang++"), "", "error: too old")

    monkeypatch.setattr(subprocess, "run", only_clang)
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}")
    assert build.build_library([], tmp_path / "a-1.so") == "CPU kernels: built a-1.so with bin/clang++"
