"""The command line. Every command is a thin word over the library; heavy imports wait until a command needs them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_merge import MERGES
from .ir.errors import BadFile, PenjingError, UsageError
from .recipe import Code, Partner, Text, allow_code, read_recipe
from .runtime.functions import is_file, split
from .runtime.interrupt import Interrupts

if TYPE_CHECKING:
    from rich.console import Console

DATA_HELP = (
    "Sample inputs: x.npz (first axis: samples), a folder of .npz, ONNX test_data_set_* folders, FILE.py:FUNCTION."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit: 0 done, 1 a check or bound failed, 2 bad input or usage.

    ``KeyboardInterrupt`` passes through; ``__main__`` makes it exit code 130.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(cli.main(arguments, prog_name="penjing", standalone_mode=False) or 0)
    except click.exceptions.Abort as error:  # what click makes of an interrupt
        raise KeyboardInterrupt from error
    except Exception as error:
        if Interrupts.caught is not None:  # native code made something else of it
            raise KeyboardInterrupt from error
        sys.exit(_explain(error, "--debug" in arguments))


def _explain(error: Exception, debug: bool) -> int:
    """Say what went wrong, with the traceback for ``debug``; the exit code."""
    if isinstance(error, click.ClickException):
        error.show()
        return 2
    if isinstance(error, PenjingError):
        code, sentence = error.exit_code, str(error)
    elif isinstance(error, OSError):
        code, sentence = 2, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}."
    else:
        sentence = f"an error of penjing itself: {type(error).__name__}: {error}."
        code, sentence = 1, f"{sentence} Run again with --debug for the traceback, and report it."
    if debug:
        traceback.print_exception(error)
    else:
        _tell(sentence)
    return code


def _tell(sentence: str) -> None:
    """Say it on standard error, with what a terminal would act on in backslash form."""
    if len(sentence) > _LONGEST:  # a file may hold names of any length
        sentence = f"{sentence[: _LONGEST // 2]} ... {sentence[-_LONGEST // 2 :]}"
    shown = (c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in sentence)
    click.echo(f"penjing: {''.join(shown)}", err=True)


_LONGEST = 4000  # characters of a sentence that are shown


class _Commands(click.Group):
    """The commands; one whose output nobody reads any more ends as the system's own do."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails once more when it ends
            _tell("nothing reads the output any more.")
            sys.exit(128 + signal.SIGPIPE)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="penjing")
def cli() -> None:
    """Make trained ONNX models fit to deploy: passes that are checked, explained and fast."""


debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.", expose_value=False)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def _with_recipe(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """What the command line does not say, the recipe says."""
    if path is not None and not context.resilient_parsing:
        context.default_map = read_recipe(path, context.command)
    return path


@cli.command()
@click.argument("model", type=click.Path())
@click.option("-p", "--passes", type=Text(), required=True, help="The pipeline: 'clean,prune-magnitude{sparsity=0.5}'.")
@click.option("-o", "--output", required=True, type=click.Path(), help="Where the result goes.")
@click.option("--data", type=Code(or_path=True), help=DATA_HELP)
@click.option("--check-data", type=Code(or_path=True), help="Sample inputs for the check alone; --data otherwise.")
@click.option("--labels", type=click.Path(), help="Integers or text, [samples], as .npy.")
@click.option(
    "--with",
    "partners",
    type=Partner(),
    multiple=True,
    metavar="NAME=MODEL",
    help="A partner model, for passes that merge.",
)
@click.option(
    "--metric",
    type=Code(),
    metavar="FILE.py:FUNCTION",
    help="Takes an InferenceSession, returns a float; higher is better.",
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
@click.option(
    "--recipe",
    type=click.Path(),
    is_eager=True,
    callback=_with_recipe,
    help="A TOML file that says MODEL and options; what is given beside it goes first.",
)
@click.option("--allow-python", is_flag=True, is_eager=True, help="Run the Python that the recipe names.")
@debug
@click.pass_context
def run(
    context: click.Context,
    /,
    model: str,
    passes: str,
    output: str,
    json_file: str | None,
    recipe: str | None,
    allow_python: bool,
    **options: Any,
) -> None:
    """Run passes over MODEL, prove the result with ONNX Runtime, and write it."""
    if recipe:
        allow_code(context, recipe, allow_python)
    from .ir.files import disk_bytes, require_apart
    from .passes.instruments import Printing
    from .passes.pipeline import Pipeline
    from .runtime.run import BoundExceeded
    from .runtime.run import run as run_passes
    from .runtime.session import LARGE
    from .runtime.show import show_report

    force, printing, partners = (options.pop(name) for name in ("force", "printing", "partners"))
    pipeline, partners = Pipeline.parse(passes), _partners(context, partners)
    _require_targets(output, json_file, force, _reads(options, partners) | {"--recipe": recipe, "MODEL": model})
    out = _console()
    cause = None
    with _bar().shown() as bar:
        loaded = _load(model)
        for target in filter(None, (output, json_file)):
            require_apart(loaded, target)
        size = disk_bytes(loaded, model)
        try:
            report = run_passes(
                loaded,
                pipeline,
                **options,
                models=partners,
                reproducer=f"{output}.reproducer",
                instruments=[Printing(click.echo, printing == "all")] if printing else [],
                progress=bar,
            )
            if size <= LARGE and not report.check.not_run:
                bar.say("timing")
                report.latency = _latency(model, loaded, options["data"])
            report.target = output
        except BoundExceeded as error:
            report, cause = error.report, error
        report.input = dataclasses.replace(report.input, bytes=size)
        bar.say("writing")
        _write(loaded, report, output, json_file)
    show_report(report, out)
    if report.failure:
        message = f"{report.failure}\n{output} was not written.{_pointer(report.reproducer)}"
        raise PenjingFailed(message) from cause


def _write(model: Any, report: Any, output: str, json_file: str | None) -> None:
    """Write the result, unless the run failed, and the report; an interrupt leaves both or neither."""
    from .ir.files import save
    from .runtime.reproducer import remove_reproducer

    def finish() -> None:
        if json_file:
            report.write(json_file)
        if not report.failure:
            remove_reproducer(f"{output}.reproducer")  # of an earlier run with this output

    if report.failure:
        finish()
    else:
        save(model, output, then=finish)


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
    """Tell what is in MODEL: operators, weights, sparsity, distinct values, bytes now, packed and at entropy."""
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
@click.argument("model", metavar="FLOAT", type=click.Path())
@click.argument("quantized", type=click.Path())
@click.option("--data", help=DATA_HELP)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For random feeds.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="How many values to show.")
@as_json
@debug
def blame(model: str, quantized: str, data: str | None, seed: int, top: int, as_json: bool) -> None:
    """Tell where QUANTIZED errs: each value of FLOAT with the error injected and accumulated there, worst first.

    Also the layers that stayed float, and why.
    """
    from .runtime.blame import blame_files
    from .runtime.show import show_blame

    with _bar().shown() as bar:
        found = blame_files(model, quantized, data, seed, bar)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        show_blame(found, top, _console())


@cli.command()
@click.argument("model", type=click.Path())
@click.option("--data", required=True, help=DATA_HELP)
@click.option("-o", "--output", required=True, type=click.Path(), help="Where the ranges go, as JSON.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--force", is_flag=True, help="Overwrite the output.")
@debug
def calibrate(model: str, data: str, output: str, threads: int, force: bool) -> None:
    """Write down what the activations of MODEL hold on sample inputs, for quantize-static{ranges=FILE}."""
    from .ir.address import printable
    from .runtime.calibration import calibrate_file

    parts = split(data)
    reads = {"MODEL": model, "--data": parts[0] if parts and is_file(parts[0]) else data}
    _require_apart({"-o": output}, reads)
    require_writable(output, force)
    with _bar().shown() as bar:
        found = calibrate_file(model, data, output, threads=threads, progress=bar)
    for sentence in found.warnings:
        click.echo(f"warning: {printable(sentence)}", err=True)
    count = len(found.found)
    click.echo(f"{count} value{'' if count == 1 else 's'} on {found.about}, written to {output}")


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


for command in MERGES:
    cli.add_command(command)


def require_writable(output: str, force: bool) -> None:
    """Raise ``BadFile`` where OUT exists (without ``force``) or is no plain file, or its folder takes no file."""
    path = Path(output)
    folder = path.parent
    if not output:
        raise UsageError("The name of the output is empty; name a file.")
    if path.is_dir():
        raise BadFile(f"{output} is a folder; name a file for the output.")
    if path.exists() and not path.is_file():
        raise BadFile(f"{output} is a device or a pipe; name a file for the output.")
    if path.exists() and not force:
        raise BadFile(f"{output} exists already; name another output, or add --force to replace it.")
    if path.is_file() and not path.is_symlink() and not path.stat().st_mode & 0o222:
        raise BadFile(f"{output} is write-protected; allow writing to it, or name another output.")
    if not folder.is_dir():
        raise BadFile(f"The folder {folder} of the output does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise BadFile(f"The folder {folder} of the output is not writable; choose another.")


def _require_targets(output: str, json_file: str | None, force: bool, reads: Mapping[str, str | None]) -> None:
    """Raise ``PenjingError`` where writing would fail in the end, or hit what is read; OUT may replace MODEL."""
    _require_apart({"-o": output} | ({"--json": json_file} if json_file else {}), reads, replaces="MODEL")
    require_writable(output, force)
    if json_file and (Path(json_file).is_file() or not os.path.exists(json_file)):
        require_writable(json_file, force)


def _require_apart(writes: Mapping[str, str], reads: Mapping[str, str | None], replaces: str = "") -> None:
    """Raise ``UsageError`` where a file is written and read, or written twice; -o may replace ``replaces``."""
    for name, target in writes.items():
        for other, source in {**reads, **writes}.items():
            if source is None or other == name or (name, other) == ("-o", replaces):
                continue
            if _entry(target) in (_entry(source), os.path.realpath(source)):
                raise UsageError(f"{name} and {other} are the same file, {target}; name another for {name}.")


def _entry(path: str) -> str:
    """The place of a file, links in its folder followed: writing replaces what is there, be it a link."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def _reads(options: Mapping[str, Any], partners: Mapping[str, str]) -> dict[str, str | None]:
    """The files that the options of a run name, each by its option."""
    found = {f"--with {name}": path for name, path in partners.items()} | {"--labels": options["labels"]}
    for name in ("data", "check_data", "metric"):
        parts = split(options[name] or "")
        found[f"--{name.replace('_', '-')}"] = parts[0] if parts and is_file(parts[0]) else options[name]
    return found


def _partners(context: click.Context, pairs: Sequence[str]) -> dict[str, str]:
    """Partner models by name; what the command line says of a name goes before what the recipe says."""
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--with {pair} must be NAME=MODEL.")
    pairs = (*(context.default_map or {}).get("partners", ()), *pairs)
    return dict(pair.split("=", 1) for pair in pairs)


def _load(path: str) -> Any:
    from .ir.files import load

    return load(path)


def _latency(before: str, after: Any, data: str | None) -> dict[str, float] | None:
    """Milliseconds a run before and after, interleaved; nothing where either does not run on the feeds."""
    from .runtime.measure import latency

    try:
        return latency(before, after, data)
    except PenjingError:
        return None


def _pointer(reproducer: str | None) -> str:
    return f" `python {shlex.quote(f'{reproducer}/reproduce.py')}` shows it again." if reproducer else ""


def _console() -> Console:
    from rich.console import Console

    def refuse() -> None:
        raise BrokenPipeError  # rich itself would exit with 1, and say nothing

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = Console(highlight=False, width=wide)
    console.on_broken_pipe = refuse  # type: ignore[method-assign]
    return console


def _bar() -> Any:
    from rich.console import Console

    from .runtime.progress import Bar

    return Bar(Console(stderr=True))
