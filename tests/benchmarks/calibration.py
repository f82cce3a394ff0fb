"""CPU time and memory of calibrating ResNet-18, as ratios to running it on the same images one by one.

    python tests/benchmarks/calibration.py [images]

The goals, on 64 images and one thread: the extremes of all 49 activations at most 1.15 times plain inference at batch
1; their histograms, and from these percentile, entropy and mse together, at most 1.6 times; memory from 8 to 64 to 512
samples, each a file of a folder, grows by less than 5 %. BatchNormalization is folded first, as ``quantize-static``
does; besides all activations there are the extremes of those 33 alone that it gives a scale, which leaves the Relus
fused. Times, which hold the opening of a session, are medians of rounds that run everything in turn.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from nets import resnet18

from penjing.ir.affine import U8
from penjing.ir.files import load, save
from penjing.passes.base import Context
from penjing.passes.clean.batchnorm import FoldBatchNorm
from penjing.passes.points import Histogram, Point, Range
from penjing.passes.quantize.calibrators import calibrate
from penjing.passes.quantize.plan import Plan, prepare
from penjing.runtime.feeds import read_feeds
from penjing.runtime.measure import MemoryMeter
from penjing.runtime.session import open_session
from penjing.runtime.statistics import collect

ROUNDS = 5
SAMPLES = (8, 64, 512)
PROCESSES = 15


def folded(size: int = 224) -> ir.Model:
    model = ir.from_proto(resnet18(size=size))
    FoldBatchNorm().run(model, Context())
    return ir.from_proto(ir.to_proto(model))  # with the weights folded once, not each time that they are read


def scaled(model: ir.Model) -> list[Point]:
    """What ``quantize-static`` wants the extremes of."""
    model = model.clone()
    prepare(model, Context())
    plan = Plan.of(model)
    return [Range(plan.addresses[value]) for value in plan.values]


def points(model: ir.Model, kind: type[Point]) -> list[Point]:
    return [kind(value.name or "") for node in model.graph for value in node.outputs]


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of work that takes its memory from the system: some would else find what the work before it left, and some not,
    which is a tenth of plain inference.
    """
    ctypes.CDLL(None).malloc_trim(0)
    start = time.process_time()
    work()
    return time.process_time() - start


def times(images: int) -> None:
    model = folded()
    feeds = [{"image": image[None]} for image in _images(images, 224)]
    some = scaled(model)

    def plain() -> None:
        session = open_session(model)
        for feed in feeds:
            session.run(None, feed)

    def all_three() -> None:
        for found in collect(model, points(model, Histogram), feeds).values():
            for method in ("percentile", "entropy", "mse"):
                calibrate(method, found, U8, symmetric=False)

    jobs: dict[str, tuple[Callable[[], object], str]] = {
        "plain inference at batch 1": (plain, ""),
        "minmax": (lambda: collect(model, points(model, Range), feeds), "1.15"),
        f"minmax of the {len(some)} with a scale": (lambda: collect(model, some, feeds), ""),
        "histograms": (lambda: collect(model, points(model, Histogram), feeds), ""),
        "percentile + entropy + mse": (all_three, "1.6"),
    }
    measured: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, (job, _goal) in jobs.items():
            measured[name].append(cpu_seconds(job))
    rounds = np.array(list(measured.values()))
    ratios = np.median(rounds / rounds[0], axis=1)
    print(f"ResNet-18, {len(points(model, Range))} activations, {images} images of 224, one thread")
    for (name, seconds), ratio in zip(measured.items(), ratios, strict=True):
        goal = f" (goal {jobs[name][1]})" if jobs[name][1] else ""
        print(f"{name:28} {np.median(seconds):6.2f} s CPU  {ratio:5.2f}{goal}")


def memory() -> None:
    """Each run in a process of its own, for what a run before it kept would hide its own; medians of some.

    Most of it is what opening a session leaves behind, and differs from process to process by some 15 %.
    """
    print("Histograms of all activations, images of 112 from a folder of .npz")
    with tempfile.TemporaryDirectory() as scratch:
        save(folded(112), f"{scratch}/model.onnx")
        peaks: list[float] = []
        for samples in SAMPLES:
            folder = Path(scratch, str(samples))
            folder.mkdir()
            for place, image in enumerate(_images(samples, 112)):
                np.savez(folder / f"{place:04}.npz", image=image[None])
            command = [sys.executable, __file__, "--peak", f"{scratch}/model.onnx", str(folder)]
            runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(PROCESSES)]
            found = [int(done.stdout) for done in runs]
            peaks.append(float(np.median(found)))
            grown = peaks[-1] / peaks[0] - 1
            spread = f"{min(found) / 1e6:.0f} to {max(found) / 1e6:.0f}"
            goal = " (goal 5 %)" if grown else ""
            print(f"{samples:4} samples  {peaks[-1] / 1e6:6.1f} MB ({spread})  {grown:+.1%}{goal}", flush=True)


def peak(model: str, folder: str) -> None:
    """Print the bytes that one calibration takes over those after all imports and loading."""
    loaded = load(model)
    collect(loaded, [Range("logits")], [{"image": np.zeros((1, 3, 112, 112), np.float32)}])
    feeds = read_feeds(folder, loaded)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed on the way here would hide as much
    with MemoryMeter(interval=0.002) as meter:
        collect(loaded, points(loaded, Histogram), feeds)
    print(meter.peak_bytes)


def _images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, size, size), np.float32)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:])
    else:
        times(int(sys.argv[1]) if sys.argv[1:] else 64)
        memory()
