"""The commands that merge models. Each writes the text of a pass, and is then `penjing run` with that pass."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from .ir.address import printable
from .ir.errors import UsageError

_Command = Callable[..., None]
_LABELS_HELP = "Their labels as .npy: numbers of classes, or their names; else the array 'labels' in the .npz."


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


def _mapping(function: _Command) -> _Command:
    mapped = click.option(
        "--map", "mapped", multiple=True, metavar="INPUT=MODEL/INPUT", help="Which input of the first feeds which."
    )
    adapt = click.option(
        "--adapt",
        multiple=True,
        type=click.Choice(["cast", "reshape", "transpose"]),
        help="Allow an adapter where an input does not fit.",
    )
    return mapped(adapt(function))


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


@click.command()
@click.argument("models", nargs=-1, type=click.Path())
@click.option(
    "--method",
    type=click.Choice(["uniform", "weighted", "greedy", "slerp", "task-arithmetic", "ties", "dare"]),
    default="uniform",
    show_default=True,
)
@click.option("--base", type=click.Path(), help="The model that all were trained from; for the last three methods.")
@click.option(
    "--weights", metavar="W,...", help="A number for each model: parts of one; or factors of what it changed."
)
@click.option("--scale", type=float, help="What the changes in the base are multiplied by.")
@click.option("--density", type=float, help="The share of the changes that is kept, for ties and dare.")
@click.option("--metric", metavar="FILE.py:FUNCTION", help="Takes an InferenceSession; greedy adds by it.")
@click.option("--max-drop", type=float, help="The most that the metric of the first model may fall, absolute.")
@_options
def soup(
    context: click.Context,
    /,
    models: Sequence[str],
    method: str,
    base: str | None,
    weights: str | None,
    scale: float | None,
    density: float | None,
    **options: Any,
) -> None:
    """Make one model whose weights are made of those of MODELS, all of one architecture.

    With --data, means and variances of BatchNormalization are estimated on them anew.
    """
    from .passes.merge.soup import Soup

    names = _names(models, "soup")
    partners, paths, name = list(names), list(models), None
    if base is not None:
        name = next(new for number in range(len(names) + 1) if (new := "base" + "-again" * number) not in names)
        partners, paths = [*names, name], [*models, base]
    factors = None if weights is None else _numbers(weights, "--weights")
    given = _given(method=method, base=name, weights=factors, scale=scale, density=density)
    _run(context, Soup(with_=tuple(names), **given), paths, partners, **options)


@click.command()
@click.argument("models", nargs=-1, type=click.Path())
@click.option(
    "--combine",
    type=click.Choice(
        ["mean", "weighted", "sum", "median", "geometric", "min", "max", "soft-vote", "hard-vote", "stack"]
    ),
    default="mean",
    show_default=True,
    help="How the outputs become one.",
)
@click.option("--weights", metavar="W,...", help="One for each model, of sum one.")
@click.option("--normalize", is_flag=True, help="Divide by the sum of the weights.")
@click.option("--fit", help="Sample inputs that weights or the stack are fitted on.")
@click.option("--labels", type=click.Path(), help=_LABELS_HELP)
@click.option("--outputs", multiple=True, metavar="NAME,...", help="What is combined; all outputs otherwise.")
@_mapping
@click.option("--classes", multiple=True, metavar="MODEL=2 0 1", help="The order of a model's classes.")
@click.option("--scores", multiple=True, metavar="KIND", help="logits or probabilities; MODEL=KIND of one model.")
@click.option("--solver", type=click.Choice(["least-squares", "logistic"]), help="What fits the stack.")
@_options
def ensemble(
    context: click.Context,
    /,
    models: Sequence[str],
    combine: str,
    weights: str | None,
    normalize: bool,
    fit: str | None,
    labels: str | None,
    outputs: Sequence[str],
    mapped: Sequence[str],
    adapt: Sequence[str],
    data: str | None,
    **options: Any,
) -> None:
    """Let MODELS answer as one: their outputs become one."""
    from .passes.merge.ensemble import Ensemble

    fitted = combine == "stack" or (combine == "weighted" and weights is None)
    if fit is not None and not fitted:
        raise UsageError(
            f"--fit is for --combine weighted without --weights, and for stack; --combine {combine} has nothing to fit."
        )
    if fitted and fit is None:
        remedy = " or the weights with --weights" if combine == "weighted" else ""
        raise UsageError(f"--combine {combine} is fitted to data; give them with --fit FEEDS --labels L{remedy}.")
    names = _names(models, "ensemble")
    given = _given(solver=options.pop("solver"))
    pass_ = Ensemble(
        with_=tuple(names),
        combine=combine,  # type: ignore[arg-type]
        weights=() if weights is None else _numbers(weights, "--weights"),
        normalize=normalize,
        outputs=_listed(outputs),
        map=tuple(mapped),
        adapt=tuple(adapt),  # type: ignore[arg-type]
        classes=tuple(options.pop("classes")),
        scores=tuple(options.pop("scores")),
        **given,
    )
    check_data = {} if fit is None or data is None else {"check_data": data}
    _run(context, pass_, models, names, data=data if fit is None else fit, labels=labels, **check_data, **options)


@click.command()
@click.argument("models", nargs=-1, type=click.Path())
@click.option(
    "--confidence",
    type=click.Choice(["max-prob", "margin", "entropy"]),
    default="max-prob",
    show_default=True,
    help="What tells how sure the first model is.",
)
@click.option("--route", type=click.Choice(["sample", "batch"]), help="What goes on: unsure rows, or the whole batch.")
@click.option("--threshold", type=float, help="What is less sure goes on.")
@click.option("--fit", help="Sample inputs that the threshold is fitted on.")
@click.option("--labels", type=click.Path(), help=_LABELS_HELP)
@click.option("--max-drop", type=float, help="The accuracy that may be lost to the second model's, for --fit.")
@click.option("--scores", metavar="NAME", help="The output whose confidence counts; the first of floats otherwise.")
@_mapping
@_options
def cascade(
    context: click.Context,
    /,
    models: Sequence[str],
    threshold: float | None,
    fit: str | None,
    labels: str | None,
    max_drop: float | None,
    mapped: Sequence[str],
    adapt: Sequence[str],
    data: str | None,
    **options: Any,
) -> None:
    """Let the first of two MODELS answer, and the second where the first is not sure."""
    from .passes.merge.cascade import Cascade

    names = _names(models, "cascade")
    if len(models) > 2:
        raise UsageError(f"penjing cascade takes two models, a small one and a big one; {len(models)} were given.")
    if threshold is not None and fit is not None:
        raise UsageError("A threshold is given or fitted; give --threshold or --fit, not both.")
    if threshold is None and fit is None:
        raise UsageError("Give --threshold T, or what to fit it on: --fit FEEDS --labels L --max-drop X.")
    own = _given(adapt=tuple(adapt), **{name: options.pop(name) for name in ("confidence", "route", "scores")})
    pass_ = Cascade(with_=tuple(names), threshold=threshold, max_drop=max_drop, map=tuple(mapped), **own)
    check_data = {} if fit is None or data is None else {"check_data": data}
    _run(context, pass_, models, names, data=data if fit is None else fit, labels=labels, **check_data, **options)


MERGES = (cascade, chain, ensemble, extract, parallel, soup)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _listed(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for text in texts for part in text.split(",") if part)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    """Finite numbers with commas between them; raises ``UsageError`` that names the option."""
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            raise UsageError(f"{option}: {printable(part)!r} is no number; write 0.5,0.3,0.2.") from None
        if not math.isfinite(found[-1]):
            raise UsageError(f"{option}: {printable(part)} is no finite number.")
    return tuple(found)


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
