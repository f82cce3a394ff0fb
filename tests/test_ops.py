"""The table of operators against the schemas of ONNX and of ONNX Runtime, and the channel axes it gives."""

from collections.abc import Callable

import onnx.defs
import onnx_ir as ir
import pytest

from penjing.ir.ops import OPERATORS, Axes, Kind, Operator, is_random, operator

Parse = Callable[[str], ir.Model]


def schema_inputs(entry: Operator) -> list[str] | None:
    if entry.domain == "" and onnx.defs.has(entry.name):
        return [port.name for port in onnx.defs.get_schema(entry.name).inputs]
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    found = [s for s in get_all_operator_schema() if (s.domain, s.name) == (entry.domain, entry.name)]
    return [port.name for port in max(found, key=lambda s: s.since_version).inputs] if found else None


def test_ports_are_those_of_the_schemas() -> None:
    for entry in OPERATORS.values():
        if entry.ports:
            found, known = schema_inputs(entry), [port.name for port in entry.ports]
            both = min(len(found or ()), len(known))  # newer versions add optional inputs at the end
            assert both
            assert known[:both] == (found or [])[:both], entry.name
            assert [port.index for port in entry.ports] == list(range(len(entry.ports)))


def test_every_operator_exists() -> None:
    assert [entry.name for entry in OPERATORS.values() if schema_inputs(entry) is None] == []


def test_every_onnx_operator_is_in_the_table() -> None:
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert [name for name in sorted(names) if ("", name) not in OPERATORS] == []


def test_scales_and_zero_points_belong_to_their_weight() -> None:
    for entry in OPERATORS.values():
        for port in entry.matrices:
            for kind, index in ((Kind.SCALE, port.scale), (Kind.ZERO_POINT, port.zero_point)):
                if index is not None:
                    assert entry.port(index).kind is kind
                    assert entry.port(index).name.lower().startswith(port.name.lower()[0]), (entry.name, port.name)


def node(op_type: str, domain: str = "", **attributes: object) -> ir.Node:
    return ir.node(op_type, [], attributes, domain=domain)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "port", "rank", "expected"),
    [
        (node("Conv", group=4), 1, 4, Axes(0, 1, 4)),
        (node("ConvTranspose"), 1, 4, Axes(1, 0, 1)),
        (node("Gemm"), 1, 2, Axes(1, 0)),
        (node("Gemm", transB=1), 1, 2, Axes(0, 1)),
        (node("Gemm"), 0, 2, Axes(0, 1)),
        (node("Gemm", transA=1), 0, 2, Axes(1, 0)),
        (node("MatMul"), 1, 3, Axes(2, 1)),
        (node("MatMul"), 0, 2, Axes(0, 1)),
        (node("MatMul"), 1, 1, Axes(None, 0)),
        (node("QLinearMatMul"), 0, 2, Axes(0, 1)),
        (node("QLinearMatMul"), 3, 2, Axes(1, 0)),
        (node("QGemm", "com.microsoft", transB=1), 3, 2, Axes(0, 1)),
        (node("FusedMatMul", "com.microsoft", transB=1), 1, 3, Axes(1, 2)),
        (node("FusedMatMul", "com.microsoft", transBatchB=1), 1, 3, Axes()),
        (node("LSTM"), 2, 3, Axes(1, 2)),
        (node("DynamicQuantizeLSTM", "com.microsoft"), 1, 3, Axes(2, 1)),
        (node("Attention", "com.microsoft"), 1, 2, Axes(1, 0)),
        (node("Einsum", equation="bsd,de->bse"), 1, 2, Axes(1, 0)),
        (node("Einsum", equation="ed, bsd"), 0, 2, Axes(0, 1)),
        (node("Einsum", equation="...d,de->...e"), 1, 2, Axes(1, 0)),
        (node("Einsum", equation="bshd,hde->bse"), 1, 3, Axes(2, None)),  # two contracted labels
        (node("Einsum", equation="gbd,gde->gbe"), 1, 3, Axes(2, 1)),
    ],
)
def test_axes(made: ir.Node, port: int, rank: int, expected: Axes) -> None:
    assert operator(made).port(port).axes(made, rank) == expected


def test_flags() -> None:
    assert operator(node("Add")).commutative
    assert not operator(node("Sub")).commutative
    assert operator(node("Relu")).elementwise == "unary"
    assert operator(node("Transpose")).moves
    assert operator(node("Loop")).control
    assert operator(node("Conv")).bias == 2
    assert operator(node("Gemm")).integer is not None
    assert operator(node("ConvTranspose")).integer is None
    assert operator(node("Concat")).port(7).kind is Kind.OPERAND


def test_an_unknown_operator_knows_nothing() -> None:
    unknown = operator(node("Conv", "other.domain"))
    assert not unknown.known
    assert unknown.port(1).kind is Kind.UNKNOWN
    assert unknown.matrices == ()


def test_random(parse: Parse) -> None:
    text = """g (float[2] x, bool t) => (float[2] d, float[2] e, float[2] r) {
        ratio = Constant <value_float = 0.5> ()
        d = Dropout (x, ratio)
        e = Dropout (x, ratio, t)
        r = RandomNormalLike (x)
    }"""
    assert [is_random(made) for made in parse(text).graph] == [False, False, True, True]
