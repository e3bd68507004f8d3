"""Events of start-up. Each has a plain text line, and a name and fields for JSON."""

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from serve.config.values import mb

if TYPE_CHECKING:
    from serve.server.memory_plan import MemoryPlan

# Wildcard addresses, and the loopback addresses under which this machine reaches them.
_WILDCARDS = {"://0.0.0.0:": "://127.0.0.1:", "://[::]:": "://[::1]:"}
_CHAT = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 32,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 3,
}
_COMPLETION = {"prompt": "The capital of France is", "max_tokens": 32, "temperature": 0, "logprobs": 3}


@dataclass(frozen=True, slots=True)
class Message:
    """An event that is shown as text everywhere."""

    name: str
    line: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the JSON object; "message" replaces the line there
    level: int = logging.INFO


class _Facts:
    """An event that terminals draw in their own way. It is a dataclass."""

    level: ClassVar[int] = logging.INFO

    @property
    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses
        return fields


@dataclass(frozen=True, slots=True)
class ModelFound(_Facts):
    """The model to be loaded, and its device."""

    name: ClassVar[str] = "model_found"
    model: str
    family: str
    parameters: int
    weights_as: str  # dtype or quantization
    platform: str
    device: str  # kind of device, as JAX names it
    devices: int  # number of shards
    max_model_len: int
    max_num_seqs: int

    @property
    def line(self) -> str:
        return (
            f"model    {self.model}: {self.family}, {count(self.parameters)} parameters, {self.weights_as} on "
            f"{self.placement}; up to {self.max_num_seqs} concurrent requests of {self.max_model_len:,} tokens"
        )

    @property
    def placement(self) -> str:
        """Platform, kind and number of devices, such as "gpu (NVIDIA L4), sharded across 2 devices"."""
        device = self.platform if self.device.lower() == self.platform else f"{self.platform} ({self.device})"
        return device + (f", sharded across {self.devices} devices" if self.devices > 1 else "")


@dataclass(frozen=True, slots=True)
class MemoryPlanned(_Facts):
    """Planned memory of each device, before anything is loaded."""

    name: ClassVar[str] = "memory_planned"
    plan: "MemoryPlan"
    max_model_len: int

    @property
    def line(self) -> str:
        text = f"memory   {self.plan}; the cache holds {self.plan.cache_tokens:,} tokens"
        return f"{text}; {self.warning}" if self.warning else text

    @property
    def fields(self) -> dict[str, Any]:
        names = ("weights", "cache", "cache_tokens", "workspace", "free")
        return {name: getattr(self.plan, name) for name in names} | {"max_model_len": self.max_model_len}

    @property
    def warning(self) -> str:
        """Warning if the cache is smaller than one request may be, else empty."""
        if self.plan.cache_tokens >= self.max_model_len:
            return ""
        return "that is less than one request of maximum length, and longer requests are refused"


@dataclass(frozen=True, slots=True)
class Serving(_Facts):
    """The server accepts requests."""

    name: ClassVar[str] = "serving"
    models: tuple[str, ...]  # names in the API
    url: str  # of a Unix socket: "unix:" and its path
    keyed: bool  # clients must send an API key
    chats: bool  # the model has a chat template
    documented: bool  # /docs is served

    @property
    def line(self) -> str:
        # Tools that start a server parse the address: keep the format.
        return f"serving  {', '.join(self.models)} at {self.url} (API under /v1)"

    @property
    def reachable(self) -> str:
        """URL for clients on this machine; of a Unix socket, the URL to use with `curl --unix-socket`."""
        if self.url.startswith("unix:"):
            return "http://localhost"
        for wildcard, loopback in _WILDCARDS.items():
            if wildcard in self.url:
                return self.url.replace(wildcard, loopback)
        return self.url

    @property
    def curl(self) -> str:
        """Shell command that requests a reply with log-probs. It refers to the API key's variable, not to the key."""
        command = "curl"
        if self.url.startswith("unix:"):
            command += f" --unix-socket {shlex.quote(self.url.removeprefix('unix:'))}"
        elif self.url.startswith("https:"):
            command += " --insecure"  # few certificates are issued for 127.0.0.1
        lines = [f"{command} {self.reachable}/v1/{'chat/completions' if self.chats else 'completions'}"]
        lines.append("-H 'Content-Type: application/json'")
        if self.keyed:
            lines.append('-H "Authorization: Bearer $LOGPROBD_API_KEY"')
        lines.append(f"-d {shlex.quote(json.dumps(_CHAT if self.chats else _COMPLETION))}")
        return " \\\n  ".join(lines)


type Event = Message | ModelFound | MemoryPlanned | Serving


def defaults_applied(values: Mapping[str, Any]) -> Message:
    """Sampling defaults that replace OpenAI's, from the model's generation_config.json or from options."""
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    line = f"defaults {text} (to ignore the model's: --generation-config vllm)"
    return Message("defaults_taken", line, {"values": values})


def preparing(line: str) -> Message:
    """Work of a first start: downloading the default model, building the CPU kernels."""
    return Message("preparing", line)


def weights_loaded(size: int, seconds: float, kernels: tuple[str, ...]) -> Message:
    """The model is on the device: its bytes, and which of our kernels it uses."""
    line = f"weights  {mb(size)} in {seconds:.1f} s; kernels: {', '.join(kernels) or 'none, XLA only'}"
    return Message("weights_loaded", line, {"bytes": size, "seconds": seconds, "kernels": kernels})


def compile_started(programs: int) -> Message:
    """Compilation starts, which takes a while if the cache is empty."""
    return Message("compile_begun", f"compiling {programs} programs", {"programs": programs})


def program_compiled(program: str, lower_seconds: float, compile_seconds: float, scratch_bytes: int) -> Message:
    """One program is ready; `compile_seconds` includes reading it from the persistent cache."""
    line = (
        f"  {program:<12} lower {lower_seconds:5.2f} s  compile {compile_seconds:5.2f} s"
        f"  scratch {scratch_bytes / 2**20:6.1f} MiB"
    )
    fields = {"program": program, "lower_seconds": lower_seconds, "compile_seconds": compile_seconds}
    return Message("program_compiled", line, fields | {"scratch_bytes": scratch_bytes}, logging.DEBUG)


def all_compiled(programs: int, cached: int, seconds: float) -> Message:
    """All programs are ready; `cached` of them came from the persistent cache."""
    line = f"compiled {programs} programs in {seconds:.1f} s" + (f", {cached} from the cache" if cached else "")
    return Message("all_compiled", line, {"programs": programs, "cached": cached, "seconds": seconds})


def failed(message: str) -> Message:
    """Start-up failed; `message` is for the user."""
    return Message("failed", f"error: {message}", {"message": message}, logging.ERROR)


def interrupted() -> Message:
    """Ctrl-C during start-up."""
    return Message("interrupted", "interrupted during start-up", level=logging.ERROR)


def count(number: int) -> str:
    """Number with a unit, such as "134.5 M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
