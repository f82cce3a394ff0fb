"""Merged graphs beside their members: latency, load memory, file size, and peak memory of merging large models.

    python -m tests.benchmarks.merging [latency] [repeated] [large] [--seconds 8] [--gigabytes 2.5]

``latency``: CPU time of a run of the merged graph over the sum of those of its members, each in a session of its own,
all in one process on one thread, by turns; the median of the rounds, at batch 1 and 64. What combines the members'
outputs outside of a graph is not counted. ``repeated``: a model merged with itself: memory to open it, each in a fresh
process, and its file, beside N of its own. ``large``: peak memory of merging two models of the size given, over that
after imports. ``+`` stands beside what meets its bar, ``MISS`` beside what does not.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from penjing.ir.files import load, save
from penjing.models import zoo
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.measure import MemoryMeter, load_bytes
from penjing.runtime.session import OrtRunner, bare_run, open_session, run_feed

from .threshold import WIDTH, make

Feed = Mapping[str, Any]
Call = Callable[[], Any]

BAR = 1.03
ROUND = 0.03  # seconds that one round takes at least for each side
ALL = ("mlp", "cnn-a", "cnn-b", "vit", "cnn-run-1", "cnn-run-2", "cnn-run-3", "teacher")


def merged(text: str, *models: ir.Model) -> ir.Model:
    """The first model after the pass ``text``, in which the others are called b0, b1, ..."""
    model = models[0].clone()
    partners = {f"b{number}": one for number, one in enumerate(models[1:])}
    Pipeline.parse(text).run(model, Context(models=partners, runner=OrtRunner()))
    return model


def names(count: int) -> str:
    return "(" + ", ".join(f"b{number}" for number in range(count - 1)) + ")"


def split(name: str, value: str) -> tuple[ir.Model, ir.Model]:
    """A bundled model cut in two at a value."""
    parts = zoo.load(name), zoo.load(name)
    Pipeline.parse(f"extract{{outputs={value}}}").run(parts[0], Context())
    Pipeline.parse(f"extract{{inputs={value}}}").run(parts[1], Context())
    return parts


def cases(batch: int) -> Iterator[tuple[str, ir.Model, list[tuple[ir.Model, Feed]], list[Call]]]:
    """A name, the merged graph, its members with what each is fed, and what is computed beside them without a graph."""
    feed = {"image": zoo.data("test")["image"][:batch]}
    for name, value in (("mlp", "relu"), ("cnn-a", "view")):
        first, second = split(name, value)
        handed = run_feed(open_session(first), feed)
        inputs = {second.graph.inputs[0].name or "": handed[first.graph.outputs[0].name or ""]}
        yield (
            f"chain of both halves of {name}",
            merged("merge-sequence{with=b0}", first, second),
            [
                (first, feed),
                (second, inputs),
            ],
            [],
        )
    for chosen in (ALL[1:3], ALL[:4], ALL):
        models = [zoo.load(name) for name in chosen]
        fed = [(model, feed) for model in models]
        yield f"parallel, {len(models)}", merged(f"merge-parallel{{with={names(len(models))}}}", *models), fed, []
        for how in ("mean", "soft-vote"):
            text = f"ensemble{{with={names(len(models))} combine={how}}}"
            yield f"ensemble by {how}, {len(models)}", merged(text, *models), fed, []
    models = [zoo.load("mlp") for _ in range(8)]
    rng = np.random.default_rng(0)
    for model in models[1:]:
        for value in model.graph.initializers.values():
            array = value.const_value.numpy() if value.const_value is not None else np.zeros(1)
            if array.dtype == np.float32:
                value.const_value = ir.tensor(rng.permuted(array.reshape(-1)).reshape(array.shape), name=value.name)
    fed = [(one, feed) for one in models]
    yield "ensemble by mean, 8 MLPs", merged(f"ensemble{{with={names(8)}}}", *models), fed, []
    small, big = zoo.load("mlp"), zoo.load("cnn-a")
    logits = run_feed(open_session(small), feed)["logits"]
    for threshold in (0.9, 0.0):
        unsure = least_sure(logits) < threshold
        fed = [(small, feed)] + ([(big, {"image": feed["image"][unsure]})] if unsure.any() else [])
        model = merged(f"cascade{{with=b0 threshold={threshold}}}", small, big)
        name = f"cascade, {unsure.mean():.0%} go on"
        yield name, model, fed, []
        yield f"{name}, to members and confidence", model, fed, [lambda: least_sure(logits)]


def least_sure(logits: Any) -> Any:
    """The probability of the likeliest class, [batch]: what a user of a cascade without a merge computes."""
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised.max(1) / raised.sum(1)


def ratio(one: Sequence[Call], others: Sequence[Call], seconds: float) -> tuple[float, float]:
    """Median over rounds of the CPU time of ``one`` to that of ``others``, and milliseconds a run of ``one``."""
    sides = (one, others)
    for call in (*one, *others):
        call()
    started = time.perf_counter()
    for call in one:
        call()
    repeats = max(1, int(ROUND / max(time.perf_counter() - started, 1e-6)))
    found: list[tuple[float, float]] = []
    started = time.perf_counter()
    for number in itertools.count():
        if number >= 9 and time.perf_counter() - started > seconds:
            break
        spent = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            before = time.thread_time()
            for _ in range(repeats):
                for call in sides[side]:
                    call()
            spent[side] = time.thread_time() - before
        found.append((spent[0], spent[1]))
    times = np.array(found)
    return float(np.median(times[:, 0] / times[:, 1])), float(np.median(times[:, 0])) / repeats * 1e3


def latency(seconds: float) -> None:
    for batch in (1, 64):
        for name, model, fed, beside in cases(batch):
            sessions = [open_session(member) for member, _ in fed]
            separate = [
                bare_run(session, dict(feed)) for session, (_, feed) in zip(sessions, fed, strict=True)
            ] + beside
            feed = {value.name: fed[0][1][value.name] for value in model.graph.inputs if value.name in fed[0][1]}
            found, run = ratio([bare_run(open_session(model), feed)], separate, seconds)
            print(f"{verdict(found <= BAR)} batch {batch:2}  {found:5.3f}  {run:8.4f} ms  {name}", flush=True)


def repeated() -> None:
    """A model with itself, N times: what is loaded, and the file."""
    with tempfile.TemporaryDirectory() as folder:
        for name, count in itertools.product(("cnn-a", "vit", "teacher"), (2, 8)):
            for text in (f"merge-parallel{{with={names(count)} inputs=separate}}", f"ensemble{{with={names(count)}}}"):
                path, own = Path(folder, "merged.onnx"), Path(folder, "one.onnx")
                save(zoo.load(name), own)
                save(merged(text, *[load(own)] * count), path)
                weights = sum(
                    value.const_value.nbytes for value in load(own).graph.initializers.values() if value.const_value
                )
                graph = own.stat().st_size - weights
                most = weights + count * graph + (64 << 10)
                taken, single = load_bytes(str(path)) or 0, load_bytes(str(own)) or 0
                size = path.stat().st_size
                print(
                    f"{verdict(size <= most)} {verdict(taken <= count * single)} {count} x {name}, "
                    f"{text.partition('{')[0]}: file {size:,} of {most:,} bytes; opening it {taken / 2**20:.1f} MiB, "
                    f"{count} sessions {count * single / 2**20:.1f} MiB",
                    flush=True,
                )


def large(gigabytes: float) -> None:
    """Two models with as many bytes of external data each."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(2):
            Path(folder, str(number)).mkdir()
            paths.append(make(Path(folder, str(number)), gigabytes))
            weights = np.memmap(paths[-1].with_name("weights.data"), np.float32, "r+")
            weights[:: WIDTH * WIDTH] = number  # no two tensors are equal
            del weights
        for text in (
            "merge-parallel{with=b0}",
            "ensemble{with=b0}",
            "merge-sequence{with=b0 adapt=(reshape, transpose)}",
            "soup{with=b0}",
        ):
            with MemoryMeter() as meter:
                started = time.process_time()
                save(merged(text, *map(load, paths)), Path(folder, "merged.onnx"))
            peak = (meter.peak_bytes or 0) / 2**20
            seconds = time.process_time() - started
            print(f"{verdict(peak < 400)} {text}: {peak:.0f} MiB, {seconds:.0f} s of CPU", flush=True)


def verdict(holds: bool) -> str:
    return "+   " if holds else "MISS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=["latency", "repeated", "large"], default=["latency", "repeated"])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    given = parser.parse_args()
    if "latency" in given.what:
        latency(given.seconds)
    if "repeated" in given.what:
        repeated()
    if "large" in given.what:
        large(given.gigabytes)


if __name__ == "__main__":
    main()
