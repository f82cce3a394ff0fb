"""ResNet-18 and MobileNetV2 with random weights on random images: what they cost, and how far int8 moves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from penjing.runtime.session import open_session

from .. import nets

CALIBRATION, VALIDATION = 64, 32
Array = np.ndarray[Any, np.dtype[Any]]


def prepare(kind: str, folder: Path) -> None:
    """Write ``model.onnx``, ``calibration/*.npz`` and ``validation.npz``: images, and the float network's logits."""
    onnx.save(getattr(nets, kind)(), folder / "model.onnx")
    (folder / "calibration").mkdir()
    for place, image in enumerate(_images(CALIBRATION, seed=1)):
        np.savez(folder / "calibration" / f"{place:03}.npz", image=image[None])
    images = _images(VALIDATION, seed=2)
    np.savez(folder / "validation.npz", image=images, logits=_logits(open_session(folder / "model.onnx"), images))


def score(folder: Path, session: Any) -> float:
    """Signal to quantization noise of the logits, dB; 200 where they are equal."""
    with np.load(folder / "validation.npz") as arrays:
        images, logits = arrays["image"], arrays["logits"].astype(np.float64)
    noise = np.square(_logits(session, images) - logits).sum()
    return float(min(200.0, 10 * np.log10(np.square(logits).sum() / max(noise, 1e-30))))


def _logits(session: Any, images: Array) -> Array:
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])


def _images(count: int, seed: int) -> Array:
    """float32 [count, 3, 224, 224], mean 0: patches of one colour, and noise on them."""
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((count, 3, 14, 14), np.float32).repeat(16, axis=2).repeat(16, axis=3)
    return patches + 0.3 * rng.standard_normal((count, 3, 224, 224), np.float32)
