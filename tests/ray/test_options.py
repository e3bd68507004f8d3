"""Flags of replicas, and the resources and deployments that they request from Ray."""

import subprocess
import sys
import warnings
from typing import Any

import pytest

from serve.config.api_keys import ApiKey
from serve.ray.options import RayConfig, ray_flags
from tests.support.server_process import ROOT


def test_ray_config_by_default() -> None:
    config = ray_flags({}).read([])
    assert (config.num_replicas, config.autoscaling, config.address) == (None, None, None)
    assert config.resources == {"num_cpus": 1.0}
    assert config.model is None


def test_ray_config_has_flags_of_replicas_and_of_the_server() -> None:
    words = "org/model --num-replicas 3 --dtype float32 --num-cpus-per-replica 0.5 --api-key k --address auto"
    config = ray_flags({}).read([*words.split(), "--max-unread-tokens", "5", "--max-unsent-bytes", "64MiB"])
    assert (config.of_replica.max_unread_tokens, config.of_replica.max_unsent_bytes) == (5, 64 << 20)
    assert (config.num_replicas, config.num_cpus_per_replica, config.address) == (3, 0.5, "auto")
    assert (config.model, config.dtype, config.api_key) == ("org/model", "float32", ("k",))


def test_limits_are_split_between_fronts_and_replicas() -> None:
    entry = ApiKey(name="a", key="k", requests_per_minute=1, tokens_per_minute=2, max_bodies=3, min_priority=4)
    config = RayConfig(api_key=("plain", entry), num_replicas=2)
    front = ApiKey(name="a", key="k", requests_per_minute=1, max_bodies=3, min_priority=4)
    replica = ApiKey(name="a", key="k", tokens_per_minute=2, min_priority=4)
    assert (config.of_front.api_key, config.of_replica.api_key) == (("plain", front), ("plain", replica))
    assert config.of_replica.num_replicas == 2


@pytest.mark.parametrize(
    ("device", "resources"),
    [
        ("cpu", {"num_cpus": 1.0}),
        ("cuda", {"num_cpus": 1.0, "num_gpus": 4}),
        ("tpu", {"num_cpus": 1.0, "resources": {"TPU": 4}}),
    ],
)
def test_resources_of_a_sharded_replica(device: str, resources: dict[str, Any]) -> None:
    assert ray_flags({}).read(["--device", device, "--tensor-parallel-size", "4"]).resources == resources


@pytest.mark.parametrize(
    ("words", "autoscaling"),
    [
        ("--max-replicas 4", {"min_replicas": 1, "max_replicas": 4}),
        (
            "--min-replicas 2 --max-replicas 4 --target-ongoing-requests 6.5",
            {"min_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 6.5},
        ),
    ],
)
def test_autoscaling_with_max_replicas(words: str, autoscaling: dict[str, Any]) -> None:
    assert ray_flags({}).read(words.split()).autoscaling == autoscaling


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--num-replicas 0", "--num-replicas"),
        ("--num-replicas many", "--num-replicas"),
        ("--min-replicas 2", "--min-replicas"),
        ("--target-ongoing-requests 2", "--target-ongoing-requests"),
        ("--max-replicas 2 --target-ongoing-requests nan", "--target-ongoing-requests"),
        ("--max-replicas 2 --target-ongoing-requests=-2", "--target-ongoing-requests"),
        ("--num-cpus-per-replica=-1", "--num-cpus-per-replica"),
        ("--num-cpus-per-replica many", "--num-cpus-per-replica"),
        ("--num-replicas 2 --max-replicas 4", "--num-replicas"),
        ("--min-replicas 5 --max-replicas 4", "--min-replicas"),
        ("--device gpu", "--device"),
        ("--uds /tmp/socket", "--uds"),
        ("--ssl-certfile c --ssl-keyfile k --ssl-ca-certs a", "--ssl-ca-certs"),
        ("--client-timeout 5", "--client-timeout"),
        ("--max-num-seqs 0", "--max-num-seqs"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_ray_flags_error_names_the_flag(words: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        ray_flags({}).read(words.split())
    assert exit_info.value.code == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_ray_flags_mapping_equals_the_command_line() -> None:
    args = {
        "model": "org/model",
        "max_replicas": 3,
        "served_model_name": ["a", "b"],
        "enable_prefix_caching": False,
        "device": None,
    }
    words = "org/model --max-replicas 3 --served-model-name a --served-model-name b --no-enable-prefix-caching"
    flags = ray_flags({"LOGPROBD_API_KEY": "k"})
    assert flags.from_mapping(args) == flags.read(words.split())


@pytest.mark.parametrize(("args", "flag"), [({"nonsense": 1}, "--nonsense"), ({"num_replicas": 0}, "--num-replicas")])
def test_ray_flags_mapping_error_names_the_flag(
    args: dict[str, Any], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=flag) as error:
        ray_flags({}).from_mapping(args)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


def test_help_has_both_kinds_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        ray_flags({}).read(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--num-replicas" in text
    assert "--max-num-seqs" in text


def test_app_without_ray_prints_one_line() -> None:
    code = "import runpy, sys; sys.modules['ray'] = None; runpy.run_module('serve.ray.app', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == "error: Ray is not installed: run `make ray`, or `pip install 'logprobd[ray]'`\n"


def loaded(module: str) -> set[str]:
    """Return the modules that importing `module` loads."""
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_server_does_not_import_ray() -> None:
    assert "ray" not in loaded("serve.server.server")


def test_front_does_not_import_the_model() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: `make ray`")
    modules = loaded("serve.ray.front")
    assert "ray" in modules
    assert not modules & {"jax", "flax", "transformers", "tokenizers", "compiled"}
    assert {name for name in modules if name.startswith("model.")} == {"model.token_logprobs"}  # without jax


@pytest.mark.parametrize(
    ("words", "replicas"),
    [
        ("--num-replicas 3", (3, None)),
        ("--min-replicas 2 --max-replicas 5 --target-ongoing-requests 7", (None, (2, 5, 7.0))),
    ],
)
def test_application_passes_flags_to_ray(words: str, replicas: Any) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: `make ray`")
    flags = "--device cuda --tensor-parallel-size 2 --shutdown-timeout 50 --max-num-queued-reqs 100 --max-num-seqs 8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from serve.ray.app import application

        front = application(ray_flags({}).read([*words.split(), *flags.split()]))._bound_deployment
    replica = front.init_args[0]._bound_deployment
    assert (front.name, replica.name) == ("Front", "Replica")
    fixed, scaled = replicas
    autoscaling = replica._deployment_config.autoscaling_config
    if scaled is None:
        assert (replica.num_replicas, autoscaling) == (fixed, None)
    else:
        assert (autoscaling.min_replicas, autoscaling.max_replicas, autoscaling.target_ongoing_requests) == scaled
    assert replica.ray_actor_options["num_gpus"] == 2
    environ = replica.ray_actor_options["runtime_env"]["env_vars"]
    assert environ == {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # else it runs ahead of the front
    assert front.ray_actor_options["num_cpus"] == 0
    router = replica._deployment_config.request_router_config
    assert router.request_router_class == "serve.ray.front.PrefixRouter"
    assert router.request_router_kwargs["margin"] == 4
    for deployment in (front, replica):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 50
        assert deployment.max_ongoing_requests > 100  # the engine itself rejects excess requests
