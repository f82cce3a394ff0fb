"""Which weights and nodes a pass may touch: one ``Selection`` serves the ``only`` and ``keep`` of all passes.

A pattern is a glob over names (``encoder.*.weight``), ``op:Conv`` for what an operator uses, or ``node:/encoder/*``
for what a node of that name uses. An exact name always matches itself, whatever characters it holds.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..ir.address import graphs
from ..ir.errors import UsageError, nearest


@dataclass(frozen=True)
class Selection:
    """A set of weights and nodes, said in patterns; ``weight in selection`` and ``node in selection``."""

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(self.patterns))

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def __contains__(self, subject: object) -> bool:
        faces = list(_faces(subject))
        return any(_matches(pattern, faces) for pattern in self.patterns)

    def require_matches(self, model: ir.Model, option: str) -> None:
        """Raise ``UsageError`` for the first pattern that matches nothing in ``model``, with the nearest name."""
        if not self.patterns:
            return
        faces = [face for face in dict.fromkeys(_model_faces(model)) if face not in ("", "node:")]
        for pattern in self.patterns:
            if not _matches(pattern, faces):
                raise UsageError(
                    f"{option}={pattern} matches no weight and no node of the model.{nearest(pattern, faces)}"
                )


NOTHING = Selection()


def left_out(subject: object, only: Selection, keep: Selection) -> str | None:
    """Why a pass with these options leaves ``subject`` alone; ``None`` where it does not."""
    if subject in keep:
        return "kept by request"
    if only and subject not in only:
        return "not among those asked for"
    return None


def _matches(pattern: str, faces: Iterable[str]) -> bool:
    return any(face == pattern or fnmatch.fnmatchcase(face, pattern) for face in faces)


def _faces(subject: Any) -> Iterator[str]:
    """Every string by which a pattern may call ``subject``: a weight, node or value."""
    if isinstance(subject, ir.Node):
        yield from _node_faces(subject)
        yield subject.name or ""
        return
    if isinstance(subject, ir.Value):
        yield subject.name or ""
        return
    yield subject.address
    yield from (value.name for value in subject.values)
    for use in subject.uses:
        yield from _node_faces(use.node)


def _node_faces(node: ir.Node) -> Iterator[str]:
    yield f"node:{node.name}"
    yield f"op:{node.op_type}"
    if node.domain:
        yield f"op:{node.domain}::{node.op_type}"


def _model_faces(model: ir.Model) -> Iterator[str]:
    for prefix, graph in graphs(model):
        for name in graph.initializers:
            yield from (name, prefix + name)
        for node in graph:
            yield from _node_faces(node)
            yield node.name or ""
            for output in node.outputs:
                yield from (output.name or "", prefix + (output.name or ""))
