"""Raise the version of the ONNX operators that a model imports; ``upgrades.py`` knows what changed between versions.

Two converters exist, and neither is used: that of onnx changed the outputs in silence for Hardmax before 13 and linear
or fractional Upsample and Resize before 11, wrote GroupNormalization and Pad of float64 so that they run no more, and
drops functions and metadata; that of onnxscript only stamps what is before 18, and inlines functions. Both serialize
or copy what need not be touched.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from .address import printable
from .constants import new_constant
from .draft import Call, Draft, Operand, Refusal, refuse
from .edit import Names, insert_before
from .errors import PenjingError, UsageError, one_line
from .schemas import form, misfit
from .scopes import Scope, scopes
from .shapes import Dims, Inferred, dims, inferred
from .upgrades import NEWEST, RULES

_MAIN = "main graph"
_SHOWN = 3


class NoConversion(PenjingError):
    """An operator has no exact conversion to the version asked for; the model is as it was."""


@dataclass
class Raised:
    """What ``raise_opset`` did. A place is ``main graph`` or a function's address.

    ``stamps``: places with the version found; ``at_it``: places that needed nothing; ``rewritten``: addresses of nodes
    and what became of them; ``others``: nodes of domains that it knows nothing of, by domain.
    """

    to: int
    stamps: list[tuple[str, int]] = field(default_factory=list)
    at_it: list[str] = field(default_factory=list)
    rewritten: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def newest_opset() -> int:
    """The newest version of the ONNX domain that models can be raised to here."""
    return min(NEWEST, onnx.defs.onnx_opset_version())


def raise_opset(model: ir.Model, to: int) -> Raised:
    """Write the main graph, all bodies and all functions in version ``to`` of the ONNX domain, in place.

    Every conversion is exact. Nodes keep names, outputs, metadata and documentation, weights are not read, and what
    does not change its meaning is not touched. Raises ``UsageError`` for a version that is not known or is below one
    in use; ``NoConversion`` that names the nodes where there is no exact conversion. Then nothing was changed.
    """
    if not 1 <= to <= newest_opset():
        raise UsageError(f"There is no opset {to} to raise to here; the newest that is known is {newest_opset()}.")
    report, found = Raised(to), list(scopes(model))
    for scope in found:
        _note(scope, report)
    drafts = _drafts(model, [scope for scope in found if 0 < scope.version < to], report)
    if drafts:
        names = Names(model)
        for draft, what in drafts:
            report.rewritten.append((draft.scope.address(draft.node), what))
            _write(draft, names)
    for stamp in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        for domain in ("", "ai.onnx"):
            if domain in stamp:
                stamp[domain] = to
    return report


def _note(scope: Scope, report: Raised) -> None:
    """The version of what carries one: the main graph and functions; their bodies have it from them."""
    own = scope.function is not None and scope.function.graph is scope.graph
    if (scope.prefix and not own) or not scope.version:
        return
    place = scope.prefix.removesuffix("/") or _MAIN
    if scope.version > report.to:
        raise UsageError(
            f"{'The function ' + printable(place) if own else 'The model'} is at opset {scope.version}, above "
            f"{report.to}; opsets are raised here, never lowered."
        )
    if scope.version == report.to:
        report.at_it.append(place)
    else:
        report.stamps.append((place, scope.version))


def _drafts(model: ir.Model, found: list[Scope], report: Raised) -> list[tuple[Draft, str]]:
    """Every node that has to say something else, with words for the ledger; the model is only read."""
    facts, drafts = _Facts(model), []
    refused: list[tuple[int, str]] = []
    for scope in found:
        for node in scope.graph:
            if node.op_identifier() in model.functions:
                continue
            if node.domain:
                report.others[node.domain] += 1
                continue
            try:
                draft = _draft(node, scope, report.to, facts)
            except _Stopped as stop:
                refused.append((stop.version, stop.sentence))
            else:
                drafts += [draft] if draft is not None else []
    if refused:
        raise NoConversion(_told(refused, report))
    return drafts


class _Stopped(Exception):
    """A node that cannot be brought to ``version``, as a sentence."""

    def __init__(self, version: int, sentence: str) -> None:
        self.version, self.sentence = version, sentence


def _draft(node: ir.Node, scope: Scope, to: int, facts: _Facts) -> tuple[Draft, str] | None:
    """The node rewritten version by version, or ``None`` where nothing changes but the version."""
    start, place = scope.version, printable(f"{scope.address(node)}: {node.op_type}")
    known = form("", node.op_type, start)
    if known is None:
        raise _Stopped(start + 1, f"{place} is no operator of ONNX at opset {start}.")
    if node.op_type not in _CHANGED:
        return None
    draft, last = Draft(node, scope, to, facts), 0
    for version in range(start + 1, to + 1):
        rule = RULES.get((draft.op_type, version))
        if rule is None:
            continue
        try:
            if not last and (fault := misfit(node, known)):
                refuse(fault)
            rule(draft)
        except Refusal as reason:
            sentence = f"{place} of opset {start} has no exact conversion to {version}: {reason}."
            raise _Stopped(version, sentence) from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise _Stopped(version, f"{place} of opset {start} is not valid: {one_line(error)}.") from error
        last = version
    same = draft.op_type == node.op_type and draft.inputs == list(node.inputs) and draft.attributes == node.attributes
    if same and not draft.output_types:
        return None
    return draft, f"{node.op_type} of opset {start} as {draft.op_type} of {last}"


_CHANGED = {name for name, _ in RULES}


def _told(refused: list[tuple[int, str]], report: Raised) -> str:
    shown = " ".join(sentence for _, sentence in refused[:_SHOWN])
    more = f" And {len(refused) - _SHOWN} more nodes." if len(refused) > _SHOWN else ""
    possible = min(version for version, _ in refused) - 1
    hint = f"; it can be raised to {possible}" if possible > max(version for _, version in report.stamps) else ""
    return f"{shown}{more} The model stays as it was{hint}."


class _Facts:
    """Types and shapes: of the file, else inferred, once, when first asked for."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    @functools.cached_property
    def found(self) -> dict[ir.Value, Inferred]:
        try:
            return inferred(self.model)
        except Exception:  # inference refuses some models that are valid; then only what the file says is known
            return {}

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        if value.dtype is not None:
            return value.dtype
        answer = self.found.get(value)
        return answer.type.dtype if answer is not None and isinstance(answer.type, ir.TensorType) else None

    def dims(self, value: ir.Value) -> Dims | None:
        if value.shape is not None:
            return dims(value)
        answer = self.found.get(value)
        return None if answer is None else answer.dims


# Writing -------------------------------------------------------------------------------------------------------------


def _write(draft: Draft, names: Names) -> None:
    """Let the node say what its draft says; new nodes stand before it, under names derived from its own."""
    node, made = draft.node, dict[Call, ir.Value]()
    stem = node.name or node.op_type
    nodes: list[ir.Node] = []
    inputs = [_value(operand, draft.scope, stem, names, made, nodes) for operand in draft.inputs]
    while inputs and inputs[-1] is None:
        inputs.pop()
    insert_before(node, nodes, names)
    node.op_type = draft.op_type
    for output, type_ in draft.output_types.items():
        output.type = type_
    node.attributes.clear()
    node.attributes.update(draft.attributes)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _value(
    operand: Operand, scope: Scope, stem: str, names: Names, made: dict[Call, ir.Value], nodes: list[ir.Node]
) -> ir.Value | None:
    if not isinstance(operand, Call):
        return operand
    if operand in made:
        return made[operand]
    inputs = [_value(inner, scope, stem, names, made, nodes) for inner in operand.inputs]
    name = names.fresh(f"{stem}_{operand.word or operand.op_type}")
    if operand.op_type == "Constant" and not operand.attributes[0].is_ref():
        made[operand], node = new_constant(scope, operand.attributes[0].value, name)
        if node is None:
            scope.graph.register_initializer(made[operand])
    else:
        made[operand] = ir.Value(name=name)
        node = ir.Node("", operand.op_type, inputs, operand.attributes, outputs=[made[operand]], name=name)
    nodes += [node] if node is not None else []
    return made[operand]
