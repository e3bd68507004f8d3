"""Report: the same tables for a terminal and as Markdown. It contains no text of prompts or answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.soak.idle import IdleChecks
from tools.soak.memory import LEAK_MB, growth
from tools.soak.results import CHECKS, LATENCY, MEMORY, Results, quantile
from tools.soak.soak import Soak

_SHOWN = 20  # violations listed in full
_ALL = "all"

# Counters of the server in the report.
_COUNTERS = {
    "prompt tokens looked up in the prefix cache": "logprobd:prefix_cache_queries_total",
    "of these, cached": "logprobd:prefix_cache_hits_total",
    "preempted requests": "logprobd:num_preemptions_total",
    "requests rejected because the queue was full": "logprobd:admission_rejections_total",
    "engine steps": "logprobd:iteration_tokens_total_count",
    "CPU seconds": "process_cpu_seconds_total",
}


@dataclass(frozen=True, slots=True)
class Section:
    """A table. The first column is text; the others are numbers, or text with `prose`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


def add_final_checks(soak: Soak) -> None:
    """Check memory growth and latency at the end of a soak."""
    line, results, max_p99_ms = growth(soak.idle.samples), soak.results, soak.settings.max_p99_ms
    if line is not None:
        grows = f"it grows by {line.mb_per_hour:.0f} MB/h, significantly more than {line.lowest:.0f} MB/h"
        results.check(MEMORY, "at the end", [grows] if line.leaks(soak.settings.max_growth) else [], line.samples)
    if (p99 := quantile(results.between_tokens, 0.99)) is not None:
        slow = f"the p99 between tokens is {1e3 * p99:.0f} ms; the limit is {max_p99_ms:g} ms"
        results.check(LATENCY, "at the end", [slow] if 1e3 * p99 > max_p99_ms else [], len(results.between_tokens))


def sections(soak: Soak) -> Iterator[Section]:
    """Yield the tables of the report."""
    results = soak.results
    yield Section("Soak", ("", ""), list(_facts(soak)), prose=True)
    yield _checks(results)
    yield _requests(results)
    yield _replay_section(soak)
    yield _latency(results)
    yield Section("Memory of the idle server", ("", ""), list(_memory(soak.idle, soak.settings.max_growth)), prose=True)
    yield Section("Server metrics", ("", ""), list(_counted(soak.idle)))
    if results.violations:
        shown = [(each.check, each.where, each.what) for each in results.violations[:_SHOWN]]
        title = f"Violations, {len(shown)} of {len(results.violations)}"
        yield Section(title, ("check", "where", "what"), shown, prose=True)


def _facts(soak: Soak) -> Iterator[tuple[str, str]]:
    facts, chosen, results = soak.facts, soak.settings, soak.results
    passed = "interrupted" if soak.interrupted else "passed"
    yield "result", f"failed: {len(results.violations)} violations" if results.violations else passed
    yield "model", f"{facts.model}, context of {facts.max_model_len:,} tokens"
    yield "server", f"logprobd {facts.version}, {facts.fingerprint}"
    yield "duration", f"{soak.seconds / 60:.1f} minutes"
    yield "traffic", f"{chosen.clients} clients, bursts of {chosen.burst} requests; seed {chosen.seed}"
    yield "requests", f"{results.outcomes.total():,}, {results.outcomes.total() / soak.seconds:.1f} per second"
    yield (
        "tokens",
        f"{results.prompt_tokens:,} of prompts, {results.output_tokens:,} generated",
    )


def _checks(results: Results) -> Section:
    failed = {check: sum(each.check == check for each in results.violations) for check in CHECKS}
    made = [check for check in CHECKS if results.checked[check] or failed[check]]
    rows = [(check, f"{results.checked[check]:,}", f"{failed[check]:,}") for check in made]
    return Section("Checks", ("check", "checked", "violations"), rows)


def _requests(results: Results) -> Section:
    """Statuses by kind of request."""
    outcomes = results.outcomes
    kinds, statuses = sorted({kind for kind, _ in outcomes}), sorted({status for _, status in outcomes})
    rows = []
    for name in (*kinds, _ALL):
        those = kinds if name == _ALL else [name]
        counts = [sum(outcomes[kind, status] for kind in those) for status in statuses]
        rows.append((name, *(f"{count:,}" if count else "" for count in counts), f"{sum(counts):,}"))
    return Section("Requests", ("kind", *statuses, _ALL), rows)


def _replay_section(soak: Soak) -> Section:
    rule = "to the last bit" if soak.tolerance == 0 else f"log-probs within {soak.tolerance:g}"
    rows = [(name, f"{count:,}") for name, count in sorted(soak.results.replay.items())]
    return Section(f"Replays, {rule}", ("", ""), rows)


def _latency(results: Results) -> Section:
    rows = []
    for name, values in (("time to first token", results.first_token), ("between tokens", results.between_tokens)):
        quantiles = [quantile(values, share) for share in (0.5, 0.9, 0.99, 1.0)]
        rows.append(
            (name, *("" if value is None else f"{1e3 * value:,.0f}" for value in quantiles), f"{len(values):,}")
        )
    return Section("Latency of streams at the client, ms", ("", "p50", "p90", "p99", "max", "measured"), rows)


def _memory(idle: IdleChecks, max_growth: float) -> Iterator[tuple[str, str]]:
    if not idle.samples:
        return
    first, last, line = idle.samples[0], idle.samples[-1], growth(idle.samples)
    peak = max(sample.bytes for sample in idle.samples)
    sizes = (("at the start", first.bytes), ("at the end", last.bytes), ("peak", peak))
    yield "resident", ", ".join(f"{size / 1e6:,.0f} MB {when}" for when, size in sizes)
    if line is None:
        yield "slope", "unknown: fewer than three samples after the warm-up"
    else:
        over = f"{line.samples} samples in {60 * line.hours:.0f} minutes after the warm-up"
        yield "slope", f"{line.mb_per_hour:+,.1f} MB/h, standard error {line.error:,.1f}; {over}"
        rule = f"a leak is more than {max_growth:g} MB/h and {LEAK_MB:g} MB in total"
        yield "lower bound", f"{line.lowest:+,.1f} MB/h (95 %); {rule}"
    yield "open files", f"{first.open_files:.0f} at the start, {last.open_files:.0f} at the end"


def _counted(idle: IdleChecks) -> Iterator[tuple[str, str]]:
    for name, counter in _COUNTERS.items():
        if counter in idle.last:
            yield name, f"{idle.last[counter] - idle.first.get(counter, 0):,.0f}"


def show(tables: Sequence[Section], console: Console) -> None:
    """Print the tables to a terminal."""
    for each in tables:
        table = Table(title=each.title, title_justify="left", show_header=any(each.columns))
        for number, column in enumerate(each.columns):
            table.add_column(column, justify="left" if number == 0 or each.prose else "right", overflow="fold")
        for row in each.rows:
            table.add_row(*map(escape, row))
        console.print(table)


def markdown(tables: Sequence[Section]) -> str:
    """Return the tables as Markdown."""
    return "\n".join(_markdown_of(each) for each in tables)


def _markdown_of(section: Section) -> str:
    rule = ["---" if number == 0 or section.prose else "---:" for number in range(len(section.columns))]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in section.rows]
    lines = [f"| {' | '.join(line)} |" for line in (section.columns, rule, *rows)]
    return "\n".join([f"### {section.title}", "", *lines, ""])
