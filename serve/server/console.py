"""Start-up on a terminal: a panel, the memory plan as a bar, bars for loading and compiling, and then the addresses."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from serve import __version__
from serve.server.report_curl import curl_command
from serve.server.startup_events import (
    AllCompiled,
    DefaultsTaken,
    Event,
    Failed,
    Interrupted,
    MemoryPlanned,
    ModelFound,
    ProgramCompiled,
    Serving,
    WeightsLoaded,
    count,
    mb,
)

_WIDTH = 100  # columns at most
_LABEL = "bold cyan"
# Of the memory, each with its shade, which is told apart without colours, too.
_PARTS = (
    ("weights", "█", "cyan"),
    ("cache", "▓", "magenta"),
    ("workspace", "▒", "yellow"),
    ("left free", "░", "bright_black"),
)


class ScreenReporter:
    """Paints on a console of a terminal."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        """`verbose` also shows a line for each program."""
        self._console = console
        self._verbose = verbose

    def tell(self, event: Event) -> None:
        """See Reporter."""
        match event:
            case ProgramCompiled():
                if self._verbose:
                    self._print(Text(event.line, "dim"))
            case ModelFound():
                self._print(_panel(event))
            case DefaultsTaken():
                self._print(_labelled("defaults", ", ".join(f"{name} {each}" for name, each in event.values.items())))
            case MemoryPlanned():
                self._memory(event)
            case WeightsLoaded():
                self._print(_done(f"{mb(event.bytes)} of weights in {event.seconds:.1f} s; kernels: {event.used}"))
            case AllCompiled():
                cached = f" ({event.cached} from the cache)" if event.cached else ""
                self._print(_done(f"{event.programs} programs compiled in {event.seconds:.1f} s{cached}"))
            case Serving():
                self._serving(event)
            case Failed():
                self._print(Text.assemble(("error: ", "bold red"), event.message))
            case Interrupted():
                self._print(Text(event.line, "yellow"))
            case _:
                self._print(Text(event.line))

    @contextmanager
    def loading(self) -> Iterator[Callable[[int, int], None]]:
        """See Reporter."""
        with self._bar("loading", DownloadColumn(), TransferSpeedColumn()) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def compiling(self, names: Sequence[str]) -> Iterator[Callable[[ProgramCompiled], None]]:
        """See Reporter."""
        # Programs are begun in this order, so the first that is not ready is in work.
        left, lock = list(names), threading.Lock()
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("[dim]{task.description}", markup=True))
        with self._bar("compiling", *columns) as bar:
            task = bar.add_task(left[0] if left else "", total=len(left))

            def ready(program: ProgramCompiled) -> None:
                with lock:
                    if program.program in left:
                        left.remove(program.program)
                    bar.update(task, advance=1, description=left[0] if left else "")
                self.tell(program)

            yield ready

    def _bar(self, label: str, *columns: ProgressColumn) -> Progress:
        return Progress(TextColumn(f"[{_LABEL}]{label:<9}"), BarColumn(), *columns, console=self._console)

    def _memory(self, plan: MemoryPlanned) -> None:
        rest = None if plan.free is None else max(0, plan.free - plan.needed)
        sizes = (plan.weights, plan.cache, plan.workspace, rest)
        self._print(_memory_bar(sizes, min(_WIDTH, self._console.width)))
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        notes = ("", f"{plan.cache_tokens:,} tokens", "estimated", "")
        for (name, shade, colour), size, note in zip(_PARTS, sizes, notes, strict=True):
            label = Text.assemble((f"          {shade} ", colour), name)
            table.add_row(label, "not told" if size is None else mb(size), Text(note, "dim"))
        self._print(table)
        if plan.warning:
            self._print(Text(f"          the cache: {plan.warning}", "yellow"))

    def _serving(self, event: Serving) -> None:
        self._print(Text())
        self._print(Text.assemble(("serving  ", "bold green"), f"{', '.join(event.models)} at ", (event.url, "bold")))
        if not event.url.startswith("unix:"):
            self._print(_labelled("API", f"{event.reachable}/v1"))
            self._print(_labelled("inspector", f"{event.reachable}/"))
            if event.documented:
                self._print(_labelled("docs", f"{event.reachable}/docs"))
        self._print(Text())
        self._print(Text(curl_command(event), "green"))
        self._print(Text())

    def _print(self, what: RenderableType) -> None:
        """Without breaks in texts: what is copied from the screen must be whole."""
        if isinstance(what, Text):
            self._console.print(what, soft_wrap=True)
        else:
            self._console.print(what, width=min(_WIDTH, self._console.width))


def _memory_bar(sizes: Sequence[int | None], width: int) -> Text:
    """The parts of the memory side by side."""
    known = [size or 0 for size in sizes]
    room, total = width - len(_labelled("", "")), max(1, sum(known))
    widths = [max(1, round(room * size / total)) if size else 0 for size in known]  # what is there is seen
    widths[-1] = max(0, room - sum(widths[:-1])) if known[-1] else 0
    blocks = ((shade * cells, colour) for (_, shade, colour), cells in zip(_PARTS, widths, strict=True))
    return Text.assemble(_labelled("memory", ""), *blocks)


def _panel(model: ModelFound) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("model", _LABEL), Text(model.model, "bold"))
    table.add_row(Text("weights", _LABEL), f"{model.family}, {count(model.parameters)} parameters, {model.weights_as}")
    table.add_row(Text("device", _LABEL), model.place)
    table.add_row(Text("requests", _LABEL), f"{model.max_num_seqs} at once, of at most {model.max_model_len:,} tokens")
    return Panel(table, title=f"logprobd {__version__}", title_align="left", box=box.ROUNDED, border_style="dim")


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label:<9} ", _LABEL), text)


def _done(text: str) -> Text:
    return Text.assemble(("        ✓ ", "green"), text)
