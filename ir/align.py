"""What models have beside their graphs - versions, functions, metadata - brought to where one model can have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import onnx
import onnx_ir as ir

from .address import function_prefix, graphs, printable
from .errors import PenjingError, UsageError
from .opset import raise_opset
from .references import mark_alike
from .scopes import scopes

Named: TypeAlias = "Sequence[tuple[str, ir.Model]]"
Notes: TypeAlias = "list[tuple[str, str]]"

_ADDED_TO = {  # ONNX-ML operators with a version that only added attributes to the one before it
    ("ai.onnx.ml", "TreeEnsembleClassifier"): {3: 1},
    ("ai.onnx.ml", "TreeEnsembleRegressor"): {3: 1},
    ("ai.onnx.ml", "LabelEncoder"): {4: 2},
}


def align_versions(models: Named, least: int = 0) -> Notes:
    """Bring all models, in place, to the newest operator sets and IR version among them, and to opset ``least``.

    The ONNX domain is raised by exact conversions. Of other domains a version is raised where none of the operators
    that the model uses changed. Raises ``UsageError`` that names both models where that cannot be.
    """
    notes: Notes = []
    versions = [max((scope.version for scope in scopes(model)), default=0) for _, model in models]
    newest = max(versions)
    holder = printable(models[versions.index(newest)][0])
    if newest < least:
        newest, holder = least, "what joins them"
    for name, model in models:
        lowest = min((scope.version for scope in scopes(model) if scope.version), default=newest)
        if lowest < newest:
            try:
                raise_opset(model, newest)
            except PenjingError as error:
                raise UsageError(
                    f"{printable(name)} is at opset {lowest} and {holder} at {newest}; they cannot be brought to one: "
                    f"{error}"
                ) from error
            notes.append((name, f"raised from opset {lowest} to {newest}"))
        own = model.opset_imports
        own.pop("ai.onnx", None)
        if newest:
            own[""] = newest
    _align_domains(models)
    ir_version = max(model.ir_version for _, model in models)
    for name, model in models:
        if model.ir_version != ir_version:
            notes.append((name, f"raised from IR version {model.ir_version} to {ir_version}"))
            model.ir_version = ir_version
    return notes


def _align_domains(models: Named) -> None:
    newest: dict[str, tuple[int, str]] = {}
    for name, model in models:
        for domain, version in model.opset_imports.items():
            if version > newest.get(domain, (0, ""))[0]:
                newest[domain] = version, name
    for name, model in models:
        made_here = {function.domain for function in model.functions.values()}
        for domain, version in model.opset_imports.items():
            wanted, holder = newest[domain]
            if version == wanted:
                continue
            used = sorted({node.op_type for _, graph in graphs(model) for node in graph if node.domain == domain})
            if domain in made_here:
                used = [op for op in used if not any(key[:2] == (domain, op) for key in model.functions)]
            changed = [op for op in used if not _same_operator(domain, op, version, wanted)]
            if changed:
                raise UsageError(
                    f"{printable(name)} is at version {version} of the domain '{printable(domain)}' and "
                    f"{printable(holder)} at {wanted}, and {printable(changed[0])} may have changed between; bring "
                    "both to one version first."
                )
    common = {domain: version for domain, (version, _) in newest.items()}
    for _, model in models:
        model.opset_imports.update(common)
        for function in model.functions.values():
            function.opset_imports.update({d: v for d, v in common.items() if d in function.opset_imports})


def _same_operator(domain: str, op_type: str, one: int, two: int) -> bool:
    try:
        first, second = (onnx.defs.get_schema(op_type, version, domain) for version in (one, two))
    except (onnx.defs.SchemaError, TypeError):
        return False
    return _lineage(op_type, domain, first.since_version) == _lineage(op_type, domain, second.since_version)


def _lineage(op_type: str, domain: str, version: int) -> int:
    """The first version whose models mean the same in ``version``, which only added attributes."""
    return _ADDED_TO.get((domain, op_type), {}).get(version, version)


def align_functions(models: Named) -> Notes:
    """Rename, in place, functions of one identifier that differ between models: ``member_Function``."""
    notes: Notes = []
    known: dict[ir.OperatorIdentifier, bytes] = {}
    for name, model in models:
        own = {
            key: ir.serde.serialize_function(one).SerializeToString(deterministic=True)
            for key, one in model.functions.items()
        }
        unlike = {key for key, text in own.items() if key in known and known[key] != text}
        while True:  # what calls a function that is renamed differs too
            more = {
                key
                for key, one in model.functions.items()
                if key not in unlike
                and key in known
                and any(node.op_identifier() in unlike for node in one.all_nodes())
            }
            if not more:
                break
            unlike |= more
        new: dict[ir.OperatorIdentifier, str] = {}
        for key in (key for key in model.functions if key in unlike):
            domain, wanted, overload = key
            stem, number = f"{name}_{wanted}", 0
            fresh = stem
            while (domain, fresh, overload) in known or (domain, fresh, overload) in own:
                number += 1
                fresh = f"{stem}_{number}"
            new[key] = fresh
            notes.append((name, f"its function {printable(function_prefix(model.functions[key])[:-1])} is {fresh} now"))
        if new:
            for _, graph in graphs(model):
                for node in graph:
                    if (found := new.get(node.op_identifier())) is not None:
                        node.op_type = found
            renamed = [(key, one) for key, one in model.functions.items()]
            model.functions.clear()
            for key, one in renamed:
                if key in new:
                    one.name = new[key]
                model.functions[one.identifier()] = one
        for key, one in model.functions.items():
            known.setdefault(key, ir.serde.serialize_function(one).SerializeToString(deterministic=True))
    return notes


def merge_metadata(models: Named, sources: Sequence[ir.Model]) -> Notes:
    """Give the first model what all others have: functions, metadata, devices, and where their weights lie."""
    notes: Notes = []
    host = models[0][1]
    devices = {one.name: one for one in host.device_configurations}
    for name, model in models[1:]:
        for key, function in model.functions.items():
            host.functions.setdefault(key, function)
        for found, target in (
            (model.metadata_props, host.metadata_props),
            (model.graph.metadata_props, host.graph.metadata_props),
        ):
            for label, text in found.items():
                if target.get(label, text) != text:
                    notes.append(
                        (
                            name,
                            f"its metadata '{printable(label)}' differ, and are '{printable(name)}/{printable(label)}'",
                        )
                    )
                    label = f"{name}/{label}"
                target[label] = text
        for one in model.device_configurations:
            if devices.setdefault(one.name, one) != one:
                raise UsageError(f"{printable(name)} has another device configuration '{printable(str(one.name))}'.")
        mark_alike(host.graph, model.graph)
    host.device_configurations = tuple(devices.values())
    external = [path for source in sources for path in source.meta.get("penjing.external", ())]
    host.meta.update(sources[0].meta)
    host.meta["penjing.external"] = list(dict.fromkeys(external))
    return notes
