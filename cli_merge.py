"""The commands that merge models. Each writes the text of a pass, and is then `penjing run` with that pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from .ir.errors import UsageError

_Command = Callable[..., None]


def _options(function: _Command) -> _Command:
    """What all of them take as `penjing run` does."""
    data = "Sample inputs, for the check: x.npz, a folder of .npz, ONNX test_data_set_* folders, FILE.py:FUNCTION."
    for option in reversed(
        (
            click.option("-o", "--output", required=True, type=click.Path(), help="Where the result goes."),
            click.option("--data", help=data),
            click.option("--check", type=click.Choice(["off", "end", "each"]), default="end", show_default=True),
            click.option("--strict", is_flag=True, help="Warnings are errors."),
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
            click.option("--json", "json_file", type=click.Path(), help="Write the report here as JSON."),
            click.option("--print", "printing", type=click.Choice(["changed", "all"]), help="Print the model's text."),
            click.option("--force", is_flag=True, help="Overwrite OUT and the report."),
            click.option("--debug", is_flag=True, help="Show the traceback of an error.", expose_value=False),
            click.pass_context,
        )
    ):
        function = option(function)
    return function


def _sharing(function: _Command) -> _Command:
    share = click.option(
        "--share-inputs", "inputs", flag_value="share", help="Every input is one of the first model's."
    )
    separate = click.option("--separate-inputs", "inputs", flag_value="separate", help="Each model has its own inputs.")
    return share(separate(function))


@click.command()
@click.argument("models", nargs=-1, type=click.Path())
@click.option(
    "--map", "mapped", multiple=True, metavar="OUTPUT=INPUT", help="What feeds what; b/OUTPUT=c/INPUT of many."
)
@click.option("--keep-outputs", is_flag=True, help="Keep the outputs of all models.")
@click.option(
    "--adapt",
    multiple=True,
    type=click.Choice(["cast", "reshape", "transpose", "linear"]),
    help="Allow an adapter where a joint does not fit.",
)
@click.option("--fit", help="Sample inputs that the linear adapter is fitted on.")
@_sharing
@_options
def chain(
    context: click.Context,
    /,
    models: Sequence[str],
    mapped: Sequence[str],
    keep_outputs: bool,
    adapt: Sequence[str],
    fit: str | None,
    inputs: str | None,
    data: str | None,
    **options: Any,
) -> None:
    """Put MODELS in a row: outputs of each feed inputs of the next."""
    from .passes.merge.sequence import MergeSequence

    if fit is not None and "linear" not in adapt:
        raise UsageError("--fit is for --adapt linear; add that, or give --data for the check.")
    names = _names(models, "chain")
    pass_ = MergeSequence(
        with_=tuple(names), map=tuple(mapped), keep_outputs=keep_outputs, **_given(inputs=inputs, adapt=tuple(adapt))
    )
    check_data = {} if fit is None or data is None else {"check_data": data}
    _run(context, pass_, models, names, data=data if fit is None else fit, **check_data, **options)


@click.command()
@click.argument("model", type=click.Path())
@click.option("--inputs", multiple=True, metavar="VALUE,...", help="Where the part begins: names of values.")
@click.option("--outputs", multiple=True, metavar="VALUE,...", help="Where it ends.")
@_options
def extract(
    context: click.Context, /, model: str, inputs: Sequence[str], outputs: Sequence[str], **options: Any
) -> None:
    """Cut a part out of MODEL: a backbone, a head."""
    from .passes.merge.extract import Extract

    _run(context, Extract(inputs=_listed(inputs), outputs=_listed(outputs)), [model], [], **options)


@click.command()
@click.argument("models", nargs=-1, type=click.Path())
@click.option(
    "--prefix", multiple=True, metavar="NAME,...", help="A name for each model, put before names that collide."
)
@click.option("--concat", "axis", type=int, metavar="AXIS", help="Concatenate the outputs along this axis.")
@click.option("--tie", multiple=True, metavar="PATTERN", help="Let these weights be one for all models: their mean.")
@_sharing
@_options
def parallel(
    context: click.Context,
    /,
    models: Sequence[str],
    prefix: Sequence[str],
    axis: int | None,
    tie: Sequence[str],
    inputs: str | None,
    **options: Any,
) -> None:
    """Put MODELS side by side in one."""
    from .passes.merge.parallel import MergeParallel
    from .passes.selection import Selection

    names = _names(models, "parallel")
    given = _given(inputs=inputs, axis=axis, outputs=None if axis is None else "concat")
    pass_ = MergeParallel(with_=tuple(names), prefix=_listed(prefix), share=Selection(tuple(tie)), **given)
    _run(context, pass_, models, names, **options)


MERGES = (chain, extract, parallel)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _listed(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for text in texts for part in text.split(",") if part)


def _names(models: Sequence[str], command: str) -> list[str]:
    """A name for each model after the first: that of its file, numbered where another has it."""
    if len(models) < 2:
        found = "none was" if not models else "one was"
        raise UsageError(f"penjing {command} merges two models or more; {found} given.")
    names: list[str] = []
    for path in models[1:]:
        stem = re.sub(r"[^\w.-]", "_", Path(path).stem) or "b"
        number, name = 1, stem
        while name in ("model", *names):
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _run(context: click.Context, pass_: Any, models: Sequence[str], names: Sequence[str], **options: Any) -> None:
    """`penjing run` with this one pass."""
    from .cli import run

    partners = [f"{name}={path}" for name, path in zip(names, models[1:], strict=True)]
    context.invoke(run, model=models[0], passes=str(pass_), partners=partners, **options)
    if len(models) > 1 and options["check"] != "off":
        _tell_memory(models, options["output"])


def _tell_memory(models: Sequence[str], output: str) -> None:
    """Print what it takes to load the result, and its parts each in a session of its own; not of large models."""
    from .ir.files import disk_bytes, load
    from .runtime.measure import load_bytes
    from .runtime.session import LARGE

    paths = list(dict.fromkeys((*models, output)))
    if sum(disk_bytes(load(path), path) for path in paths) > LARGE:
        return
    found = {path: load_bytes(path) for path in paths}
    sizes = [found[path] for path in (output, *models)]
    if None not in sizes:
        merged, *parts = (size / 2**20 for size in sizes if size is not None)
        click.echo(f"memory to load {merged:.1f} MiB, {len(parts)} separate sessions {sum(parts):.1f} MiB")
