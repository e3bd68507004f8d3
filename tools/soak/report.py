"""The report: the same tables for a terminal and as Markdown. It holds no prompt, and no text of an answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.soak.idle import Idle
from tools.soak.memory import LEAK_MB, growth
from tools.soak.soak import Soak
from tools.soak.tally import CHECKS, LATENCY, MEMORY, Tally, quantile

_SHOWN = 20  # violations that are told in full
_ALL = "all"

# What the server counts of what was done to it, so that one can see what a soak has been through.
_COUNTERS = {
    "prompt tokens looked up in the prefix cache": "logprobd:prefix_cache_queries_total",
    "of these found": "logprobd:prefix_cache_hits_total",
    "requests that lost their pages (preempted)": "logprobd:num_preemptions_total",
    "requests refused, the queue being full": "logprobd:admission_rejections_total",
    "steps of the engine": "logprobd:iteration_tokens_total_count",
    "seconds of CPU": "process_cpu_seconds_total",
}


@dataclass(frozen=True, slots=True)
class Section:
    """A table: the first column is text, the others are numbers unless `prose` says that all are text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


def judge(soak: Soak) -> None:
    """What can only be said at the end: of memory, and of latency."""
    line, tally, max_p99_ms = growth(soak.idle.samples), soak.tally, soak.settings.max_p99_ms
    if line is not None:
        grows = f"it grows by {line.mb_per_hour:.0f} MB/h, surely by more than {line.lowest:.0f} MB/h"
        tally.check(MEMORY, "at the end", [grows] if line.leaks(soak.settings.max_growth) else [], line.samples)
    if (p99 := quantile(tally.between_tokens, 0.99)) is not None:
        slow = f"the p99 between tokens is {1e3 * p99:.0f} ms; {max_p99_ms:g} ms are allowed"
        tally.check(LATENCY, "at the end", [slow] if 1e3 * p99 > max_p99_ms else [], len(tally.between_tokens))


def sections(soak: Soak) -> Iterator[Section]:
    """The tables."""
    tally = soak.tally
    yield Section("Soak", ("", ""), list(_facts(soak)), prose=True)
    yield _checks(tally)
    yield _requests(tally)
    yield _again(soak)
    yield _latency(tally)
    yield Section("Memory, in pauses", ("", ""), list(_memory(soak.idle, soak.settings.max_growth)), prose=True)
    yield Section("What the server counted", ("", ""), list(_counted(soak.idle)))
    if tally.violations:
        shown = [(each.check, each.where, each.what) for each in tally.violations[:_SHOWN]]
        title = f"Violations, {len(shown)} of {len(tally.violations)}"
        yield Section(title, ("check", "where", "what"), shown, prose=True)


def _facts(soak: Soak) -> Iterator[tuple[str, str]]:
    facts, chosen, tally = soak.facts, soak.settings, soak.tally
    passed = "interrupted" if soak.interrupted else "passed"
    yield "result", f"failed: {len(tally.violations)} violations" if tally.violations else passed
    yield "model", f"{facts.model}, {facts.max_model_len:,} tokens at most"
    yield "server", f"logprobd {facts.version}, {facts.fingerprint}"
    yield "duration", f"{soak.seconds / 60:.1f} minutes"
    yield "traffic", f"{chosen.clients} clients, now and then {chosen.burst} requests at once; seed {chosen.seed}"
    yield "requests", f"{tally.outcomes.total():,}, {tally.outcomes.total() / soak.seconds:.1f} a second"
    yield "tokens", f"{tally.prompt_tokens:,} of prompts, {tally.output_tokens:,} generated, of answers that were read"


def _checks(tally: Tally) -> Section:
    failed = {check: sum(each.check == check for each in tally.violations) for check in CHECKS}
    made = [check for check in CHECKS if tally.checked[check] or failed[check]]
    rows = [(check, f"{tally.checked[check]:,}", f"{failed[check]:,}") for check in made]
    return Section("Checks", ("what must hold", "checked", "violations"), rows)


def _requests(tally: Tally) -> Section:
    """Statuses by kind."""
    outcomes = tally.outcomes
    kinds, statuses = sorted({kind for kind, _ in outcomes}), sorted({status for _, status in outcomes})
    rows = []
    for name in (*kinds, _ALL):
        those = kinds if name == _ALL else [name]
        counts = [sum(outcomes[kind, status] for kind in those) for status in statuses]
        rows.append((name, *(f"{count:,}" if count else "" for count in counts), f"{sum(counts):,}"))
    return Section("Requests", ("kind", *statuses, _ALL), rows)


def _again(soak: Soak) -> Section:
    rule = "to the last bit" if soak.tolerance == 0 else f"log-probs within {soak.tolerance:g}"
    rows = [(name, f"{count:,}") for name, count in sorted(soak.tally.again.items())]
    return Section(f"The same numbers again, {rule}", ("", ""), rows)


def _latency(tally: Tally) -> Section:
    rows = []
    for name, values in (("time to first token", tally.first_token), ("between tokens", tally.between_tokens)):
        told = [quantile(values, share) for share in (0.5, 0.9, 0.99, 1.0)]
        rows.append((name, *("" if each is None else f"{1e3 * each:,.0f}" for each in told), f"{len(values):,}"))
    return Section("Latency of streams as clients saw it, in ms", ("", "p50", "p90", "p99", "most", "measured"), rows)


def _memory(idle: Idle, max_growth: float) -> Iterator[tuple[str, str]]:
    if not idle.samples:
        return
    first, last, line = idle.samples[0], idle.samples[-1], growth(idle.samples)
    most = max(each.bytes for each in idle.samples)
    sizes = (("at first", first.bytes), ("at the end", last.bytes), ("at most", most))
    yield "resident", ", ".join(f"{size / 1e6:,.0f} MB {when}" for when, size in sizes)
    if line is None:
        yield "slope", "not told: there were fewer than three pauses after the warm-up"
    else:
        over = f"{line.samples} pauses in {60 * line.hours:.0f} minutes after the warm-up"
        yield "slope", f"{line.mb_per_hour:+,.1f} MB/h, standard error {line.error:,.1f}; {over}"
        rule = f"a leak is more than {max_growth:g} MB/h and {LEAK_MB:g} MB in all"
        yield "surely above", f"{line.lowest:+,.1f} MB/h (95 %); {rule}"
    yield "open files", f"{first.open_files:.0f} at first, {last.open_files:.0f} at the end"


def _counted(idle: Idle) -> Iterator[tuple[str, str]]:
    for name, counter in _COUNTERS.items():
        if counter in idle.last:
            yield name, f"{idle.last[counter] - idle.first.get(counter, 0):,.0f}"


def show(tables: Sequence[Section], console: Console) -> None:
    """For a terminal."""
    for each in tables:
        table = Table(title=each.title, title_justify="left", show_header=any(each.columns))
        for number, column in enumerate(each.columns):
            table.add_column(column, justify="left" if number == 0 or each.prose else "right", overflow="fold")
        for row in each.rows:
            table.add_row(*map(escape, row))
        console.print(table)


def markdown(tables: Sequence[Section]) -> str:
    """As Markdown."""
    return "\n".join(_markdown_of(each) for each in tables)


def _markdown_of(section: Section) -> str:
    rule = ["---" if number == 0 or section.prose else "---:" for number in range(len(section.columns))]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in section.rows]
    lines = [f"| {' | '.join(line)} |" for line in (section.columns, rule, *rows)]
    return "\n".join([f"### {section.title}", "", *lines, ""])
