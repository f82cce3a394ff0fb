"""ONNX's LSTM as ONNX Runtime's DynamicQuantizeLSTM: int8 weights, inputs and states quantized as they come."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ...ir.match import attribute, decline

WEIGHTS = (1, 2)  # the ports of W [directions, 4 * hidden, input] and R [directions, 4 * hidden, hidden]
NO_FORM = {
    "GRU": "ONNX Runtime has no integer GRU",
    "RNN": "ONNX Runtime has no integer RNN",
}
_PORTS = 8  # of LSTM; those of the scales and zero points follow


def check_lstm(node: ir.Node) -> None:
    """Declines where DynamicQuantizeLSTM cannot do what the LSTM does: batch-first layout, unknown options.

    Peepholes, clipping, activations, lengths, initial states and directions it takes as LSTM does.
    """
    if attribute(node, "layout", 0):
        decline("its layout is batch first")
    for name in node.attributes:
        attribute(node, name)


def become_dynamic(node: ir.Node, weights: Sequence[tuple[ir.Value, ir.Value, ir.Value | None]]) -> None:
    """Let an LSTM read integers: for W and R each [directions, input, 4 * hidden], scale and zero point
    [directions, 4 * hidden]."""
    node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    node.attributes.pop("layout", None)
    if "hidden_size" not in node.attributes and weights[1][0].shape is not None:
        node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", int(weights[1][0].shape.numpy()[1]))
    node.resize_inputs(_PORTS + 2 * len(weights))
    for place, (integers, scale, zero_point) in enumerate(weights):
        node.replace_input_with(WEIGHTS[place], integers)
        node.replace_input_with(_PORTS + 2 * place, scale)
        node.replace_input_with(_PORTS + 2 * place + 1, zero_point)
