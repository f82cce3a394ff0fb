"""PP-OCR as the package rapidocr_onnxruntime ships it: text recognition, detection and orientation.

Text lines and pages are rendered; the images go in as blue, green, red in -1..1, and decoding is that of PP-OCR.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import rendering, writing

HEIGHT = 48  # of a text line, pixels
WIDTHS = {"rec": 320, "cls": 192}  # least width for recognition, the width for orientation
THRESHOLD, SCORE, UNCLIP = 0.3, 0.5, 1.6  # of detection: a pixel's, a box's, and by how much it had been shrunk
CALIBRATION = {"rec": 100, "det": 24, "cls": 100}
VALIDATION = {"rec": 400, "det": 80, "cls": 400}
FILES = {
    "rec": "ch_PP-OCRv4_rec_infer.onnx",
    "det": "ch_PP-OCRv4_det_infer.onnx",
    "cls": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
}
Array = np.ndarray[Any, np.dtype[Any]]


def model(kind: str) -> Path:
    """The installed file. Raises ``PackageNotFoundError``."""
    place = distribution("rapidocr_onnxruntime").locate_file(f"rapidocr_onnxruntime/models/{FILES[kind]}")
    return Path(str(place))


def prepare(kind: str, folder: Path) -> None:
    """Write ``calibration/*.npz``, a feed each, and ``validation.npz``: images and what they show."""
    rendering.require_fonts()
    (folder / "calibration").mkdir()
    for place, (image, _) in enumerate(_draw(kind, CALIBRATION[kind], seed=1)):
        np.savez(folder / "calibration" / f"{place:03}.npz", x=_input(kind, image))
    samples = list(_draw(kind, VALIDATION[kind], seed=2))
    images = {f"image{place}": image for place, (image, _) in enumerate(samples)}
    truths = {f"truth{place}": np.asarray(truth) for place, (_, truth) in enumerate(samples)}
    np.savez(folder / "validation.npz", **images, **truths)


def score(kind: str, folder: Path, session: Any) -> float:
    """Character accuracy (rec), harmonic mean of precision and recall (det), or accuracy (cls), 0..1."""
    samples = _validation(folder)
    outputs = (session.run(None, {"x": _input(kind, image)})[0] for image, _ in samples)
    pairs = list(zip(outputs, (truth for _, truth in samples), strict=True))
    if kind == "rec":
        characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
        return _character_accuracy((_decode(output[0], characters), str(truth)) for output, truth in pairs)
    if kind == "det":
        return _harmonic_mean((_boxes(output[0, 0]), truth) for output, truth in pairs)
    return float(np.mean([output[0].argmax() == truth for output, truth in pairs]))


@functools.cache
def _validation(folder: Path) -> list[tuple[Array, Array]]:
    with np.load(folder / "validation.npz") as arrays:
        return [(arrays[f"image{place}"], arrays[f"truth{place}"]) for place in range(len(arrays) // 2)]


def _draw(kind: str, count: int, seed: int) -> Iterable[tuple[Array, Any]]:
    """Images uint8 [height, width, 3] and, for each, its text, its boxes int [n, 4] or whether it is upside down."""
    rng = np.random.default_rng([seed, sorted(FILES).index(kind)])
    for place in range(count):
        if kind == "det":
            size = tuple(32 * int(rng.integers(*ends)) for ends in ((15, 23), (13, 21)))
            yield rendering.page(rng, size, [writing.line(rng) for _ in range(rng.integers(8, 20))])
            continue
        text = writing.line(rng)
        image = _scaled(rendering.text_line(rng, text), kind)
        if kind == "rec":
            yield image, text
        else:
            yield image[:: 1 - 2 * (place % 2), :: 1 - 2 * (place % 2)], place % 2


def _scaled(image: Array, kind: str) -> Array:
    """To the height that the models read; orientation reads a fixed width, into which longer lines are squeezed."""
    width = -(-image.shape[1] * HEIGHT // image.shape[0])
    width = min(width, WIDTHS["cls"]) if kind == "cls" else width
    return np.asarray(Image.fromarray(image).resize((width, HEIGHT), Image.Resampling.BILINEAR))


def _input(kind: str, image: Array) -> Array:
    """float32 [1, 3, height, width]; lines that are short are padded at their right with zeros, which are grey."""
    values = (image[..., ::-1].astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    missing = max(0, WIDTHS.get(kind, 0) - image.shape[1])
    return np.pad(values, ((0, 0), (0, 0), (0, 0), (0, missing)))


def _decode(scores: Array, characters: list[str]) -> str:
    """The best path of connectionist temporal classification: repeats count once, class 0 is the blank."""
    classes = scores.argmax(axis=1)
    kept = classes[np.flatnonzero(np.diff(classes, prepend=0) * classes)]
    return "".join([*characters, " "][place - 1] for place in kept)


def _character_accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """1 - edits / characters over all lines, blanks not counted: the models were trained on Chinese."""
    lines = [(found.replace(" ", ""), truth.replace(" ", "")) for found, truth in pairs]
    return 1 - sum(_edits(*line) for line in lines) / sum(len(truth) for _, truth in lines)


def _edits(one: str, other: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for count, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], count
        for place, found in enumerate(other, 1):
            diagonal, row[place] = row[place], min(diagonal + (letter != found), row[place] + 1, row[place - 1] + 1)
    return row[-1]


def _boxes(scores: Array) -> Array:
    """Boxes [n, 4] of a map of scores [height, width]: its connected regions, grown by what training shrank them."""
    import cv2

    count, regions, found, _ = cv2.connectedComponentsWithStats((scores > THRESHOLD).astype(np.uint8))
    totals = np.bincount(regions.ravel(), scores.ravel(), count)
    boxes = []
    for (left, top, width, height, area), total in zip(found[1:], totals[1:], strict=True):
        grown = UNCLIP * width * height / (2 * (width + height))
        if min(width, height) >= 3 and total / area > SCORE:
            boxes.append((left - grown, top - grown, left + width + grown, top + height + grown))
    return np.array(boxes).reshape(-1, 4)


def _harmonic_mean(pairs: Iterable[tuple[Array, Array]]) -> float:
    """Of precision and recall, where a box is right whose intersection with one that was drawn is half their union."""
    right = drawn = found = 0
    for boxes, truth in pairs:
        right += _matches(boxes, truth.reshape(-1, 4))
        found, drawn = found + len(boxes), drawn + len(truth)
    return 2 * right / (found + drawn)


def _matches(boxes: Array, truth: Array) -> int:
    """How many pairs there are; no box is in two, for boxes of one kind hardly overlap."""
    ends = np.minimum(boxes[:, None, 2:], truth[None, :, 2:]), np.maximum(boxes[:, None, :2], truth[None, :, :2])
    common = np.clip(ends[0] - ends[1], 0, None).prod(axis=2)
    areas = [(given[:, 2:] - given[:, :2]).prod(axis=1) for given in (boxes, truth)]
    return int((common > 0.5 * (areas[0][:, None] + areas[1][None] - common)).sum())
