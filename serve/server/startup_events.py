"""Events of start-up. Each has a plain text line, a name and fields for JSON, and perhaps a drawing for terminals."""

import itertools
import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from serve import __version__
from serve.config.config import ServeConfig
from serve.config.values import mb

if TYPE_CHECKING:
    import jax

    from compiled.programs import Program
    from model.weights.loader import StoredWeights
    from serve.server.memory_plan import MemoryPlan
    from serve.server.model_files import ModelFiles

LABEL_STYLE = "bold cyan"
# The memory bar. Its shades differ so that it can be read without colors.
_SHADES = {"weights": "█", "cache": "▓", "workspace": "▒", "free": "░"}
_COLORS = {"weights": "cyan", "cache": "magenta", "workspace": "yellow", "free": "bright_black"}
_CHAT = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 32,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 3,
}
_LAYER = re.compile(r"(.*?)\.(\d+)\.(.*)")  # a tensor's name: prefix, layer, suffix
_COMPLETION = {"prompt": "The capital of France is", "max_tokens": 32, "temperature": 0, "logprobs": 3}


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    line: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the JSON object; "message" replaces the line there
    level: int = logging.INFO
    draw: Callable[[int], Iterable[RenderableType]] | None = None  # what a terminal of a width shows, if not the line


def defaults_applied(values: Mapping[str, Any]) -> Event:
    """Sampling defaults that replace OpenAI's, from the model's generation_config.json or from options."""
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    line = f"defaults {text} (to ignore the model's: --generation-config vllm)"
    return Event("defaults_taken", line, {"values": values})


def model_found(files: "ModelFiles", device: "jax.Device") -> Event:
    config, model, family = files.config, files.source.name, files.checkpoint.config.family
    parameters = sum(math.prod(info.shape) for info in files.checkpoint.names().values())
    devices, max_num_seqs, weights_as = config.tensor_parallel_size, config.max_num_seqs, config.weights_as
    platform, max_model_len = device.platform, files.max_model_len
    fields = {"model": model, "family": family, "parameters": parameters, "weights_as": weights_as}
    fields |= {"kv_cache_dtype": config.kv_dtype}
    fields |= {"platform": platform, "device": device.device_kind, "devices": devices}
    fields |= {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
    formats = {info.block_format.name for info in files.checkpoint.names().values() if info.block_format}
    stored = f"{', '.join(sorted(formats))} with " if formats and config.quantization == "auto" else ""
    weights = f"{family}, {_count(parameters)} parameters, {stored}{weights_as}"
    weights += f" with a {config.kv_dtype} cache" if config.kv_dtype != config.dtype else ""
    if files.checkpoint.quantizes_activations:
        weights += "; activations are not quantized, although quantization_config asks for it"
    placement = platform if device.device_kind.lower() == platform else f"{platform} ({device.device_kind})"
    placement += f", sharded across {devices} devices" if devices > 1 else ""
    requests = f"up to {max_num_seqs} concurrent requests of {max_model_len:,} tokens"
    table = Table.grid(padding=(0, 2))
    capacity = f"up to {max_num_seqs} of {max_model_len:,} tokens each"
    rows = {"model": Text(model, "bold"), "weights": weights, "device": placement, "requests": capacity}
    for label, value in rows.items():
        table.add_row(Text(label, LABEL_STYLE), value)
    panel = Panel(table, title=f"logprobd {__version__}", title_align="left", box=box.ROUNDED, border_style="dim")
    return Event(
        "model_found", f"model    {model}: {weights} on {placement}; {requests}", fields, draw=lambda _: [panel]
    )


def memory_planned(plan: "MemoryPlan", max_model_len: int) -> Event:
    """Planned memory of each device, before anything is loaded."""
    capacity, warning = f"the cache holds {plan.cache_tokens:,} tokens", ""
    if plan.cache_tokens < max_model_len:
        warning = "that is less than one request of maximum length, and longer requests are refused"
    sizes = {"weights": plan.weights, "cache": plan.cache, "workspace": plan.workspace}
    if plan.free is not None:
        sizes["free"] = max(0, plan.free - plan.needed)

    def draw(width: int) -> Iterable[Text]:
        yield _memory_bar(sizes, width)
        legend = _labelled("", "")
        for name, size in sizes.items():
            legend.append(f"{_SHADES[name]} ", _COLORS[name]).append(f"{name} {mb(size)}  ")
        yield legend
        yield _labelled("", capacity)
        if warning:
            yield _labelled("", warning, "yellow")

    names = ("weights", "cache", "cache_tokens", "workspace", "free")
    fields = {name: getattr(plan, name) for name in names} | {"max_model_len": max_model_len}
    line = f"memory   {plan}; {capacity}" + (f"; {warning}" if warning else "")
    return Event("memory_planned", line, fields, draw=draw)


def weights_loaded(size: int, stored: "StoredWeights", seconds: float, kernels: tuple[str, ...]) -> Event:
    """The model is on the device: its bytes, the formats of its matrices, and which of our kernels it uses.

    A line per format follows if there are several, or others than in the files.
    """
    formats = ", ".join(f"{_count(count)} {name}" for name, count in stored.matrices.items())
    line = f"weights  {mb(size)} in {seconds:.1f} s, {stored.bits_per_weight:.2f} bits each: {formats}; "
    line += f"kernels: {', '.join(kernels) or 'none, XLA only'}"
    layers = _layers(itertools.chain.from_iterable(stored.tensors.values()))
    tensors = {
        name if name == in_file else f"{name} from {in_file}": _patterns(names, layers)
        for (name, in_file), names in stored.tensors.items()
    }
    fields = {"message": line, "bytes": size, "seconds": seconds, "kernels": kernels}
    fields |= {"bits_per_weight": round(stored.bits_per_weight, 3), "formats": dict(stored.matrices)}
    fields |= {"tensors": tensors}
    if len(tensors) > 1 or any(name != in_file for name, in_file in stored.tensors):
        line = "\n".join([line, *(f"  {label}: {', '.join(patterns)}" for label, patterns in tensors.items())])
    if stored.skipped:
        count, nbytes = len(stored.skipped), sum(stored.skipped.values())
        sections = {_section(name) for name in stored.skipped}
        use = "to predict further tokens" if sections == {"layers"} else "for images or audio"
        line += f"\n  not served, {use}: {count} of {', '.join(sorted(sections))}, {mb(nbytes)}"
        fields |= {"skipped": {"count": count, "bytes": nbytes}}
    return Event("weights_loaded", line, fields)


def _section(name: str) -> str:
    """The part of a model that a skipped tensor belongs to, or the file's name."""
    return name if name.endswith(".gguf") else name.removeprefix("model.").split(".")[0]


type _Layers = dict[tuple[str, str], list[int]]  # what a tensor's name has before and after its layer -> layers


def _layers(names: Iterable[str]) -> _Layers:
    layers: _Layers = {}
    for name in names:
        match = _LAYER.fullmatch(name.removesuffix(".weight"))
        prefix, number, suffix = match.groups() if match else (name.removesuffix(".weight"), "", "")
        layers.setdefault((prefix, suffix), []).extend([int(number)] if number else [])
    return layers


def _patterns(names: Iterable[str], layers_of_all: _Layers) -> list[str]:
    """Names of tensors, such as "blk.*.attn_{k,q}" or, of some layers only, "blk.{0-3,7}.attn_v"."""
    groups: dict[tuple[str, str], list[str]] = {}
    for (prefix, suffix), layers in _layers(names).items():
        all_layers = len(layers) > 1 and len(layers) == len(layers_of_all[prefix, suffix])
        groups.setdefault((prefix, "*" if all_layers else _ranges(layers)), []).append(suffix)
    return [
        f"{prefix}.{layers}.{_braced(sorted(suffixes))}" if layers else prefix
        for (prefix, layers), suffixes in groups.items()
    ]


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges, such as "{0-3,7}"."""
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return _braced([str(first) if first == last else f"{first}-{last}" for first, last in ends])


def _braced(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}" if parts else ""


def program_compiled(program: "Program") -> Event:
    times, scratch = ("lower_seconds", "compile_seconds"), program.temp_bytes
    fields = {"program": program.name} | {name: getattr(program, name) for name in times} | {"scratch_bytes": scratch}
    line = f"  {program.name:<12} lower {program.lower_seconds:5.2f} s  compile {program.compile_seconds:5.2f} s"
    return Event("program_compiled", f"{line}  scratch {scratch / 2**20:6.1f} MiB", fields, logging.DEBUG)


def all_compiled(programs: int, cached: int, seconds: float) -> Event:
    """All programs are ready; `cached` of them came from the persistent cache."""
    line = f"compiled {programs} programs in {seconds:.1f} s" + (f", {cached} from the cache" if cached else "")
    return Event("all_compiled", line, {"programs": programs, "cached": cached, "seconds": seconds})


def server_started(config: ServeConfig, models: Sequence[str], url: str, *, chats: bool) -> Event:
    """The server accepts requests. `url` is "unix:" and a path for a Unix socket; `chats`: it has a chat template."""
    names, base = ", ".join(models), _reachable(url)
    keyed, documented = bool(config.api_key), not config.disable_fastapi_docs

    def draw(_: int) -> Iterable[Text]:
        yield Text()
        yield Text.assemble(("serving  ", "bold green"), f"{names} at ", (url, "bold"))
        if not url.startswith("unix:"):
            yield _labelled("API", f"{base}/v1")
            yield _labelled("inspector", f"{base}/")
            if documented:
                yield _labelled("docs", f"{base}/docs")
        yield Text()
        yield Text(curl_command(url, keyed=keyed, chats=chats), "green")
        yield Text()

    line = f"serving  {names} at {url} (API under /v1)"  # tools that start a server parse the address
    fields = {"models": models, "url": url, "keyed": keyed, "chats": chats, "documented": documented}
    return Event("serving", line, fields, draw=draw)


def curl_command(url: str, *, keyed: bool, chats: bool) -> str:
    """Shell command that requests a reply with log-probs. It refers to the API key's variable, not to the key."""
    command = "curl"
    if url.startswith("unix:"):
        command += f" --unix-socket {shlex.quote(url.removeprefix('unix:'))}"
    elif url.startswith("https:"):
        command += " --insecure"  # few certificates are issued for 127.0.0.1
    lines = [f"{command} {_reachable(url)}/v1/{'chat/completions' if chats else 'completions'}"]
    lines.append("-H 'Content-Type: application/json'")
    if keyed:
        lines.append('-H "Authorization: Bearer $LOGPROBD_API_KEY"')
    lines.append(f"-d {shlex.quote(json.dumps(_CHAT if chats else _COMPLETION))}")
    return " \\\n  ".join(lines)


def failed(message: str) -> Event:
    return Event("failed", f"error: {message}", {"message": message}, logging.ERROR)


def _reachable(url: str) -> str:
    """URL for clients on this machine; of a Unix socket, the URL to use with `curl --unix-socket`."""
    if url.startswith("unix:"):
        return "http://localhost"
    return url.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")


def _memory_bar(sizes: Mapping[str, int], width: int) -> Text:
    """The parts of the memory as one bar; every part that is not empty has at least one cell."""
    bar, total = _labelled("memory", ""), max(1, sum(sizes.values()))
    available = width - len(bar)
    for name, size in sizes.items():
        cells = width - len(bar) if name == "free" else max(1, round(available * size / total))
        bar.append(_SHADES[name] * (cells if size else 0), _COLORS[name])
    return bar


def _labelled(label: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{label:<9} ", LABEL_STYLE), (text, style))


def _count(number: int) -> str:
    """Number with a unit, such as "134.5 M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
