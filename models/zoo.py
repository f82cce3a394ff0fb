"""The bundled models by name, their data, and accuracy as a metric.

Every model takes `image`, float32 [batch,1,28,28] in 0..1, and gives `logits`, float32 [batch,10].
models/README.md tells where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..ir.errors import UsageError, nearest

if TYPE_CHECKING:
    import onnx_ir

FOLDER = Path(__file__).parent

Array = np.ndarray[Any, np.dtype[Any]]


class Session(Protocol):
    """What the metrics here ask of a model that can run: `onnxruntime.InferenceSession` is one."""

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any], /) -> Any:
        """The outputs named, or all of them, for the inputs fed."""


@dataclass(frozen=True)
class Entry:
    """One bundled model; `test_accuracy` is top-1 on the 1,000 test images, measured in ONNX Runtime."""

    name: str
    file: str
    about: str
    test_accuracy: float


def _entries(*rows: tuple[str, str, float]) -> Mapping[str, Entry]:
    return MappingProxyType({name: Entry(name, f"{name}.onnx", about, top1) for name, about, top1 in rows})


ENTRIES = _entries(
    ("mlp", "perceptron 784-512-256-128-10 with ReLU", 0.985),
    ("cnn-a", "residual CNN with depthwise convolutions, normalisation folded by the exporter", 0.994),
    ("cnn-b", "the network of cnn-a from another seed", 0.996),
    ("cnn-a-legacy", "the weights of cnn-a by the legacy exporter, BatchNormalization kept", 0.994),
    ("cnn-run-1", "epoch 16 of one run of the same CNN", 0.991),
    ("cnn-run-2", "epoch 20 of that run", 0.989),
    ("cnn-run-3", "epoch 24 of that run", 0.993),
    ("vit", "vision transformer, 4 blocks of width 64 over 49 patches", 0.992),
    ("teacher", "wider CNN, to distil from", 0.995),
)


def path(name: str) -> Path:
    """Where the model called `name` lies; a `UsageError` with the nearest name if there is none."""
    if name not in ENTRIES:
        raise UsageError(f"There is no bundled model '{name}'.{nearest(name, ENTRIES)}")
    return FOLDER / ENTRIES[name].file


def load(name: str) -> onnx_ir.Model:
    """The model called `name`, freshly read: the caller may rewrite it."""
    from ..ir.files import load as read

    return read(path(name))


def data(split: Literal["validation", "test"]) -> dict[str, Array]:
    """`image`, float32 [n,1,28,28] in 0..1, and `labels`, int64 [n]; n is 300 in validation, 1,000 in test.

    Any ten consecutive images, counted from the first, hold each digit once.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"there is no split {split!r}; the splits are 'validation' and 'test'")
    with np.load(FOLDER / f"mnist-{split}.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("image", "labels")}


def accuracy(session: Session) -> float:
    """Top-1 accuracy, 0..1, on the test images: `--metric penjing.models.zoo:accuracy`."""
    return _top1(session, "test")


def validation_accuracy(session: Session) -> float:
    """Top-1 accuracy, 0..1, on the validation images: the one to choose by."""
    return _top1(session, "validation")


def _top1(session: Session, split: Literal["validation", "test"]) -> float:
    arrays = data(split)
    logits = session.run(None, {"image": arrays["image"]})[0]
    return float((np.asarray(logits).argmax(axis=1) == arrays["labels"]).mean())
