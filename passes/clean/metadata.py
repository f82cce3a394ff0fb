"""Notes that exporters leave on nodes and values."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from ...ir.errors import UsageError, nearest
from ...ir.scopes import Scope, scopes, values
from ..base import Context, Pass, register

Owner = ir.Node | ir.Value | ir.Graph | ir.Function


@register("strip-metadata")
class StripMetadata(Pass):
    """Remove metadata and doc strings of nodes, values, graphs and functions, never the model's own.

    ``keep`` names metadata keys that stay, as globs: ``strip-metadata{keep=(pkg.torch.onnx.*, author)}``.
    """

    keep: tuple[str, ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> None:
        """A change in the ledger for each graph and function, with the bytes of text that went; a skip for what stays.

        Raises ``UsageError`` for a glob of ``keep`` that no key matches.
        """
        owners = [(scope, _owners(scope)) for scope in scopes(model)]
        self._require_keys(owner for _, found in owners for owner in found)
        for scope, found in owners:
            place = scope.prefix or "main graph"
            kept = {pattern for owner in found for key in owner.metadata_props for pattern in self._keeping(key)}
            removed = [text for owner in found for text in self._strip(owner)]
            removed += [text for node in scope.graph for text in _strip_attributes(node)]
            if removed:
                size = sum(len(text.encode()) for text in removed)
                ctx.change(place, "metadata and doc strings removed", bytes=size)
            for pattern in self.keep:
                if pattern in kept:
                    ctx.skip(place, f"metadata kept by request: {pattern}")

    def _require_keys(self, owners: Iterable[Owner]) -> None:
        if not self.keep:
            return
        keys = dict.fromkeys(key for owner in owners for key in owner.metadata_props)
        found = {pattern for key in keys for pattern in self._keeping(key)}
        for pattern in self.keep:
            if pattern not in found:
                known = f"it has {', '.join(list(keys)[:5])}" if keys else "it has none"
                raise UsageError(
                    f"{self.name}: keep={pattern} matches no metadata key of the model's nodes, values and graphs; "
                    f"{known}{' and more' if len(keys) > 5 else ''}.{nearest(pattern, keys)}"
                )

    def _strip(self, owner: Owner) -> Iterator[str]:
        if owner.doc_string:
            yield owner.doc_string
            owner.doc_string = None
        for key in [key for key in owner.metadata_props if not any(self._keeping(key))]:
            yield key + owner.metadata_props.pop(key)

    def _keeping(self, key: str) -> Iterator[str]:
        """The globs that keep ``key``."""
        return (pattern for pattern in self.keep if key == pattern or fnmatch.fnmatchcase(key, pattern))


def _owners(scope: Scope) -> list[Owner]:
    """All in a graph that has metadata and a doc string of its own."""
    owners: list[Owner] = [scope.graph, *values(scope.graph), *scope.graph]
    if scope.function is not None and scope.function.graph is scope.graph:
        owners.append(scope.function)
    return owners


def _strip_attributes(node: ir.Node) -> Iterator[str]:
    for attribute in node.attributes.values():
        if attribute.doc_string:
            yield attribute.doc_string
            attribute.doc_string = None
