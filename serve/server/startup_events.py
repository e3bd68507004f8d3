"""What start-up has to tell, as data: each event says itself in one plain line, and its fields are what JSON has."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

_ANY_ADDRESS = {"://0.0.0.0:": "://127.0.0.1:", "://[::]:": "://[::1]:"}  # where a server on all of them is reached


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that start-up tells."""

    name: ClassVar[str]
    level: ClassVar[int] = logging.INFO

    @property
    def line(self) -> str:
        """The event in plain words, which mean something without the lines around them."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class DefaultsTaken(Event):
    """What requests get where they say nothing, from the model's files or the options."""

    name = "defaults_taken"
    values: Mapping[str, Any]

    @property
    def line(self) -> str:
        """See Event."""
        told = ", ".join(f"{name} {value}" for name, value in self.values.items())
        return f"defaults {told} (--generation-config vllm: none of the model's)"


@dataclass(frozen=True, slots=True)
class Preparing(Event):
    """Work of a first start: downloading the default model, building the CPU kernels."""

    name = "preparing"
    message: str

    @property
    def line(self) -> str:
        """See Event."""
        return self.message


@dataclass(frozen=True, slots=True)
class ModelFound(Event):
    """What is going to be loaded."""

    name = "model_found"
    model: str
    family: str
    parameters: int
    weights_as: str  # dtype, or quantization
    platform: str
    device: str  # kind
    devices: int  # over which it is cut
    max_model_len: int
    max_num_seqs: int

    @property
    def line(self) -> str:
        """See Event."""
        return (
            f"model    {self.model}: {self.family}, {count(self.parameters)} parameters, {self.weights_as} on "
            f"{self.place}; {self.max_num_seqs} requests at once, of at most {self.max_model_len:,} tokens"
        )

    @property
    def place(self) -> str:
        """The devices."""
        device = self.platform if self.device.lower() == self.platform else f"{self.platform} ({self.device})"
        return device + (f", cut over {self.devices} devices" if self.devices > 1 else "")


@dataclass(frozen=True, slots=True)
class MemoryPlanned(Event):
    """Bytes of each device, before anything is loaded."""

    name = "memory_planned"
    weights: int
    cache: int
    cache_tokens: int  # that all devices' pages hold together
    workspace: int  # an estimate
    free: int | None  # now; None: the device does not tell
    max_model_len: int  # tokens

    @property
    def line(self) -> str:
        """See Event."""
        parts = f"weights {mb(self.weights)}, cache {mb(self.cache)}, workspace about {mb(self.workspace)}"
        of_free = "" if self.free is None else f" of {mb(self.free)} that are free"
        text = f"memory   {parts}: {mb(self.needed)}{of_free}; the cache holds {self.cache_tokens:,} tokens"
        return f"{text}; {self.warning}" if self.warning else text

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.cache + self.workspace

    @property
    def warning(self) -> str:
        """Said of a cache that is smaller than one request may be."""
        if self.cache_tokens >= self.max_model_len:
            return ""
        return "that is less than one request of full length: what needs more is refused"


@dataclass(frozen=True, slots=True)
class WeightsLoaded(Event):
    """The model is on the device."""

    name = "weights_loaded"
    bytes: int
    seconds: float
    kernels: tuple[str, ...]  # of our own

    @property
    def line(self) -> str:
        """See Event."""
        return f"weights  {mb(self.bytes)} in {self.seconds:.1f} s; kernels: {self.used}"

    @property
    def used(self) -> str:
        """The kernels in words."""
        return ", ".join(self.kernels) or "none, XLA does it all"


@dataclass(frozen=True, slots=True)
class CompileBegun(Event):
    """Said where no bar shows it: a first start takes a while here."""

    name = "compile_begun"
    programs: int

    @property
    def line(self) -> str:
        """See Event."""
        return f"compiling {self.programs} programs"


@dataclass(frozen=True, slots=True)
class ProgramCompiled(Event):
    """One of the programs is ready."""

    name = "program_compiled"
    level = logging.DEBUG
    program: str
    lower_seconds: float
    compile_seconds: float  # or what reading it from the cache took
    scratch_bytes: int

    @property
    def line(self) -> str:
        """See Event."""
        return (
            f"  {self.program:<12} lower {self.lower_seconds:5.2f} s  compile {self.compile_seconds:5.2f} s"
            f"  scratch {self.scratch_bytes / 2**20:6.1f} MiB"
        )


@dataclass(frozen=True, slots=True)
class AllCompiled(Event):
    """Every program is ready."""

    name = "all_compiled"
    programs: int
    cached: int  # that the persistent cache had
    seconds: float

    @property
    def line(self) -> str:
        """See Event."""
        cached = f", {self.cached} of them from the cache" if self.cached else ""
        return f"compiled {self.programs} programs in {self.seconds:.1f} s{cached}"


@dataclass(frozen=True, slots=True)
class Serving(Event):
    """The server takes requests."""

    name = "serving"
    models: tuple[str, ...]  # names in the API
    url: str  # "unix:" and a path for a socket
    keyed: bool  # whether clients must send a key
    chats: bool  # whether the model has a chat template
    documented: bool  # whether /docs is there

    @property
    def line(self) -> str:
        """See Event. Whoever starts a server reads the address from this line: it keeps its form."""
        return f"serving  {', '.join(self.models)} at {self.url} (API under /v1)"

    @property
    def reachable(self) -> str:
        """An URL that a client on this machine can use; of a socket, the one beside `curl --unix-socket`."""
        if self.url.startswith("unix:"):
            return "http://localhost"
        for bound, reached in _ANY_ADDRESS.items():
            if bound in self.url:
                return self.url.replace(bound, reached)
        return self.url


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """Start-up has ended; the message is meant for whoever started us."""

    name = "failed"
    level = logging.ERROR
    message: str

    @property
    def line(self) -> str:
        """See Event."""
        return f"error: {self.message}"


@dataclass(frozen=True, slots=True)
class Interrupted(Event):
    """Ctrl-C came before all was ready."""

    name = "interrupted"
    level = logging.ERROR

    @property
    def line(self) -> str:
        """See Event."""
        return "interrupted before it was ready"


def mb(size: int) -> str:
    """Bytes as "1,234 MB"."""
    return f"{size / 1e6:,.0f} MB"


def count(number: int) -> str:
    """Such as "134.5 M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
