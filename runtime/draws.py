"""Random inputs for a model that no data were given for: drawn until one runs, the same for the same seed."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.address import printable
from ..ir.errors import PenjingError
from ..ir.intake import MOST_DIMS
from ..passes.base import Array, Outputs
from .feeds import Feeds, read_feeds
from .inputs import Feed, Input
from .session import (
    LARGE,
    OPENING_SECONDS,
    TRIAL_BYTES,
    DoesNotRun,
    bounded_run,
    open_session,
    run_feed,
    tensor_bytes,
    trial,
)
from .sizes import machine_bytes

SIZES = (64, 32, 16, 96, 224, 320, 16000, 1)  # tried for open dimensions; 1 last, since it shows the least of a model
RATES = (1, 8000, 16000)  # tried for integer scalars and vectors: a count, or a sampling rate in Hz
_DAY = 86_400.0  # seconds: a run on the user's own data may take its time
RANDOM_BYTES = TRIAL_BYTES // 4  # a random feed may take: what is computed from it must fit as well


class NoFeeds(PenjingError):
    """No random feed runs in the model; the message is the reason."""


def random_feeds(
    model: ir.Model,
    seed: int,
    run: Callable[[Feed], Outputs] | None = None,
    *,
    count: int = 3,
    seconds: float = 10.0,
) -> Feeds:
    """Up to ``count`` random feeds of one shape, the first shape found that ``model`` runs with.

    Symbolic dimensions of one name get one size: a first dimension 2, else 1, the others of ``SIZES`` all the same,
    else mixed. Floats are drawn from N(0, 1), integers of rank ≥ 2 from {0, 1}; integer scalars and vectors are 1, else
    a rate; booleans true, strings empty. ``run`` tells whether a feed runs by raising ``DoesNotRun``; the default runs
    the model within ``seconds`` and 1 GiB. Raises ``NoFeeds``.
    """
    inputs = [given for value in model.graph.inputs if (given := Input.of(value)).required]
    if odd := [given for given in inputs if given.dtype is None]:
        raise NoFeeds(f"the input {odd[0]} is of a type that no random feed is drawn for")
    if deep := [given for given in inputs if len(given.axes()) > MOST_DIMS]:
        raise NoFeeds(f"the input {deep[0]} has more than {MOST_DIMS} dimensions")
    deadline = time.monotonic() + seconds
    if run is None:
        place, kept = _search_apart(model, inputs, seed, count, deadline, seconds)
    else:
        place, kept = _search(run, inputs, seed, count, deadline, seconds)
    sizes, rate = next(itertools.islice(_candidates(inputs), place, None))
    return _drawn(inputs, sizes, rate, seed, kept)


def feeds_for(model: ir.Model, data: Any = None, seed: int = 0) -> Feeds:
    """What ``read_feeds`` makes of ``data``, or random feeds where there are none. Raises ``BadFeeds``, ``NoFeeds``."""
    if data is not None:
        return tried(model, read_feeds(data, model))
    try:
        return random_feeds(model, seed)
    except NoFeeds as error:
        raise NoFeeds(f"This needs sample inputs, give them with --data: {error}") from error


def tried(model: ir.Model, feeds: Feeds) -> Feeds:
    """The same feeds, the first of which ``model`` survived: ONNX Runtime crashes on some valid models.

    Raises ``DoesNotRun`` where it did not; what fails in another way, fails again and says why. Large models, which
    nobody makes small by hand, are not tried: they take long.
    """
    feed = next(iter(feeds), None)

    def run() -> str:
        with contextlib.suppress(DoesNotRun):
            run_feed(open_session(model), feed or {})
        return ""

    if feed is not None and tensor_bytes(model) <= LARGE:
        trial(run, model, seconds=_DAY, room=machine_bytes())
    return feeds


def _search(
    run: Callable[[Feed], Outputs], inputs: Sequence[Input], seed: int, count: int, deadline: float, seconds: float
) -> tuple[int, list[int]]:
    """The place of the first candidate that runs, and the numbers of its draws that do. Raises ``NoFeeds``."""
    first, tried = "", 0
    for place, (sizes, rate) in enumerate(_candidates(inputs)):
        if time.monotonic() > deadline:
            raise NoFeeds(f"no random feed ran within {seconds:g} s; of {tried} tried, the first failed: {first}")
        draws = (_draw(inputs, sizes, rate, seed, number) for number in range(count))
        reason = _too_big(inputs, sizes) or _why_not(run, next(draws))
        if reason is None:
            return place, [0, *(number for number, feed in enumerate(draws, 1) if _why_not(run, feed) is None)]
        first, tried = first or reason, tried + 1
    raise NoFeeds(f"no random feed ran; of {tried} tried, the first failed: {first}")


def _search_apart(
    model: ir.Model, inputs: Sequence[Input], seed: int, count: int, deadline: float, seconds: float
) -> tuple[int, list[int]]:
    """``_search`` with bounded runs of ``model``, where no crash of theirs can harm. Raises ``NoFeeds``."""

    def search() -> str:
        try:
            run = bounded_run(model, seconds=seconds)
        except DoesNotRun as error:
            return json.dumps(f"the model does not run: {error}")
        try:
            return json.dumps(_search(run, inputs, seed, count, deadline, seconds))
        except NoFeeds as error:
            return json.dumps(str(error))

    try:
        found = json.loads(trial(search, model, seconds=OPENING_SECONDS + seconds))
    except DoesNotRun as error:
        raise NoFeeds(str(error)) from error
    if isinstance(found, str):
        raise NoFeeds(found)
    return found[0], found[1]


def _candidates(inputs: Sequence[Input]) -> Iterator[tuple[dict[str, int], int]]:
    """Sizes of the open dimensions, and the value of integer scalars, in the order in which they are tried."""
    axes = [one.axes() for one in inputs]
    batch = dict.fromkeys(first[0] for first in axes if first and isinstance(first[0], str))
    others = list(dict.fromkeys(key for one in axes for key in one if isinstance(key, str) and key not in batch))
    rates = RATES if any(_is_rate(one) for one in inputs) else RATES[:1]
    for pick in (_alike, _mixed):
        for rate, lead in itertools.product(rates, (2, 1) if batch else (1,)):
            for sizes in pick(others):
                yield dict.fromkeys(batch, lead) | sizes, rate


def _alike(names: Sequence[str]) -> Iterator[dict[str, int]]:
    return (dict.fromkeys(names, size) for size in (SIZES if names else SIZES[:1]))


def _mixed(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Unlike sizes, those whose largest is small first, since drawing large ones takes long."""
    for count, largest in enumerate(SIZES[1:], 2):
        for sizes in itertools.product(SIZES[:count], repeat=len(names)):
            if largest in sizes and len(set(sizes)) > 1:
                yield dict(zip(names, sizes, strict=True))


def _is_rate(one: Input) -> bool:
    return one.dtype is not None and one.dtype.is_integer() and one.dims is not None and len(one.dims) < 2


def _resolve(one: Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[key] if isinstance(key, str) else key for key in one.axes())


def _too_big(inputs: Sequence[Input], sizes: Mapping[str, int]) -> str | None:
    total = sum(math.prod(_resolve(one, sizes)) * _item_bytes(one.dtype) for one in inputs)
    return f"its inputs take {total / 2**20:,.0f} MiB" if total > RANDOM_BYTES else None


def _item_bytes(dtype: ir.DataType | None) -> float:
    return 8 if dtype is None or dtype is ir.DataType.STRING else dtype.itemsize


def _draw(inputs: Sequence[Input], sizes: Mapping[str, int], rate: int, seed: int, number: int) -> Feed:
    rng = np.random.default_rng([seed, number])
    drawn = {one.name: _draw_one(one, _resolve(one, sizes), rate, rng) for one in inputs}
    return {one.name: [drawn[one.name]] if one.sequence else drawn[one.name] for one in inputs}


def _draw_one(one: Input, shape: tuple[int, ...], rate: int, rng: np.random.Generator) -> Array:
    assert one.dtype is not None
    dtype = one.dtype.numpy()
    if one.dtype is ir.DataType.STRING:
        return np.full(shape, "", object)
    if one.dtype is ir.DataType.BOOL:
        return np.ones(shape, dtype)
    if one.dtype.is_integer():
        return rng.integers(0, 2, shape).astype(dtype) if len(shape) >= 2 else np.full(shape, rate).astype(dtype)
    if dtype.kind == "c":
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape, np.float64 if dtype == np.float64 else np.float32)).astype(dtype)


def _why_not(run: Callable[[Feed], Outputs], feed: Feed) -> str | None:
    try:
        outputs = run(feed)
    except DoesNotRun as error:
        return str(error)
    return "all outputs are NaN" if _all_nan(outputs) else None


def _all_nan(outputs: Outputs) -> bool:
    arrays = [value for value in outputs.values() if isinstance(value, np.ndarray) and value.size]
    floats = [array.astype(np.float32) for array in arrays if array.dtype.kind in "fV"]
    return bool(floats) and len(floats) == len(arrays) and all(np.isnan(array).all() for array in floats)


def _drawn(inputs: Sequence[Input], sizes: Mapping[str, int], rate: int, seed: int, kept: Sequence[int]) -> Feeds:
    words = [f"{printable(key)}={size}" for key, size in sizes.items()]
    words += [f"{printable(one.name)}={rate}" for one in inputs if _is_rate(one)]
    source = f" ({', '.join(words)})" if words else ""

    def walk() -> Iterator[Feed]:
        return (_draw(inputs, sizes, rate, seed, number) for number in kept)

    return Feeds(source, walk, len(kept), random=True)
