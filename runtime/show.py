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
    from .blame import Blame
    from .compare import Comparison, OutputDifference
    from .kernels import Floating
    from .measure import Timing

MOST_OPERATORS = 3  # shown for one value of a blame; --json has all
MOST_LINES = 6  # kinds of change, and reasons of skips, shown for one pass; --json has all
_NUMERIC = {"seconds", "zeros", "distinct", "bytes", "packed", "entropy", "ratio", "cosine"}
_NUMERIC |= {"SQNR dB", "injected dB", "accumulated dB"}


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


def show_blame(found: Blame, top: int, console: Console) -> None:
    """One line for each of the ``top`` worst values, for each output, and for what stayed float."""
    worst, others = found.entries[:top], found.entries[top:]
    error = "max|Δ|/max|y|"
    table = _table("value", "computed by", "as", "injected dB", error, "accumulated dB", error, "cosine")
    for entry in (*worst, *(entry for entry in others if entry.output)):
        node = "" if entry.node in entry.value else printable(entry.node)
        made = " ".join(filter(None, ("+".join(_cut(entry.operators)), node))) or "a model input"
        errors = (*_errors(entry.injected), *_errors(entry.accumulated), _number(entry.accumulated.cosine, ".6f"))
        table.add_row(plain(printable(entry.value)), plain(made), entry.type, *errors)
    console.print(table)
    rest = f"; the outputs, and the {len(worst)} worst" if others else ""
    console.print(f"{len(found.entries):,} of {found.values:,} values matched{rest}; on {plain(found.feeds)}")
    moved = f"moved the outputs by {found.disturbance:.1e} of max|y|" if found.disturbance else "moved no output"
    console.print(f"judged at full optimization, quantized values as integers; looking at them {moved}")
    if found.kernels is not None:
        left = ", ".join(f"{count} {name}" for name, count in found.kernels.quantizers.items())
        console.print(found.kernels.summary() + (f"; {left} left" if left else ""))
        _show_floating([*found.kernels.floating, *found.kernels.others], top, console)
    for note in found.notes:
        console.print(f"[yellow]note:[/] {plain(note)}")


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
    table = _table("weight", "type", "place", "used by", "zeros", "distinct", "bytes", "packed", "storage", "entropy")
    for weight in summary.weights:
        table.add_row(
            plain(printable(weight.address)),
            plain(weight.type),
            plain(weight.place),
            plain(weight.used_by),
            f"{weight.sparsity:.1%}",
            weight.distinct_text,
            f"{weight.bytes:,}",
            f"{weight.storage_bytes:,}",
            plain(weight.storage),
            f"{weight.entropy_bytes:,}",
        )
    console.print(table)


def plain(text: str) -> str:
    """Text for rich without what a terminal or rich would act on; backslashes stay, for escaped names have theirs."""
    return unmarked("".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text))


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        numeric = column in _NUMERIC
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table


def _show_floating(floating: list[Floating], top: int, console: Console) -> None:
    """What stayed float, layers first, and why."""
    if not floating:
        return
    table = _table("stayed float", "operator", "why")
    for one in floating[:top]:
        table.add_row(plain(printable(one.address)), plain(one.operator), plain(one.reason))
    console.print(table)
    if len(floating) > top:
        console.print(f"... and {len(floating) - top} more (--json lists them)")


def _errors(found: OutputDifference | None) -> tuple[str, str]:
    return ("-", "-") if found is None else (_number(found.sqnr_db, ".1f"), _number(found.max_error))


def _cut(operators: list[str]) -> list[str]:
    return operators if len(operators) <= MOST_OPERATORS else ["...", *operators[-MOST_OPERATORS:]]


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
    if before.packed or (after and after.packed):
        forms["packed weights"] = "{0.packed:,}"
    for name, form in forms.items():
        grown = " [yellow](larger)[/]" if name == "bytes" and after and after.bytes > before.bytes else ""
        table.add_row(name, form.format(before), (form.format(after) if after else "-") + grown)
    check = report.check
    if check.comparison is not None:
        about = plain(check.feeds or "") + (" [yellow](random)[/]" if check.random else "")
        if check.beside:
            table.add_row("compared with", "", f"what {plain(check.beside)} has to compute")
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
    if report.kernels is not None:
        told = report.kernels if isinstance(report.kernels, str) else report.kernels.summary()
        table.add_row("integer kernels", "", plain(told))
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
