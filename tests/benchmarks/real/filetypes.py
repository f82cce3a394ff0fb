"""magika, the network of the package of that name, on files of this Debian system, labelled by their names.

A file's bytes go in as magika reads them: 1,024 from its beginning and 1,024 from its end, blanks stripped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np

ROOTS = ("/usr", "/etc", "/var/lib/dpkg", sys.prefix)
LABELS = """
awk:awk bat:batch bz2:bzip c:c cc:cpp cmake:cmake cpp:cpp css:css csv:csv el:lisp exe:pebin f:fortran f90:fortran
gif:gif gz:gzip h:c hpp:cpp html:html ini:ini ipynb:ipynb jar:jar java:java jpg:jpeg js:javascript json:json lisp:lisp
lua:lua m4:m4 md:markdown mk:makefile npy:npy npz:npz onnx:onnx pdf:pdf pem:pem php:php pickle:pickle pkl:pickle
pl:perl pm:perl png:png po:po proto:proto ps:postscript ps1:powershell py:python pyc:pythonbytecode pyi:python rst:rst
scss:scss sh:shell so:elf sql:sql svg:svg tar:tar tcl:tcl toml:toml ts:typescript ttf:ttf txt:txt wav:wav whl:zip
woff2:woff2 xml:xml xsl:xml xz:xz yaml:yaml yml:yaml zip:zip
"""  # suffix:label, the label by magika's names
MOST = 44  # files of one label
CALIBRATION = 240
SIZES = (64, 2**22)  # bytes of a file that is taken
Array = np.ndarray[Any, np.dtype[Any]]


def model() -> Path:
    """The installed file. Raises ``PackageNotFoundError``."""
    place = distribution("magika").locate_file("magika/models")
    return max(Path(str(place)).glob("standard_v*/model.onnx"))


def prepare(folder: Path) -> None:
    """Write ``calibration.npz``: ``bytes``, and ``validation.npz``: ``bytes`` and ``labels``. No file is in both."""
    config = json.loads((model().parent / "config.min.json").read_text())
    names = config["target_labels_space"]
    files = list(_chosen())
    taken = {}  # by content, so that copies of a file count once
    for path, label in files:
        with open(path, "rb") as file:
            taken.setdefault(_tokens(file.read(), config).tobytes(), names.index(label))
    tokens = np.array([np.frombuffer(key, np.int32) for key in taken])
    labels = np.array(list(taken.values()))
    if len(labels) < CALIBRATION + 1000:
        raise ValueError(f"There are only {len(labels)} files with a known type under {', '.join(ROOTS)}.")
    held = np.random.default_rng(0).permutation(len(labels))
    np.savez_compressed(folder / "calibration.npz", bytes=tokens[held[:CALIBRATION]])
    rest = held[CALIBRATION:]
    np.savez_compressed(folder / "validation.npz", bytes=tokens[rest], labels=labels[rest])


def score(folder: Path, session: Any) -> float:
    """Top-1 accuracy, 0..1."""
    tokens, labels = _validation(folder)
    parts = [session.run(None, {"bytes": row[None]})[0] for row in tokens]  # large batches are slower
    return float((np.concatenate(parts).argmax(axis=1) == labels).mean())


@functools.cache
def _validation(folder: Path) -> tuple[Array, Array]:
    with np.load(folder / "validation.npz") as arrays:
        return arrays["bytes"], arrays["labels"]


def _chosen() -> Iterator[tuple[str, str]]:
    """Paths and labels, at most ``MOST`` of a label: those whose paths have the least digests, so from all over."""
    labels = dict(pair.split(":") for pair in LABELS.split())
    by_label: dict[str, set[str]] = {}
    for path in _files():
        label = labels.get(os.path.splitext(path)[1][1:].lower()) or _by_content(path)
        if label:
            by_label.setdefault(label, set()).add(path)
    for label in sorted(by_label):
        for path in sorted(by_label[label], key=lambda path: hashlib.sha256(path.encode()).digest())[:MOST]:
            yield path, label


def _files() -> Iterator[str]:
    for root in ROOTS:
        for folder, _, names in os.walk(root):
            for path in (os.path.join(folder, name) for name in names):
                if not os.path.islink(path) and os.path.isfile(path) and SIZES[0] <= os.path.getsize(path) <= SIZES[1]:
                    yield path


def _by_content(path: str) -> str | None:
    """The type of a program or script without a suffix."""
    if "." in os.path.basename(path):
        return None
    with open(path, "rb") as file:
        start = file.readline(64)
    kinds = {b"\x7fELF": "elf", b"#!/bin/sh": "shell", b"#!/bin/bash": "shell", b"#!/usr/bin/perl": "perl"}
    return next((label for mark, label in kinds.items() if start.startswith(mark)), None)


def _tokens(content: bytes, config: dict[str, Any]) -> Array:
    """int32 [begin + end]: bytes as numbers; what a short file lacks is the padding token."""
    begin, end, block = config["beg_size"], config["end_size"], config["block_size"]
    first = content[:block].lstrip()[:begin]
    last = content[-block:].rstrip()[-end:]
    tokens = np.full(begin + end, config["padding_token"], np.int32)
    tokens[: len(first)] = np.frombuffer(first, np.uint8)
    if last:
        tokens[-len(last) :] = np.frombuffer(last, np.uint8)
    return tokens
