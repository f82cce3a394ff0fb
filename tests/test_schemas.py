"""What the operators' schemas ask of nodes, in the sentences of the verifier."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from penjing.ir.verify import problems

Parse = Callable[[str], ir.Model]


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ("y = Relu(x, x)", "Relu: Relu has 2 inputs, and takes 1."),
        ("y = Add(x)", "Add: Add has 1 inputs, and takes 2."),
        ("y = Slice(x, x)", "Slice: Slice has 2 inputs, and takes 3 to 5."),
        ("y = Concat<axis = 0>()", "Concat: Concat has 0 inputs, and takes at least 1."),
        ("y, z = Relu(x)", "Relu: Relu has 2 outputs, and takes 1."),
        ("y = Add(x, )", "Add: input 1 of Add cannot be left out."),
        ("y = Cast(x)", "Cast: Cast lacks the attribute 'to'."),
        ('y = Cast<to = "float">(x)', "Cast: the attribute 'to' of Cast has the type STRING, not INT."),
        ("y = Constant()", "Constant: Constant has 0 attributes, and takes one, its value."),
        ("y = Constant<axis = 1>()", "Constant: Constant has 1 attributes, and takes one, its value."),
        (
            "y = Constant<value_int = 1, value_float = 1.0>()",
            "Constant: Constant has 2 attributes, and takes one, its value.",
        ),
        (
            "y = Relu<body = b () => (float[1] z) { z = Identity (x) }>(x)",
            "Relu: Relu has no attribute 'body', and so no use for a graph in it.",
        ),
    ],
)
def test_what_an_operator_takes(parse: Parse, nodes: str, sentence: str) -> None:
    model = parse(f"g (float[1] x) => (float[1] y) {{ {nodes.replace('(x, )', '(x, x)')} }}")
    if "(x, )" in nodes:
        model.graph[0].replace_input_with(1, None)
    assert problems(model) == [sentence]


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Nothing<a = 1>(x, x, x)",  # who knows
        "y = com.microsoft.Gelu(x, x)",
        "y = Clip(x, , x)",
        "y = Clip(x)",
        "y = Sum(x, x, x, x, x)",
        "y = Relu<unknown = 1>(x)",  # no pass is led astray by it
        "y = Constant<value_floats = [1.0]>()",
    ],
)
def test_what_is_not_refused(parse: Parse, nodes: str) -> None:
    text = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> '
    assert problems(parse(f"{text} g (float[1] x) => (float[1] y) {{ {nodes} }}")) == []


def test_the_schema_is_that_of_the_opset_and_not_of_a_function(parse: Parse) -> None:
    old = '<ir_version: 8, opset_import: ["": 5]> g (float[1] x) => (float[1] y) { y = Cast<to = "FLOAT">(x) }'
    assert problems(parse(old)) == []
    own = """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
        g (float[1] x) => (float[1] y) { y = ai.onnx.ml.Binarizer(x, x) }
        <domain: "ai.onnx.ml", opset_import: ["": 17]> Binarizer (a, b) => (c) { c = Add(a, b) }"""
    assert problems(parse(own)) == []


def test_attributes_of_functions_may_be_references(parse: Parse) -> None:
    text = """<ir_version: 10, opset_import: ["": 17, "l": 1]>
        g (float[1] x) => (float[1] y) { y = l.cast<kind = 1>(x) }
        <domain: "l", opset_import: ["": 17]> cast <kind> (a) => (b) { b = Cast<to: int = @kind>(a) }"""
    assert problems(parse(text)) == []
    wrong = text.replace("to: int", "to: float")
    assert problems(parse(wrong)) == ["l::cast/Cast: the attribute 'to' of Cast has the type FLOAT, not INT."]
