"""Reports, summaries, comparisons and timings as tables on a terminal, drawn by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape as unmarked
from rich.table import Table

from ..ir.address import printable
from .report import PassReport, Report
from .session import LARGE

if TYPE_CHECKING:
    from ..ir.summary import Summary
    from .compare import Comparison
    from .measure import Timing

MOST_LINES = 6  # kinds of change, and reasons of skips, shown for one pass; --json has all


def show_report(report: Report, console: Console) -> None:
    """What each pass did and left alone, then the model before and after."""
    table = _table("pass", "did", "left alone", "seconds")
    for entry in report.passes:
        name = f"{entry.group}: {entry.name}" if entry.group else entry.text
        table.add_row(plain(name), _deeds(entry), _reasons(entry), f"{entry.seconds:.2f}")
    console.print(table)
    console.print(_before_and_after(report))
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {plain(warning)}")


def show_pages(rows: list[tuple[str, str]], console: Console) -> None:
    """Name and summary of each pass."""
    table = _table("pass", "what it does")
    for name, summary in rows:
        table.add_row(name, plain(summary))
    console.print(table)


def show_comparison(comparison: Comparison, about: str, console: Console) -> None:
    """One line for each output."""
    table = _table("output", "max|Δ|/max|y|", "SQNR dB", "cosine", "top-1 agreement")
    for name, output in comparison.outputs.items():
        table.add_row(
            plain(printable(name)),
            _number(output.max_error),
            _number(output.sqnr_db),
            _number(output.cosine, ".6f"),
            "-" if output.top1 is None else f"{output.top1:.2%}",
        )
    console.print(table)
    console.print("bit-identical" if comparison.equal else "not bit-identical", f"on {plain(about)}")


def show_timings(timings: list[Timing], about: str, console: Console) -> None:
    """One line for each model."""
    table = _table("model", "median ms", "spread", "ratio", "load ms", "bytes", "peak memory")
    for timing in timings:
        table.add_row(
            plain(timing.name),
            f"{timing.latency_ms:.3f}",
            f"± {timing.spread_ms:.3f}",
            f"{timing.ratio:.2f}x",
            f"{timing.load_ms:.1f}",
            f"{timing.file_bytes:,}",
            _mebibytes(timing.peak_bytes),
        )
    console.print(table)
    clock = "CPU time" if timings[0].threads == 1 else "wall time"
    console.print(f"on {plain(about)}; ratio: median over rounds of {clock} to the first model's")


def show_summary(summary: Summary, console: Console) -> None:
    """The model in a few tables: what it is, what it computes with, and its weights."""
    facts = Table.grid(padding=(0, 2))
    for name, value in summary.lines():
        facts.add_row(f"[bold]{name}[/]", plain(value))
    console.print(facts)
    table = _table("weight", "type", "place", "used by", "zeros", "distinct", "bytes", "entropy")
    for weight in summary.weights:
        table.add_row(
            plain(printable(weight.address)),
            plain(weight.type),
            plain(weight.place),
            plain(weight.used_by),
            f"{weight.sparsity:.1%}",
            weight.distinct_text,
            f"{weight.bytes:,}",
            f"{weight.entropy_bytes:,}",
        )
    console.print(table)


def plain(text: str) -> str:
    """Text for rich without what a terminal or rich would act on; backslashes stay, for escaped names have theirs."""
    return unmarked("".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text))


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        numeric = column in {"seconds", "zeros", "distinct", "bytes", "entropy", "ratio", "SQNR dB", "cosine"}
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _deeds(entry: PassReport) -> str:
    return _counted(entry.ledger.deeds()) or "[yellow]nothing[/]"


def _reasons(entry: PassReport) -> str:
    return _counted(entry.ledger.reasons())


def _counted(counts: dict[str, int]) -> str:
    lines = [f"{count} × {plain(printable(what))}" for what, count in list(counts.items())[:MOST_LINES]]
    if len(counts) > MOST_LINES:
        lines.append(f"... and {sum(list(counts.values())[MOST_LINES:])} more (--json FILE lists them)")
    return "\n".join(lines)


def _before_and_after(report: Report) -> Table:
    table = _table("", "before", "after")
    before, after = report.input, report.output
    forms = {"bytes": "{0.bytes:,}", "nodes": "{0.nodes:,}", "weights": "{0.weights:,}", "sparsity": "{0.sparsity:.2%}"}
    for name, form in forms.items():
        grown = " [yellow](larger)[/]" if name == "bytes" and after and after.bytes > before.bytes else ""
        table.add_row(name, form.format(before), (form.format(after) if after else "-") + grown)
    check = report.check
    if check.comparison is not None:
        about = plain(check.feeds or "") + (" [yellow](random)[/]" if check.random else "")
        table.add_row("error max|Δ|/max|y|", "", f"{_number(check.comparison.max_error)} on {about}")
        noise = [share for output in check.comparison.outputs.values() if (share := output.noise_share) is not None]
        table.add_row("the runtime's own noise", f"{_number(max(noise, default=None))}", "")
        table.add_row("SQNR", "", f"{_number(check.comparison.min_sqnr)} dB")
    elif check.not_run:
        table.add_row("check", "", f"not run ({plain(check.not_run)})")
    elif check.mode == "off":
        table.add_row("check", "", "off")
    if report.metric is not None:
        table.add_row(
            plain(report.metric.name), _number(report.metric.before, ".6g"), _number(report.metric.after, ".6g")
        )
    if report.latency:
        table.add_row("latency ms a run", f"{report.latency['before_ms']:.3f}", f"{report.latency['after_ms']:.3f}")
    elif report.target:
        large = report.input.bytes > LARGE
        table.add_row("latency", "", "not timed: " + ("a large model; see penjing bench" if large else "no feed runs"))
    return table


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"
