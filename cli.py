"""The command line. Every command is a thin word over the library; heavy imports wait until a command needs them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .ir.errors import BadFile, PenjingError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

DATA_HELP = (
    "Sample inputs: x.npz (first axis: samples), a folder of .npz, ONNX test_data_set_* folders, FILE.py:FUNCTION."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0 done, 1 a check or bound failed, 2 bad input or usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(cli.main(arguments, prog_name="penjing", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        click.echo("penjing: interrupted; nothing was left half-written.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except PenjingError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"penjing: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            raise
        click.echo(
            f"penjing: an error of penjing itself: {type(error).__name__}: {error}. Run again with --debug for the "
            "traceback, and report it.",
            err=True,
        )
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="penjing")
def cli() -> None:
    """Make trained ONNX models fit to deploy: passes that are checked, explained and fast."""


debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.", expose_value=False)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


@cli.command()
@click.argument("model", type=click.Path())
@click.option("-p", "--passes", required=True, help="The pipeline: 'clean,prune-magnitude{sparsity=0.5}'.")
@click.option("-o", "--output", required=True, type=click.Path(), help="Where the result goes.")
@click.option("--data", help=DATA_HELP)
@click.option("--check-data", help="Sample inputs for the check alone; --data otherwise.")
@click.option("--labels", type=click.Path(), help="int64 [samples] as .npy.")
@click.option("--with", "partners", multiple=True, metavar="NAME=MODEL", help="A partner model, for passes that merge.")
@click.option(
    "--metric", metavar="FILE.py:FUNCTION", help="Takes an InferenceSession, returns a float; higher is better."
)
@click.option("--max-drop", type=float, help="The most that the metric may fall, absolute.")
@click.option("--max-error", type=float, help="Bound on max|Δ|/max|y| of each float output.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Bound on the signal-to-noise ratio of each float output.")
@click.option(
    "--check", type=click.Choice(["off", "end", "each"]), default="end", show_default=True, help="When to check."
)
@click.option("--strict", is_flag=True, help="Warnings are errors.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the report here as JSON.")
@click.option("--print", "printing", type=click.Choice(["changed", "all"]), help="Print the model's text after passes.")
@click.option("--force", is_flag=True, help="Overwrite OUT and the report.")
@debug
def run(model: str, passes: str, output: str, json_file: str | None, **options: Any) -> None:
    """Run passes over MODEL, prove the result with ONNX Runtime, and write it."""
    from .ir.files import disk_bytes
    from .passes.instruments import Printing
    from .passes.pipeline import Pipeline
    from .runtime.run import BoundExceeded
    from .runtime.run import run as run_passes
    from .runtime.session import LARGE
    from .runtime.show import show_report

    force, printing, partners = (options.pop(name) for name in ("force", "printing", "partners"))
    pipeline = Pipeline.parse(passes)
    require_writable(output, force)
    if json_file:
        require_writable(json_file, force)
    out = _console()
    cause = None
    with _bar().shown() as bar:
        loaded = _load(model)
        size = disk_bytes(loaded, model)
        try:
            report = run_passes(
                loaded,
                pipeline,
                **options,
                models=_partners(partners),
                reproducer=f"{output}.reproducer",
                instruments=[Printing(click.echo, printing == "all")] if printing else [],
                progress=bar,
            )
            if size <= LARGE:
                bar.say("timing")
                report.latency = _latency(model, loaded, options["data"])
            bar.say("writing")
            _save(loaded, output)
            report.target = output
        except BoundExceeded as error:
            report, cause = error.report, error
    report.input = dataclasses.replace(report.input, bytes=size)
    if json_file:
        report.write(json_file)
    if not report.failure and Path(f"{output}.reproducer", "run.json").exists():
        shutil.rmtree(f"{output}.reproducer")  # of an earlier run with this output
    show_report(report, out)
    if report.failure:
        message = f"{report.failure}\n{output} was not written.{_pointer(report.reproducer)}"
        raise PenjingFailed(message) from cause


class PenjingFailed(PenjingError):
    """A check, bound or metric failed, or a warning under --strict."""

    exit_code = 1


@cli.command("passes")
@click.argument("name", required=False)
@as_json
@debug
def passes_(name: str | None, as_json: bool) -> None:
    """List every pass, or tell all about the pass NAME."""
    from .passes.manual import listing, page, pages
    from .passes.registry import broken_plugins
    from .runtime.show import show_pages

    if as_json:
        click.echo(json.dumps(pages(name), indent=2))
    elif name:
        click.echo(page(name))
    else:
        show_pages(listing(), _console())
        for sentence in broken_plugins():
            click.echo(f"warning: {sentence}", err=True)


@cli.command()
@click.argument("model", type=click.Path())
@as_json
@debug
def inspect(model: str, as_json: bool) -> None:
    """Tell what is in MODEL: operators, weights, sparsity, distinct values, bytes against entropy, dimensions."""
    from .ir.files import disk_bytes
    from .ir.summary import summarize
    from .runtime.show import show_summary

    loaded = _load(model)
    summary = summarize(loaded, disk_bytes(loaded, model))
    if as_json:
        click.echo(json.dumps(summary.as_json(), indent=2))
    else:
        show_summary(summary, _console())


@cli.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--data", help=DATA_HELP)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For random feeds.")
@as_json
@debug
def compare(a: str, b: str, data: str | None, seed: int, as_json: bool) -> None:
    """Compare the outputs of B with those of A: max|Δ|/max|y|, SQNR in dB, cosine, top-1 agreement."""
    from .runtime.compare import compare_files
    from .runtime.show import show_comparison

    comparison, about = compare_files(a, b, data, seed)
    if as_json:
        click.echo(json.dumps(comparison.as_json() | {"feeds": about}, indent=2))
    else:
        show_comparison(comparison, about, _console())


@cli.command()
@click.argument("models", nargs=-1, required=True, type=click.Path())
@click.option("--data", help=DATA_HELP)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@as_json
@debug
def bench(models: tuple[str, ...], data: str | None, threads: int, as_json: bool) -> None:
    """Time models interleaved in one run: latency, spread, ratio to the first, load time, bytes, peak memory."""
    from .runtime.measure import bench_files
    from .runtime.show import show_timings

    with _bar().shown() as bar:
        bar.say("timing")
        timings, about = bench_files(models, data, threads)
    if as_json:
        click.echo(json.dumps({"feeds": about, "models": [timing.as_json() for timing in timings]}, indent=2))
    else:
        show_timings(timings, about, _console())


@cli.command()
@click.option("-o", "--output", type=click.Path(), help="Keep the resulting model here.")
@debug
def demo(output: str | None) -> None:
    """The main job on a bundled model, told step by step."""
    from .runtime.demo import tell

    if output:
        require_writable(output, force=True)
    tell(_console(), output)


def require_writable(output: str, force: bool) -> None:
    """Raise ``BadFile`` where OUT exists (without ``force``), is a folder, or its folder is missing or read-only."""
    path = Path(output)
    folder = path.parent
    if path.is_dir():
        raise BadFile(f"{output} is a folder; name a file for the output.")
    if path.exists() and not force:
        raise BadFile(f"{output} exists already; name another output, or add --force to replace it.")
    if not folder.is_dir():
        raise BadFile(f"The folder {folder} of the output does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise BadFile(f"The folder {folder} of the output is not writable; choose another.")


def _partners(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--with {pair} must be NAME=MODEL.")
    return dict(pair.split("=", 1) for pair in pairs)


def _load(path: str) -> Any:
    from .ir.files import load

    return load(path)


def _save(model: Any, path: str) -> None:
    from .ir.files import save

    save(model, path)


def _latency(before: str, after: Any, data: str | None) -> dict[str, float] | None:
    """Milliseconds a run before and after, interleaved; nothing where either does not run on the feeds."""
    from .runtime.measure import latency

    try:
        return latency(before, after, data)
    except PenjingError:
        return None


def _pointer(reproducer: str | None) -> str:
    return f" `python {reproducer}/reproduce.py` shows it again." if reproducer else ""


def _console() -> Console:
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(highlight=False, width=wide)


def _bar() -> Any:
    from rich.console import Console

    from .runtime.progress import Bar

    return Bar(Console(stderr=True))


if __name__ == "__main__":
    main()
