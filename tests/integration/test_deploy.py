"""The image and the manifests agree with the files, targets, flags and ports of the project."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve import __version__
from serve.config.flags import parse_args

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def objects(name: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text("utf-8")))


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def entrypoint() -> list[str]:
    words: list[str] = json.loads(instructions("ENTRYPOINT")[0])
    assert words[:3] == [".venv/bin/python", "-m", "serve"]
    return words[3:]


def container(objects: list[Any]) -> Any:
    return objects[0]["spec"]["template"]["spec"]["containers"][0]


def test_dockerfile_copies_files_that_exist_and_are_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copied = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert {"Makefile", "serve/"} <= set(copied)
    for word in copied:
        assert list(ROOT.glob(word)), word
        assert f"!{word.rstrip('/')}" in ignore


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_dockerfile_makes_targets_of_the_makefile(device: str) -> None:
    commands = " && ".join(instructions("RUN"))
    named = re.findall(r"(?:^|&&|[;)]) *make ([\w./$]+)", commands)
    assert {".venv/.serve", ".venv/.ray"} <= set(named)
    assert (
        "-m model.kernels.cpu.build --in-place" in commands
    )  # the final image has no g++ and mounts a volume over the cache
    for target in named:
        if "$DEVICE" in target and device == "cpu":
            continue
        target = target.replace("$DEVICE", device)
        assert re.search(rf"^(\S+ )*{re.escape(target)}( \S+)*:", MAKEFILE, re.MULTILINE), target


def test_image_listens_on_the_port_of_its_health_check() -> None:
    config = parse_args(entrypoint(), {})
    assert config.host == "0.0.0.0"
    assert str(config.port) in instructions("EXPOSE")
    assert f"http://127.0.0.1:{config.port}/health" in DOCKERFILE
    assert parse_args([*entrypoint(), "org/model", "--port", "9000"], {}).port == 9000  # arguments of `docker run`


def test_image_runs_as_the_owner_of_its_cache() -> None:
    (user,) = instructions("USER")
    assert f"useradd --uid {user} --create-home logprobd" in DOCKERFILE
    assert instructions("VOLUME") == ["/home/logprobd/.cache"]
    folder = parse_args([], {}).compilation_cache_dir
    assert str(folder).startswith("~/.cache/")


def test_manifest_agrees_with_the_image() -> None:
    deployment, service = objects("kubernetes.yaml")
    server = container([deployment])
    assert server["image"] == f"logprobd:{__version__}"
    config = parse_args([*entrypoint(), *server["args"]], {"LOGPROBD_API_KEY": "key"})
    assert config.api_key == ("key",)
    assert [variable["name"] for variable in server["env"]] == ["LOGPROBD_API_KEY"]
    assert server["ports"] == [{"name": "http", "containerPort": config.port}]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    pod = deployment["spec"]["template"]["spec"]
    grace = pod["terminationGracePeriodSeconds"] - server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace > config.shutdown_timeout
    assert str(pod["securityContext"]["runAsUser"]) in instructions("USER")
    for probe, path in (("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/live")):
        assert server[probe]["httpGet"] == {"path": path, "port": "http"}
    writable = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert writable == {"/home/logprobd/.cache", "/tmp"}
    assert server["securityContext"]["readOnlyRootFilesystem"]


def test_manifest_is_valid_kubernetes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
        for each in objects("kubernetes.yaml"):
            validate.validate(each, validate.latest_version(), strict=True)
        with pytest.raises(validate.ValidationError):
            validate.validate(
                objects("kubernetes.yaml")[0] | {"spec": {"replica": 1}}, validate.latest_version(), strict=True
            )


def test_ray_service_is_valid_for_ray_serve_and_build() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ray = pytest.importorskip("ray", reason="Ray is not installed: `make ray`")
        from ray.serve.schema import ServeDeploySchema

        from serve.ray.app import build
        from serve.ray.flow_control import PROXY_CALLBACK

        (service,) = objects("rayservice.yaml")
        config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
        (application,) = config.applications
        assert application.import_path == "serve.ray.app:build"
        assert application.route_prefix == "/"
        build(application.args)
        with pytest.raises(ValueError, match="--nonsense"):
            build(application.args | {"nonsense": 1})
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
    cluster = service["spec"]["rayClusterConfig"]
    (worker,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], worker):
        container = group["template"]["spec"]["containers"][0]
        assert container["image"] == f"logprobd-ray:{__version__}"
        callback = {"name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "value": PROXY_CALLBACK}
        assert callback in container["env"]
    assert worker["maxReplicas"] >= application.args["max_replicas"]
    cpus = int(worker["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cpus >= application.args["num_cpus_per_replica"]
    assert not (cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]).strip("0")
