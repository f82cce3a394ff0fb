"""Notes that exporters leave on nodes and values."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import onnx_ir as ir

from ...ir.scopes import scopes, values
from ..base import Context, Pass, register


@register("strip-metadata")
class StripMetadata(Pass):
    """Remove metadata and doc strings of nodes, values, graphs and functions, never the model's own.

    ``keep`` names metadata keys that stay, as globs: ``strip-metadata{keep=(pkg.torch.onnx.*, author)}``.
    """

    keep: tuple[str, ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> None:
        """One change in the ledger for each graph and function, with the bytes of text that went."""
        for scope in scopes(model):
            owners: list[ir.Node | ir.Value | ir.Graph | ir.Function] = [scope.graph, *values(scope.graph)]
            owners += scope.graph
            if scope.function is not None and scope.function.graph is scope.graph:
                owners.append(scope.function)
            removed = [text for owner in owners for text in self._strip(owner)]
            removed += [text for node in scope.graph for text in _strip_attributes(node)]
            if removed:
                ctx.change(
                    scope.prefix or "main graph",
                    "metadata and doc strings removed",
                    bytes=sum(len(text.encode()) for text in removed),
                )

    def _strip(self, owner: ir.Node | ir.Value | ir.Graph | ir.Function) -> Iterator[str]:
        if owner.doc_string:
            yield owner.doc_string
            owner.doc_string = None
        for key in [key for key in owner.metadata_props if not self._is_kept(key)]:
            yield key + owner.metadata_props.pop(key)

    def _is_kept(self, key: str) -> bool:
        return any(key == pattern or fnmatch.fnmatchcase(key, pattern) for pattern in self.keep)


def _strip_attributes(node: ir.Node) -> Iterator[str]:
    for attribute in node.attributes.values():
        if attribute.doc_string:
            yield attribute.doc_string
            attribute.doc_string = None
