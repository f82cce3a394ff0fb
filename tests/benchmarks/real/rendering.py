"""Text drawn with Debian's fonts into images that look as if they were photographed: uint8 [height, width, 3]."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = Path("/usr/share/fonts")
LATIN = (
    "truetype/dejavu/DejaVuSans.ttf",
    "truetype/dejavu/DejaVuSerif.ttf",
    "truetype/dejavu/DejaVuSansMono-Bold.ttf",
    "truetype/liberation/LiberationSans-Regular.ttf",
    "truetype/liberation/LiberationSans-Bold.ttf",
    "truetype/liberation/LiberationSerif-Regular.ttf",
    "truetype/liberation/LiberationSerif-Italic.ttf",
)
HAN = (
    ("opentype/noto/NotoSansCJK-Regular.ttc", 2),
    ("opentype/noto/NotoSansCJK-Bold.ttc", 2),
    ("truetype/wqy/wqy-zenhei.ttc", 0),
)  # and the number of the font for simplified Chinese in its file
Image_ = np.ndarray[Any, np.dtype[np.uint8]]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def require_fonts() -> None:
    """Raises ``FileNotFoundError`` where a font is not installed."""
    if missing := [name for name in (*LATIN, *(name for name, _ in HAN)) if not (FONTS / name).exists()]:
        packages = "fonts-dejavu-core fonts-dejavu-extra fonts-liberation fonts-noto-cjk fonts-wqy-zenhei"
        raise FileNotFoundError(f"{FONTS / missing[0]} is not there; apt-get install {packages}.")


@functools.lru_cache(512)
def _font(name: str, number: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / name), size, number)


def font_for(rng: np.random.Generator, text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that has the text's characters; ``size`` in pixels."""
    if text.isascii():
        return _font(LATIN[int(rng.integers(len(LATIN)))], 0, size)
    name, number = HAN[int(rng.integers(len(HAN)))]
    return _font(name, number, size)


def colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Paper and ink, RGB; one line in five is light on dark, and the contrast goes down to a quarter."""
    paper, contrast = rng.integers(150, 256), rng.integers(60, 150)
    tint = rng.integers(-20, 21, size=(2, 3))
    light, dark = (tuple(np.clip(shade + tint[row], 0, 255)) for row, shade in enumerate((paper, paper - contrast)))
    pair = (light, dark) if rng.random() < 0.8 else (dark, light)
    return tuple(int(part) for part in pair[0]), tuple(int(part) for part in pair[1])


def text_line(rng: np.random.Generator, text: str) -> Image_:
    """One line of text with little margins, as a detector cuts it out, of 16 to 70 pixels in height."""
    font = font_for(rng, text, int(rng.integers(13, 48)))
    left, top, right, bottom = font.getbbox(text)
    before, above, after, below = (int(part) for part in rng.integers(2, 8, size=4))
    paper, ink = colours(rng)
    image = Image.new("RGB", (int(right - left) + before + after, int(bottom - top) + above + below), paper)
    ImageDraw.Draw(image).text((before - left, above - top), text, ink, font)
    if rng.random() < 0.4:
        image = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    return worn(rng, image)


def page(rng: np.random.Generator, size: tuple[int, int], texts: list[str]) -> tuple[Image_, list[Box]]:
    """As many of the texts as fit on a page of ``size`` (width, height), one or two on a row, and their boxes."""
    paper, ink = colours(rng)
    image, boxes = Image.new("RGB", size, paper), []
    draw, y, waiting = ImageDraw.Draw(image), int(rng.integers(8, 40)), list(texts)
    while waiting:
        x, height, row = int(rng.integers(8, 80)), int(rng.integers(12, 40)), 0
        for _ in range(rng.integers(1, 3)):
            if not waiting:
                break
            font = font_for(rng, waiting[-1], height)
            box = _line_box(draw, (x, y), waiting[-1], font)
            if box[2] > size[0] - 8 or box[3] > size[1] - 8:
                waiting.pop()
                continue
            draw.text((x, y), waiting.pop(), ink, font)
            boxes.append(box)
            x, row = box[2] + 3 * height, max(row, box[3] - y)
        y += row + int(height * rng.uniform(0.6, 1.6))
    return worn(rng, image), boxes


def _line_box(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: ImageFont.FreeTypeFont) -> Box:
    """As a person would draw it: as wide as the text, as high as a line with tall and low letters."""
    left, _, right, _ = draw.textbbox(place, text, font)
    _, top, _, bottom = draw.textbbox(place, f"{text}hg", font)
    return int(left), int(top), int(right), int(bottom)


def worn(rng: np.random.Generator, image: Image.Image) -> Image_:
    """The image under uneven light, out of focus, with noise, and sometimes through JPEG."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.2)))
    pixels = np.asarray(image, np.float32)
    light = np.linspace(*rng.uniform(0.85, 1.1, size=2), pixels.shape[1], dtype=np.float32)[None, :, None]
    pixels = pixels * light + rng.normal(0, rng.uniform(0, 16), pixels.shape)
    done = np.clip(pixels, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        held = io.BytesIO()
        Image.fromarray(done).save(held, "JPEG", quality=int(rng.integers(40, 90)))
        done = np.asarray(Image.open(held))
    return done
