"""The float model behind a quantized one, which of its layers each quantized layer was, and what its values are.

A pass that quantizes calls ``remember`` before its first edit; passes that mend what rounding did ask ``original``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ...ir.address import graphs
from ...ir.errors import NeedsData
from ...ir.ops import Kind
from ...ir.shapes import infer_shapes
from ...ir.trace import Use
from ...ir.weights import Weight, weights
from ..base import Context
from ..rewrite import rewrite
from .activations import division_by_constant
from .plan import factor_rule

_KEY = "penjing.float"  # in a model's meta, which lives in memory only
_PARTNER = "original"


def remember(model: ir.Model) -> None:
    """Keep a copy of the float ``model``, which is about to be quantized, with it; its weights are shared.

    Where one is kept already, of the part that was quantized before, that stays.
    """
    if _KEY not in model.meta:
        model.meta[_KEY] = model.clone()


def original(model: ir.Model, ctx: Context) -> ir.Model:
    """The float model that ``model`` was quantized from: as remembered, else the partner ``original``.

    Raises ``NeedsData`` where there is neither.
    """
    if ctx.has("models") and _PARTNER in ctx.models:
        return _as_quantized(ctx.models[_PARTNER], model)
    found = model.meta.get(_KEY)
    if not isinstance(found, ir.Model):
        raise NeedsData(
            f"{ctx.step} needs the float model too: put it in one pipeline behind the pass that quantizes, or give the "
            f"model before quantization with --with {_PARTNER}=MODEL."
        )
    return found


def _as_quantized(partner: ir.Model, model: ir.Model) -> ir.Model:
    """The ``partner`` with a factor of its image in the weight of the first layer, where ``model`` has it there."""
    trial, own = partner.clone(), Context()
    infer_shapes(trial)
    rewrite(trial, [division_by_constant], own)
    names = {node.name for node in model.graph}
    return trial if rewrite(trial, [factor_rule(but=names)], own) else partner


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight is stored in integers, and the same layer of the float model.

    ``use`` and ``twin_use`` say how the layer reads ``weight`` (integers with a known scale) and ``twin`` (floats);
    the nodes are ``use.node`` and ``twin_use.node``. ``address`` is the node's.
    """

    address: str
    weight: Weight
    use: Use
    twin: Weight
    twin_use: Use

    @property
    def data(self) -> int:
        """The port at which the layer reads activations."""
        return 1 - self.use.port if self.use.port < 2 else 0


def quantized_layers(model: ir.Model, float_model: ir.Model) -> Iterator[Layer | tuple[str, str]]:
    """Each use of a quantized weight as a layer; for one without a twin in ``float_model``, its address and the reason.

    Layers are the same where the operator and the node's name are, or its first output's where it has no name.
    """
    places, twins = _places(model), {place: node for node, place in _places(float_model).items()}
    uses = {(use.node, use.port): (weight, use) for weight in weights(float_model) for use in weight.uses}
    for weight in weights(model):
        for use in weight.uses:
            if use.quantization is None or use.kind is not Kind.MATRIX:
                continue
            address = places.get(use.node)
            twin = None if address is None else twins.get(address)
            if address is None or twin is None or twin.op_identifier() != use.node.op_identifier():
                yield use.node.name or weight.address, "the float model has no such layer"
                continue
            found = uses.get((twin, use.port))
            if found is None or found[1].quantization is not None or not found[0].dtype.is_floating_point():
                yield address, "its weight is not a constant of floats in the float model"
            else:
                yield Layer(address, weight, use, *found)


def _places(model: ir.Model) -> dict[ir.Node, str]:
    """The address of each node that has one to itself."""
    found = [
        (node, prefix + (node.name or node.outputs[0].name or ""))
        for prefix, graph in graphs(model)
        for node in graph
        if node.outputs
    ]
    counts = Counter(place for _, place in found)
    return {node: place for node, place in found if counts[place] == 1}
