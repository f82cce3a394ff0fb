"""Sharing and packing of weights: speed of the clustering, sizes, load times and latency of encodings, real models.

    python -m tests.benchmarks.packing [clustering] [encodings] [models] [large] [--gigabytes 2.5] [--only NAME ...]

``clustering``: 10 M weights of real models, CPU seconds, and the inertia beside that of the dynamic program over all
65,536 bins; scikit-learn's KMeans beside it where that is installed. ``encodings``: four matrices of 1024 x 1024: bytes
beside the bar and the bound by entropy, milliseconds to open a session over those for the dense model, the median ratio
of latencies, and whether the outputs are the same bits. ``models``: what a pipeline leaves of the bytes of real models,
both without exporter's metadata, with the metric at most 0.005 down; with pruning, at the sparsity that makes the
smallest file. ``large``: peak memory of packing, over that after imports. ``+`` stands beside what meets its bar,
``MISS`` beside what does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

import penjing
from penjing.ir.errors import PenjingError
from penjing.ir.files import load, save
from penjing.ir.weights import weights
from penjing.passes.share import clustering
from penjing.passes.share.grid import BINS
from penjing.runtime.measure import MemoryMeter, interleave
from penjing.runtime.run import BoundExceeded
from penjing.runtime.session import open_session

from .int8 import stripped_bytes
from .real import cases
from .threshold import cpu_seconds, make

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

Left = tuple[float, float, float]  # bytes after over bytes before, the drop of the metric, CPU seconds

WEIGHTS = 10_000_000
SIDE = 1024
MATRICES = 4
DROP = 0.005
BARS = {"mlp": 0.20, "cnn-a": 0.20, "vit": 0.20, "magika": 0.20, "ppocr-rec": 0.25}
PRUNED = {"mlp": 0.12, "cnn-a": 0.12}
PRUNING = "prune-magnitude{{sparsity={:g} scope=model}},share-weights{{bits=auto}},pack-weights"
SPARSITIES = (0.05, 0.8)  # between which the greatest is looked for, in steps of a sixteenth of the way

# What is made of normally distributed weights, the greatest share of the bytes of float, and combined encodings.
ENCODINGS: dict[str, tuple[str, float, int]] = {
    "50 % zeros": ("prune-magnitude{sparsity=0.5}", 8.50 / 16, 1),
    "70 % zeros": ("prune-magnitude{sparsity=0.7}", 5.30 / 16, 1),
    "90 % zeros": ("prune-magnitude{sparsity=0.9}", 2.00 / 16, 1),
    "16 values": ("share-weights{bits=4}", 1 / 8, 1),
    "90 % zeros, 16 values": ("prune-magnitude{sparsity=0.9},share-weights{bits=4}", 0.034 / 1.03, 2),
    "50 % zeros, int8": ("prune-magnitude{sparsity=0.5},quantize-weights{bits=8}", 0.66 / 4, 1),
    "70 % zeros, int8": ("prune-magnitude{sparsity=0.7},quantize-weights{bits=8}", 0.43 / 4, 1),
}


def mark(good: bool) -> str:
    return "+" if good else "MISS"


# Clustering -----------------------------------------------------------------------------------------------------------


def real_weights() -> Array:
    """``WEIGHTS`` weights of real models, again and again until there are so many."""
    found = []
    for name in ("ppocr-rec", "ppocr-det", "magika", "mlp", "teacher"):
        try:
            model = load(cases.load(name).model)
        except (ImportError, OSError) as error:
            print(f"{name} is left out: {error}")
            continue
        found += [weight.array().reshape(-1) for weight in weights(model) if weight.prunable]
    return np.resize(np.concatenate(found), WEIGHTS).astype(np.float32)


def _counted(numbers: Array) -> clustering.Points:
    return clustering.points(lambda: clustering.in_steps(numbers), numbers.size)


def inertia(numbers: Array, book: clustering.Codebook) -> float:
    parts = (np.square(book.apply(part).astype(np.float64) - part) for part, _ in clustering.in_steps(numbers))
    return float(sum(part.sum() for part in parts))


def optimum(found: clustering.Points, count: int) -> float:
    """The inertia of the dynamic program over every place between bins."""
    places, clustering._PLACES = clustering._PLACES, BINS
    try:
        book = clustering.Codebook(clustering.kmeans(found, count), np.dtype(np.float64), found.size)
    finally:
        clustering._PLACES = places
    return book.figures(found)[0]


def measure_clustering() -> None:
    numbers = real_weights()
    spread = np.random.default_rng(0).standard_normal(numbers.size).astype(np.float32) * numbers.std()
    for label, own in (("real weights", numbers), ("normal", spread)):
        for count, bar in ((16, 0.5), (256, 2.0)):
            made: list[clustering.Codebook] = []

            def work(own: Array = own, count: int = count, made: list[clustering.Codebook] = made) -> None:
                found = _counted(own)
                made.append(clustering.Codebook(clustering.kmeans(found, count), own.dtype, own.size))
                for part, _ in clustering.in_steps(own):
                    made[-1].apply(part)

            seconds = min(cpu_seconds(work) for _ in range(3))
            line = f"{label:14} {count:4} values  {seconds:5.2f} s CPU {mark(seconds <= bar)} (bar {bar})"
            reached = inertia(own, made[0])
            if count == 16:  # for 256 the program over all bins takes minutes
                ratio = reached / optimum(_counted(own), count)
                line += f"  inertia / optimum over bins {ratio:.6f} {mark(ratio <= 1.0001)}"
            print(line, flush=True)
            if count == 16 and importlib.util.find_spec("sklearn"):
                _measure_sklearn(own, reached)
    if not importlib.util.find_spec("sklearn"):
        print("scikit-learn is not installed; facts of before: 7.2 s, inertia 1.1 % worse")


def _measure_sklearn(numbers: Array, reached: float) -> None:
    from sklearn.cluster import KMeans

    start = time.process_time()
    fitted = KMeans(16, n_init=1, random_state=0).fit(numbers.reshape(-1, 1))
    print(f"  sklearn: {time.process_time() - start:.1f} s CPU, inertia {fitted.inertia_ / reached:.4f} of ours")


# Encodings ------------------------------------------------------------------------------------------------------------


def chain() -> ir.Model:
    tape, generator = ir.tape.Tape(), np.random.default_rng(0)
    x = value = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([16, SIDE]))
    for place in range(MATRICES):
        array = generator.standard_normal((SIDE, SIDE), np.float32) / np.float32(32)
        value = tape.op("MatMul", [value, tape.initializer(ir.tensor(array, name=f"w{place}"))])
    value.name, value.type, value.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([16, SIDE])
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def opening(path: Path) -> float:
    """CPU seconds to open a session."""
    return cpu_seconds(lambda: open_session(path))


def measure_encodings() -> None:
    floats = 4 * MATRICES * SIDE * SIDE
    feed = {"x": np.random.default_rng(1).standard_normal((16, SIDE), np.float32)}
    for label, (pipeline, bar, combined) in ENCODINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            dense, packed = Path(folder) / "dense.onnx", Path(folder) / "packed.onnx"
            model = chain()
            penjing.run(model, pipeline, check="off")
            save(model, dense, external=False)
            bound = sum(weight.entropy_bytes() for weight in weights(model))
            start = time.process_time()
            packed_by = penjing.run(model, "pack-weights", check="off")
            packing = time.process_time() - start
            save(model, packed, external=False)
            size = packed.stat().st_size
            loads = np.min([[opening(path) for path in (dense, packed)] for _ in range(9)], axis=0)
            sessions = [open_session(path) for path in (dense, packed)]
            same = np.array_equal(*(session.run(None, feed)[0] for session in sessions))
            clocks = interleave(sessions, [feed], seconds=4.0)
            latency = float(np.median(clocks.cpu[1] / clocks.cpu[0]))
            extra = 1e3 * (loads[1] - loads[0])
            decoded = sum(change.numbers["bytes_before"] for change in packed_by.passes[0].ledger.changes)
            allowed = (8 if combined == 1 else 12) * decoded / 1e6 + MATRICES
            print(
                f"{label:22} {size / floats:.4f} of float {mark(size / floats <= 1.03 * bar)} (bar {bar:.4f} + 3 %; "
                f"entropy bound {bound / floats:.4f}) load +{extra:.0f} ms {mark(extra <= allowed)} (bar {allowed:.0f})"
                f" latency {latency:.3f} {mark(latency <= 1.03)} same bits {mark(same)} packed in {packing:.2f} s CPU",
                flush=True,
            )


# Real models ----------------------------------------------------------------------------------------------------------


def part_left(case: cases.Case, pipeline: str) -> Left | None:
    """What ``pipeline`` leaves; None where the run broke its bounds."""
    model = load(case.model)
    start = time.process_time()
    try:
        report = penjing.run(
            model, f"strip-metadata,{pipeline}", data=case.calibration, metric=case.metric, max_drop=DROP
        )
    except BoundExceeded:
        return None
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.onnx"
        save(model, out, external=False)
        ratio = out.stat().st_size / stripped_bytes(case.model)
        penjing.run(again := load(out), "clean", check="off")
        save(again, out, external=False)
        cleaned = out.stat().st_size / stripped_bytes(case.model)
    if cleaned > ratio + 0.005:
        print(f"  clean undoes it: {cleaned:.3f} MISS")
    assert report.metric is not None
    assert report.metric.after is not None
    return ratio, report.metric.before - report.metric.after, seconds


def sparsest(
    try_: Callable[[float], tuple[float, float, float] | None],
) -> tuple[float, tuple[float, float, float] | None]:
    """The smallest file found by halving the range of sparsities, and its sparsity."""
    low, high = SPARSITIES
    best: tuple[float, Left | None] = (low, try_(low))
    for _ in range(4):
        middle = (low + high) / 2
        found = try_(middle)
        if found is not None and (best[1] is None or found[0] <= best[1][0]):
            best, low = (middle, found), middle
        else:
            high = middle
    return best


def measure_models(only: list[str]) -> None:
    for name in only:
        try:
            case = cases.load(name)
        except (ImportError, OSError, ValueError) as error:
            print(f"{name} is left out: {error}")
            continue
        try:
            found = part_left(case, "share-weights{bits=auto},pack-weights")
            _tell(f"{name}: share-weights{{bits=auto}},pack-weights", found, BARS[name])
            if name in PRUNED:
                sparsity, found = sparsest(lambda share, case=case: part_left(case, PRUNING.format(share)))
                _tell(f"{name}: {PRUNING.format(sparsity)}", found, PRUNED[name])
        except PenjingError as error:
            print(f"{name}: {error} MISS")


def _tell(label: str, found: Left | None, bar: float) -> None:
    if found is None:
        print(f"{label}: over the bound MISS", flush=True)
        return
    ratio, drop, seconds = found
    good = f"{ratio:.4f} of the bytes {mark(ratio <= bar)} (bar {bar})"
    print(f"{label}: {good}, metric down by {drop:.4f}, {seconds:.0f} s CPU", flush=True)


# Large ----------------------------------------------------------------------------------------------------------------


def measure_large(gigabytes: float) -> None:
    """Share, then pack, with the weights in a data file on both sides; nothing is run."""
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), gigabytes)
        for pipeline in ("share-weights{bits=4},pack-weights", "prune-magnitude{sparsity=0.9},pack-weights"):
            out = Path(folder) / "packed.onnx"

            def work(pipeline: str = pipeline, out: Path = out) -> None:
                model = load(path)
                penjing.Pipeline.parse(pipeline).run(model)
                save(model, out)

            with MemoryMeter() as memory:
                seconds = cpu_seconds(work)
            peak = (memory.peak_bytes or 0) / 1e6
            print(
                f"{gigabytes:g} GB, {pipeline}: {seconds:.0f} s CPU, peak {peak:.0f} MB {mark(peak < 1000)} (bar 1000)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("clustering", "encodings", "models", "large")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[], metavar="PART", help=", ".join(parts))
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--only", nargs="+", choices=BARS, default=list(BARS), metavar="NAME", help="models")
    arguments = parser.parse_args()
    chosen = arguments.parts or parts
    if "clustering" in chosen:
        measure_clustering()
    if "encodings" in chosen:
        measure_encodings()
    if "models" in chosen:
        measure_models(arguments.only)
    if "large" in chosen:
        measure_large(arguments.gigabytes)


if __name__ == "__main__":
    main()
