"""All of the ONNX language: a small model for each feature, through load, verify, text, every clean pass and save.

Most models hold work for a pass at the feature itself: an Identity in a body, a constant to fold in a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from reliability.differences import differences

import penjing
from penjing.ir.edit import Names, prefix, rename
from penjing.ir.errors import BadFeeds, BadFile
from penjing.ir.files import load, save
from penjing.ir.maps import MapType
from penjing.ir.sparse import SparseTensor
from penjing.ir.summary import summarize
from penjing.ir.tensors import tensors
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.compare import Judge
from penjing.runtime.draws import random_feeds
from penjing.runtime.session import OrtRunner, why_not_runnable

PASSES = [str(pass_) for pass_, _ in Pipeline.parse("clean,strip-metadata").steps()]
ROUNDS = 2  # passes of the ROUNDING kind among them


@dataclass(frozen=True)
class Feature:
    """A model with what its text must hold, the passes that find work in it, and whether ONNX Runtime runs it."""

    make: Callable[[], ModelProto]
    words: tuple[str, ...]
    work: tuple[str, ...] = ("remove-identities",)
    runs: bool = True


FEATURES: dict[str, Feature] = {}


def feature(
    *words: str, work: tuple[str, ...] = ("remove-identities",), runs: bool = True
) -> Callable[[Callable[[], ModelProto]], Callable[[], ModelProto]]:
    def keep(make: Callable[[], ModelProto]) -> Callable[[], ModelProto]:
        FEATURES[make.__name__] = Feature(make, words, work, runs)
        return make

    return keep


def parsed(graph: str, head: str = 'ir_version: 8, opset_import: ["": 17]', functions: str = "") -> ModelProto:
    return parser.parse_model(f"<{head}> {graph} {functions}")


# Bodies ---------------------------------------------------------------------------------------------------------------


@feature("then: inner", "else: outer", "%kept", "%i = Identity(%x)", work=("remove-identities", "fold-constants"))
def if_with_captured_values() -> ModelProto:
    return parsed(
        """g (bool c, float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}> {
            kept = Relu(x)
            y = If (c) <then_branch = inner () => (float[N, 2] a) {
                    i = Identity(x) two = Constant<value = float[1] {2.0}>() v = Mul(w, two) j = Add(i, v)
                    a = Add(j, kept) },
                else_branch = outer () => (float[N, 2] b) { b = Identity(kept) }>
        }"""
    )


@feature("body: loop", "%captured")
def loop_with_captured_values() -> ModelProto:
    return parsed(
        """g (float[2] x) => (float[2] y, float[K, 2] all) <int64 n = {3}, bool go = {1}> {
            captured = Neg(x)
            y, all = Loop (n, go, x) <body = loop (int64 i, bool k, float[2] s) => (bool k2, float[2] s2, float[2] o) {
                k2 = Identity(k) a = Identity(s) s2 = Add(a, captured) o = Sub(s, captured) }>
        }"""
    )


@feature("body: scan", "num_scan_inputs=1")
def scan() -> ModelProto:
    return parsed(
        """g (float[2] start, float[3, 2] rows) => (float[2] end, float[3, 2] sums) {
            end, sums = Scan <num_scan_inputs = 1, body = scan (float[2] s, float[2] r) => (float[2] t, float[2] o) {
                i = Identity(r) t = Add(s, i) o = Mul(t, r) }> (start, rows)
        }"""
    )


@feature("then: one", "then: two", "%deep")
def bodies_in_bodies() -> ModelProto:
    return parsed(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = one () => (float[2] a) {
                    a = If (c) <then_branch = two () => (float[2] p) { deep = Identity(x) p = Relu(deep) },
                        else_branch = three () => (float[2] q) { q = Neg(x) }> },
                else_branch = four () => (float[2] b) { b = Abs(x) }>
        }"""
    )


@feature("branches.0", "branches.1", runs=False)
def lists_of_bodies() -> ModelProto:
    bodies = [
        parsed(f"b{place} () => (float[2] o{place}) {{ i{place} = Identity(x) o{place} = Relu(i{place}) }}").graph
        for place in range(2)
    ]
    proto = parsed(
        "g (float[2] x) => (float[2] y) { y = custom.Choose(x) }", 'ir_version: 8, opset_import: ["": 17, "custom": 1]'
    )
    proto.graph.node[0].attribute.append(helper.make_attribute("branches", bodies))
    return proto


# Functions ------------------------------------------------------------------------------------------------------------

LOCAL = 'ir_version: 10, opset_import: ["": 17, "local": 1]'


@feature("function local::Twice(%a) -> (%c)", "= local::Twice(%x)", work=("remove-identities", "fold-constants"))
def function() -> ModelProto:
    return parsed(
        "g (float[2] x) => (float[2] y) { y = local.Twice(x) }",
        LOCAL,
        """<domain: "local", opset_import: ["": 17]> Twice (a) => (c) {
            i = Identity(a) one = Constant<value = float[1] {1.0}>() two = Add(one, one) c = Mul(i, two) }""",
    )


@feature("function local::Act:soft", "function local::Act:hard", "local::Act:soft(", "local::Act:hard(")
def overloads() -> ModelProto:
    proto = parsed(
        "g (float[2] x) => (float[2] y) { h = local.Act(x) y = local.Act(h) }",
        LOCAL,
        """<domain: "local", opset_import: ["": 17], overload: "soft"> Act (a) => (b) { b = Softplus(a) }
        <domain: "local", opset_import: ["": 17], overload: "hard"> Act (a) => (b) { i = Identity(a) b = Relu(i) }""",
    )
    for node, overload in zip(proto.graph.node, ("soft", "hard"), strict=True):
        node.overload = overload
    return proto


@feature("{alpha=2.0, beta}", "alpha=@alpha", "beta=0.5")
def attributes_with_defaults() -> ModelProto:
    return parsed(
        "g (float[2] x) => (float[2] y) { y = local.Scaled <beta = 0.5> (x) }",
        LOCAL,
        """<domain: "local", opset_import: ["": 17]> Scaled <beta, alpha: float = 2.0> (a) => (c) {
            i = Identity(a) e = Elu<alpha: float = @alpha>(i) b = Constant<value_float: float = @beta>()
            c = Mul(e, b) }""",
    )


@feature("= local::Inner(%i)", "function local::Outer")
def functions_that_call_functions() -> ModelProto:
    return parsed(
        "g (float[2] x) => (float[2] y) { y = local.Outer(x) }",
        LOCAL,
        """<domain: "local", opset_import: ["": 17, "local": 1]> Outer (a) => (b) { i = Identity(a) b = local.Inner(i) }
        <domain: "local", opset_import: ["": 17]> Inner (a) => (b) { b = Relu(a) }""",
    )


@feature("%h: float32[N,2] = Relu", work=("fold-constants",))
def types_in_functions() -> ModelProto:
    proto = parsed(
        "g (float[N, 2] x) => (float[N, 2] y) { y = local.F(x) }",
        LOCAL,
        """<domain: "local", opset_import: ["": 17]> F (a) => (b) {
            h = Relu(a) p = Constant<value = int64[2] {0, 1}>() q = Cast<to = 1>(p) b = Add(h, q) }""",
    )
    proto.functions[0].value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 2]))
    return proto


@feature("%h: float32[N,2] = Relu")
def types_in_functions_before_they_could_have_them() -> ModelProto:
    """Up to IR version 9 exporters write them into the main graph, as ``domain::Function/value``."""
    proto = parsed(
        "g (float[N, 2] x) => (float[N, 2] y) { y = local.F(x) }",
        LOCAL.replace("10", "9"),
        '<domain: "local", opset_import: ["": 17]> F (a) => (b) { h = Relu(a) i = Identity(h) b = Neg(i) }',
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("local::F/h", TensorProto.FLOAT, ["N", 2]))
    return proto


@feature("function local::Choose", "then: t")
def bodies_in_functions() -> ModelProto:
    return parsed(
        "g (bool c, float[2] x) => (float[2] y) { y = local.Choose(c, x) }",
        LOCAL,
        """<domain: "local", opset_import: ["": 17]> Choose (c, a) => (b) {
            b = If (c) <then_branch = t () => (p) { i = Identity(a) p = Relu(i) },
                else_branch = e () => (q) { q = Neg(a) }> }""",
    )


# Types ----------------------------------------------------------------------------------------------------------------


@feature("sequence(float32[N])")
def sequences() -> ModelProto:
    return parsed(
        """g (float[N] x) => (seq(float[N]) s, float[M] y) {
            i = Identity(x) s = SequenceConstruct(i, x) y = ConcatFromSequence<axis = 0>(s) }"""
    )


@feature("optional(float32[2])", "optional(sequence(float32[2]))", work=())
def optionals() -> ModelProto:
    none = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    proto = parsed(
        """g (optional(float[2]) o, optional(seq(float[2])) s) => (bool there, float[2] y) {
            there = OptionalHasElement(o) e = Optional() l = OptionalGetElement(s)
            z = Constant<value = int64 {0}>() y = SequenceAt(l, z) }"""
    )
    proto.graph.node[1].attribute.append(helper.make_attribute("type", none))
    del proto.graph.node[1]  # the checker of onnx wants it; ONNX Runtime does not
    return proto


ML = 'ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]'
TABLE = helper.make_sequence_type_proto(
    helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
)


@feature("sequence(map(int64, float32[]))")
def maps() -> ModelProto:
    proto = parsed(
        """g (float[N, 3] x) => (float[N] y) {
            i = Identity(x) n = ai.onnx.ml.Normalizer<norm = "L1">(i)
            p = ai.onnx.ml.ZipMap<classlabels_int64s = [10, 20, 30]>(n) }""",
        ML,
    )
    proto.graph.output[0].CopyFrom(helper.make_value_info("p", TABLE))
    return proto


@feature("map(string, float32[])", "Map")
def maps_as_inputs() -> ModelProto:
    proto = parsed(
        """g (float x) => (float[1, 2] y) {
            d = ai.onnx.ml.DictVectorizer<string_vocabulary = ["a", "b"]>(x) y = Identity(d) }""",
        ML,
    )
    held = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    proto.graph.input[0].type.CopyFrom(helper.make_map_type_proto(TensorProto.STRING, held))
    proto.graph.name = "Map"
    return proto


@feature("then: t() -> (%p: sequence(map(int64, float32[])))", "type=sequence(map(int64, float32[]))", runs=False)
def maps_in_bodies_functions_and_attributes() -> ModelProto:
    proto = parsed(
        """g (bool c, float[N, 3] x) => (float[N] y) {
            y = If (c) <then_branch = t () => (float[N] p) {
                    i = Identity(x) p = ai.onnx.ml.ZipMap<classlabels_int64s = [1, 2, 3]>(i) },
                else_branch = e () => (float[N] q) { q = local.Zip(x) }>
            o = Optional() }""",
        'ir_version: 10, opset_import: ["": 17, "ai.onnx.ml": 3, "local": 1]',
        """<domain: "local", opset_import: ["": 17, "ai.onnx.ml": 3]> Zip (a) => (b) {
            h = ai.onnx.ml.ZipMap<classlabels_int64s = [1, 2, 3]>(a) b = Identity(h) }""",
    )
    proto.graph.output[0].type.CopyFrom(TABLE)
    for attribute in proto.graph.node[0].attribute:
        attribute.g.output[0].type.CopyFrom(TABLE)
    proto.functions[0].value_info.append(helper.make_value_info("h", TABLE))
    proto.graph.node[1].attribute.append(helper.make_attribute("type", TABLE))
    proto.graph.output.append(helper.make_value_info("o", helper.make_optional_type_proto(TABLE)))
    return proto


@feature("string[N]", "= ['a', 'é', '']")
def strings() -> ModelProto:
    proto = parsed(
        "g (string[N] x, string[3] z) => (string[N] y, bool[3] e) { y = Identity(x) e = Equal(z, w) }", LOCAL
    )
    proto.opset_import[0].version = 19
    proto.graph.initializer.append(helper.make_tensor("w", TensorProto.STRING, [3], ["a", "é", ""]))
    proto.graph.node.insert(0, helper.make_node("Identity", ["w"], ["v"]))
    proto.graph.node[2].input[1] = "v"
    return proto


KINDS = [
    *("FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"),
    *("FLOAT4E2M1", "FLOAT6E2M3", "FLOAT6E3M2", "INT2", "UINT2", "INT4", "UINT4", "COMPLEX64", "COMPLEX128"),
]
OPSETS = {"FLOAT4E2M1": 23, "FLOAT8E8M0": 24, "INT2": 25, "UINT2": 25, "FLOAT6E2M3": 27, "FLOAT6E3M2": 27}
NOT_RUN = {
    "INT2",
    "UINT2",
    "INT4",
    "UINT4",
    "FLOAT8E8M0",
    "FLOAT4E2M1",
    "FLOAT6E2M3",
    "FLOAT6E3M2",
    "COMPLEX64",
    "COMPLEX128",
}


def elements(kind: str) -> ModelProto:
    """An initializer and a Constant of this type behind an Identity, both outputs."""
    dtype = ir.DataType[kind]
    array = np.array([0.5, 1, 1.5, 1, 1] if dtype.is_floating_point() else [0, 1, 1, 0, 1]).astype(dtype.numpy())
    proto = parsed(
        "g (float x) => (float y, float z) {i = Identity(w) y = Identity(i) c = Constant() j = Identity(c) z = Neg(x)}",
        f'ir_version: {14 if "FLOAT6" in kind else 13}, opset_import: ["": {OPSETS.get(kind, 21)}]',
    )
    held = ir.serde.serialize_tensor(ir.Tensor(array, dtype=dtype, name="w"))
    proto.graph.initializer.append(held)
    held.name = ""
    proto.graph.node[2].attribute.append(helper.make_attribute("value", held))
    proto.graph.output[0].type.tensor_type.elem_type = int(dtype)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", int(dtype), [5]))
    return proto


for kind_ in KINDS:
    word = str(ir.DataType[kind_].numpy())
    FEATURES[f"elements_{kind_.lower()}"] = Feature(
        lambda kind_=kind_: elements(kind_),  # type: ignore[misc]
        (f"%y: {word}[5]", f"%w: {word}[5] = ["),
        ("remove-dead-code", "remove-identities"),
        kind_ not in NOT_RUN,
    )


# Constants ------------------------------------------------------------------------------------------------------------


def sparse(array: np.ndarray, name: str = "") -> onnx.SparseTensorProto:
    at = np.argwhere(array)
    values = numpy_helper.from_array(array[tuple(at.T)], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(at.astype(np.int64), "at"), array.shape)


@feature("%w: float32[4,4] = sparse {5: 3.0, 14: -1.0}", "%c = Constant() {value=float32[4,4] sparse {0: 2.0}}")
def sparse_constants() -> ModelProto:
    body = "then_branch = t () => (float[4, 4] p) { c = Constant() k = Identity(c) p = Add(k, x) }"
    proto = parsed(
        f"""g (bool b, float[4, 4] x) => (float[4, 4] y) {{
            a = MatMul(x, w) i = Identity(a)
            j = If (b) <{body}, else_branch = e () => (float[4, 4] q) {{ q = Mul(x, w2) }}> y = Add(i, j) }}"""
    )
    array = np.zeros((4, 4), np.float32)
    array[1, 1], array[3, 2] = 3, -1
    proto.graph.sparse_initializer.append(sparse(array, "w"))
    proto.graph.node[2].attribute[1].g.sparse_initializer.append(sparse(array.T, "w2"))
    constant = np.zeros((4, 4), np.float32)
    constant[0, 0] = 2
    held = proto.graph.node[2].attribute[0].g.node[0]
    held.attribute.append(helper.make_attribute("sparse_value", sparse(constant)))
    return proto


@feature("(%x: float32[2], %w: float32[2])", "%w: float32[2] = [1.0, 2.0]")
def inputs_with_defaults() -> ModelProto:
    proto = parsed("g (float[2] x, float[2] w) => (float[2] y) { i = Identity(w) y = Add(x, i) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2]), "w"))
    return proto


# Operators and names --------------------------------------------------------------------------------------------------


@feature("custom::Op(%i, _, %x)", "own=[1, 2]", runs=False)
def custom_domains() -> ModelProto:
    return parsed(
        "g (float[2] x) => (float[2] y) { i = Identity(x) y = custom.Op<own = [1, 2]>(i, , x) }",
        'ir_version: 8, opset_import: ["": 17, "custom": 3]',
    )


@feature("com.microsoft::FusedMatMul(%x, %i)", "com.microsoft::Gelu(")
def contrib_operators() -> ModelProto:
    return parsed(
        """g (float[2, 2] x) => (float[2, 2] y) {
            i = Identity(x) m = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(x, i) y = com.microsoft.Gelu(m) }""",
        'ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]',
    )


@feature("Clip(%x, _, %high)", "_, %last = GRU(%i, %w, %w, _, _, %h)", work=("remove-dead-code", "remove-identities"))
def names_left_out() -> ModelProto:
    proto = parsed(
        """g (float[1, 1, 2] x) => (float[1, 1, 2] y, float[1, 1, 2] last) <float high = {0.5}> {
            y = Clip(x, , high) i = Identity(x) h = Neg(x) all, last = GRU<hidden_size = 2>(i, w, w, , , h)
            u, v = Split<axis = 2>(x) }"""
    )
    proto.graph.initializer.append(
        numpy_helper.from_array(np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 6, 2), "w")
    )
    proto.graph.node[3].output[0] = ""
    return proto


@feature("%q: int4[2,2] = [1, -8, 7, 0]", "DequantizeLinear(%i, %s, %z)")
def quantized_to_four_bits() -> ModelProto:
    proto = parsed(
        """g (float[1, 2] x) => (float[1, 2] y) <float s = {0.5}> {
            i = Identity(q) d = DequantizeLinear(i, s, z) y = MatMul(x, d) }""",
        'ir_version: 10, opset_import: ["": 21]',
    )
    proto.graph.initializer.append(helper.make_tensor("q", TensorProto.INT4, [2, 2], [1, -8, 7, 0]))
    proto.graph.initializer.append(helper.make_tensor("z", TensorProto.INT4, [], [1]))
    return proto


@feature('%"a b"', '%"\\n"', work=("remove-identities", "unify-names"))
def nodes_without_names_and_odd_names() -> ModelProto:
    proto = parsed("g (float[2] x) => (float[2] y) { h = Identity(x) i = Relu(h) j = Neg(i) y = Abs(j) }")
    proto.graph.node[1].output[0] = proto.graph.node[2].input[0] = "a b"
    proto.graph.node[2].output[0] = proto.graph.node[3].input[0] = "\n"
    return proto


@feature("# same", work=("unify-names",), runs=False)
def nodes_of_one_name() -> ModelProto:
    proto = parsed("g (float[2] x) => (float[2] y) { i = Relu(x) y = Neg(i) }")
    proto.graph.node[0].name = proto.graph.node[1].name = "same"
    return proto


@feature("%x: float32[batch,?,sequence,2]", "(%y: float32[batch,?,sequence,1])", work=("infer-shapes",))
def dimensions_by_name() -> ModelProto:
    return parsed(
        "g (float[batch, ?, sequence, 2] x) => (float[batch, ?, sequence, 1] y) {"
        "r = Relu(x) y = ReduceMean<axes = [3]>(r) }"
    )


# Notes ----------------------------------------------------------------------------------------------------------------


@feature(
    *("producer 'me 1.0'", "metadata author = 'someone'", "doc 'of the model'", "doc 'of the graph'"),
    *("doc 'of a node'", "doc 'of a function'", "%x: doc 'of an input' meta {k='v'}", "%h: doc 'of a value'"),
    *("meta {n='1'}", "meta {g='1'}", "meta {f='1'}"),
    work=("remove-identities", "strip-metadata"),
)
def metadata_and_doc_strings() -> ModelProto:
    proto = parsed(
        "g (float[2] x) => (float[2] y) { h = local.F(x) i = Identity(h) y = Neg(i) }",
        LOCAL,
        '<domain: "local", opset_import: ["": 17]> F (a) => (b) { b = Relu(a) }',
    )
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "me", "1.0", "org", 7
    proto.doc_string, proto.graph.doc_string, proto.graph.node[0].doc_string = (
        "of the model",
        "of the graph",
        "of a node",
    )
    proto.metadata_props.add(key="author", value="someone")
    proto.graph.metadata_props.add(key="g", value="1")
    proto.graph.node[0].metadata_props.add(key="n", value="1")
    proto.functions[0].metadata_props.add(key="f", value="1")
    proto.functions[0].doc_string = "of a function"
    proto.graph.input[0].doc_string = "of an input"
    proto.graph.input[0].metadata_props.add(key="k", value="v")
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [2], "of a value"))
    return proto


def annotate(graph: onnx.GraphProto, name: str, **roles: str) -> None:
    annotation = graph.quantization_annotation.add(tensor_name=name)
    for role, value in roles.items():
        annotation.quant_parameter_tensor_names.add(key=role, value=value)


@feature("%h: quantized {SCALE_TENSOR=%scale, ZERO_POINT_TENSOR=%zero}", work=("remove-identities", "merge-duplicates"))
def quantization_annotations() -> ModelProto:
    proto = parsed(
        """g (float[2] x) => (float[2] y) <float scale = {0.5}, uint8 zero = {3}, float[2] a = {1, 2},
            float[2] b = {1, 2}> { h = Relu(x) i = Identity(h) j = Add(i, a) y = Mul(j, b) }"""
    )
    annotate(proto.graph, "h", SCALE_TENSOR="scale", ZERO_POINT_TENSOR="zero")
    return proto


@feature("devices pair: 2 [gpu0, gpu1]", "on pair {stage 1, %h #")
def device_configurations() -> ModelProto:
    proto = parsed(
        "g (float[2] x) => (float[2] y) { h = Relu(x) i = Identity(h) y = Neg(i) }",
        'ir_version: 11, opset_import: ["": 23]',
    )
    proto.configuration.add(name="pair", num_devices=2, device=["gpu0", "gpu1"])
    for node, split in ((proto.graph.node[0], "h"), (proto.graph.node[2], "i")):
        spec = node.device_configurations.add(configuration_id="pair", pipeline_stage=1).sharding_spec.add()
        spec.tensor_name = split
        spec.device.extend([0, 1])
        spec.sharded_dim.add(axis=0).simple_sharding.add(dim_value=2, num_shards=2)
    return proto


# What holds for all of them -------------------------------------------------------------------------------------------


def checked(path: Path) -> bool:
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def written(proto: ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def feeds_of(model: ir.Model) -> Iterable[dict[str, Any]]:
    """Random ones, or by hand where none are drawn for the type."""
    kinds = {value.name: value.type for value in model.graph.inputs}
    if isinstance(kinds.get("x"), MapType):
        return [{"x": {"b": 2.0, "c": 1.0}}]
    if "o" in kinds:
        return [{"o": None, "s": [np.float32([1, 2])]}]
    return random_feeds(model, 0)


@pytest.mark.parametrize("name", FEATURES)
def test_load_verify_text_save(name: str, tmp_path: Path) -> None:
    case = FEATURES[name]
    path, again = written(case.make(), tmp_path), tmp_path / "again.onnx"
    model = load(path)
    verify(model)
    shown = text(model)
    for word in case.words:
        assert word in shown
    summarize(model)
    save(model, again)
    assert [str(found) for found in differences(onnx.load(path), onnx.load(again)) if found.why is None] == []
    assert text(load(again)) == shown == text(model.clone())
    assert checked(again) or not checked(path)


@pytest.mark.parametrize("name", FEATURES)
def test_every_clean_pass(name: str, tmp_path: Path) -> None:
    case = FEATURES[name]
    path, after = written(case.make(), tmp_path), tmp_path / "after.onnx"
    original, sound = load(path), checked(path)
    before = text(original, digests=True)
    feeds = feeds_of(original) if case.runs else None
    expected = list(OrtRunner().run(original, feeds)) if feeds else []
    for pass_ in [*PASSES, "clean"]:
        model = load(path)
        steps = Pipeline.parse(pass_).run(model, Context())
        changed = any(step.ledger.changes for step in steps)
        assert changed or pass_ not in case.work, f"{pass_} found no work"
        now = text(model, digests=True)
        assert (now == before) == (not changed)
        again = Pipeline.parse(pass_).run(model, Context())
        assert text(model, digests=True) == now
        assert not any(step.ledger.changes for step in again)
        save(model, after)
        assert text(load(after), digests=True) == now
        assert checked(after) or not sound
        if feeds is not None:
            judge = Judge()
            for old, new in zip(expected, OrtRunner().run(load(after), feeds), strict=True):
                judge.add(old, None, new)
            assert judge.breaches("rounding", ROUNDS) == []


def test_the_table_says_what_runs(tmp_path: Path) -> None:
    for name, case in FEATURES.items():
        reason = why_not_runnable(load(written(case.make(), tmp_path)))
        assert (reason is None) == case.runs, f"{name}: {reason}"


# Features by themselves -----------------------------------------------------------------------------------------------


def loaded(make: Callable[[], ModelProto], folder: Path) -> ir.Model:
    return load(written(make(), folder))


def cleaned(model: ir.Model, passes: str = "clean") -> list[tuple[str, str]]:
    """The skips in the ledger, after the passes."""
    steps = Pipeline.parse(passes).run(model, Context())
    return [(skip.subject, skip.reason) for step in steps for skip in step.ledger.skips]


def annotations(path: Path) -> dict[str, dict[str, str]]:
    found = onnx.load(path).graph.quantization_annotation
    return {one.tensor_name: {entry.key: entry.value for entry in one.quant_parameter_tensor_names} for one in found}


def test_annotations_follow_values(tmp_path: Path) -> None:
    """The constants that only an annotation names stay, under the names that they get; equal ones stay apart."""
    proto = parsed(
        """g (float[2] x) => (float[2] y) <float s = {0.5}, float t = {0.5}, uint8 z = {3}, float unused = {1}> {
            h = Relu(x) k = Identity(h) y = Neg(k) }"""
    )
    proto.graph.initializer[0].name = "s\n"
    annotate(proto.graph, "k", SCALE_TENSOR="s\n", ZERO_POINT_TENSOR="z")
    annotate(proto.graph, "y", SCALE_TENSOR="t", ZERO_POINT_TENSOR="z")
    model = load(written(proto, tmp_path))
    copy = model.clone()
    cleaned(model)
    save(model, tmp_path / "o.onnx")
    assert sorted(model.graph.initializers) == ["s_", "t", "z"]
    assert annotations(tmp_path / "o.onnx") == {
        "h": {"SCALE_TENSOR": "s_", "ZERO_POINT_TENSOR": "z"},
        "y": {"SCALE_TENSOR": "t", "ZERO_POINT_TENSOR": "z"},
    }
    prefix(copy, "a/")
    rename(copy.graph.initializers["a/t"], "b", Names(copy))
    save(copy, tmp_path / "o.onnx")
    assert annotations(tmp_path / "o.onnx") == {
        "a/k": {"SCALE_TENSOR": "a/s\n", "ZERO_POINT_TENSOR": "a/z"},
        "a/y": {"SCALE_TENSOR": "b", "ZERO_POINT_TENSOR": "a/z"},
    }


def test_annotations_go_with_their_value(tmp_path: Path) -> None:
    proto = parsed(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float s = {0.5}, float t = {0.5}> {
            dead = Mul(x, w) k = Relu(x) y = Identity(k) }"""
    )
    annotate(proto.graph, "dead", SCALE_TENSOR="s")
    annotate(proto.graph, "w", SCALE_TENSOR="t")
    annotate(proto.graph, "y", SCALE_TENSOR="elsewhere")
    model = load(written(proto, tmp_path))
    cleaned(model, "remove-dead-code")
    assert not model.graph.initializers
    save(model, tmp_path / "o.onnx")
    assert annotations(tmp_path / "o.onnx") == {"y": {"SCALE_TENSOR": "elsewhere"}}


def test_an_annotated_name_is_not_rewritten_away(tmp_path: Path) -> None:
    proto = parsed("g (float[2] x) => (float[2] y) <float s = {1}> { i = Identity(s) j = Identity(x) y = Mul(j, i) }")
    annotate(proto.graph, "y", SCALE_TENSOR="i")
    model = load(written(proto, tmp_path))
    skips = cleaned(model, "remove-identities")
    assert skips == [("Identity", "identity: a quantization annotation names a value that would be gone")]
    assert "%i: float32[] = Identity(%s)" in text(model) or "%i = Identity(%s)" in text(model)


def test_nodes_on_devices_stay_and_follow_their_values(tmp_path: Path) -> None:
    model = loaded(device_configurations, tmp_path)
    skips = cleaned(model, "remove-identities")
    assert not skips
    save(model, tmp_path / "o.onnx")
    kept = onnx.load(tmp_path / "o.onnx").graph.node
    assert [node.device_configurations[0].sharding_spec[0].tensor_name for node in kept] == ["h", "h"]
    proto = device_configurations()
    proto.graph.node[1].device_configurations.add(configuration_id="pair")
    assert cleaned(load(written(proto, tmp_path)), "remove-identities") == [
        ("Identity", "identity: it is assigned to devices")
    ]


def test_shapes_inside_functions_are_said_to_be_left(tmp_path: Path) -> None:
    assert cleaned(loaded(function, tmp_path), "infer-shapes") == [
        ("local::Twice/", "inside a function types and shapes depend on the caller")
    ]
    assert not cleaned(loaded(if_with_captured_values, tmp_path), "infer-shapes")


def test_map_outputs_are_checked(tmp_path: Path) -> None:
    report = penjing.run(loaded(maps, tmp_path), "clean", strict=True)
    assert report.check.comparison is not None
    assert list(report.check.comparison.outputs) == ["p[*][10]", "p[*][20]", "p[*][30]"]
    assert report.check.comparison.equal


def test_a_classifier_with_a_map(tmp_path: Path) -> None:
    proto = parsed(
        """g (float[N, 2] x) => (int64[N] label, float[N] p) {
            label, scores = ai.onnx.ml.LinearClassifier<coefficients = [1.0, 2.0, -1.0, 0.5, 0.25, 1.0],
                intercepts = [0.0, 0.5, 1.0], classlabels_ints = [0, 1, 2], post_transform = "SOFTMAX">(x)
            i = Identity(scores) p = ai.onnx.ml.ZipMap<classlabels_int64s = [0, 1, 2]>(i) }""",
        ML,
    )
    proto.graph.output[1].type.CopyFrom(TABLE)
    report = penjing.run(load(written(proto, tmp_path)), "clean", strict=True)
    assert report.check.comparison is not None
    assert list(report.check.comparison.outputs) == ["label", "p[*][0]", "p[*][1]", "p[*][2]"]


def test_map_inputs_take_dicts_or_a_sentence(tmp_path: Path) -> None:
    model = loaded(maps_as_inputs, tmp_path)
    report = penjing.run(model, "clean")
    assert report.check.not_run == "the input 'x' (map) is of a type that no random feed is drawn for"
    report = penjing.run(model, "clean", data=[{"x": {"a": 1.0, "b": 2.0}}])
    assert report.check.comparison is not None
    assert report.check.comparison.equal
    with pytest.raises(BadFeeds, match=r"'x' \(map\) takes a dict a run; a function can yield it"):
        penjing.run(model, "clean", data=[{"x": np.zeros(2, np.float32)}])


def test_sparse_constants_stay_where_no_pass_replaces_them(tmp_path: Path) -> None:
    """Equal ones are merged, a transposed one is folded only where the file does not grow by it."""
    proto = parsed(
        """g (float[64, 64] x) => (float[64, 64] y) {
            a = MatMul(x, w) b = MatMul(a, v) t = Transpose(w) y = MatMul(b, t) }"""
    )
    array = np.zeros((64, 64), np.float32)
    array[3, 4] = 1
    proto.graph.sparse_initializer.extend([sparse(array, "w"), sparse(array, "v")])
    model = load(written(proto, tmp_path))
    skips = cleaned(model)
    assert skips == [("Transpose", "not folded: the result is larger than the constants that it is made of")]
    kinds = [type(tensor) for _, tensor in tensors(model)]
    assert kinds == [SparseTensor]
    skips = cleaned(model, "prune-magnitude{sparsity=0.5}")
    assert skips == [("w", "stored sparse, and would be dense once changed")]
    weight = summarize(model).weights[0]
    assert (weight.elements, weight.zeros, weight.distinct, weight.bytes) == (4096, 4095, 2, 4 + 16)


def test_sparse_weights_do_not_grow_by_a_fold(tmp_path: Path) -> None:
    proto = parsed(
        """g (float[1, 64, 2, 2] x) => (float[1, 64, 2, 2] y) {
            a = Conv(x, w) y = BatchNormalization(a, one, one, one, one) }"""
    )
    array = np.zeros((64, 64, 1, 1), np.float32)
    array[3, 4] = 1
    proto.graph.sparse_initializer.append(sparse(array, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(64, np.float32), "one"))
    model = load(written(proto, tmp_path))
    reason = "batchnorm into layer: the layer's weight is stored sparse, and the file would grow by it dense"
    assert cleaned(model, "fold-batchnorm") == [("BatchNormalization", reason)]


def test_sparse_constants_of_any_size(tmp_path: Path) -> None:
    """A hundred bytes that stand for 2^62 elements cost nothing, as long as nothing asks for the elements."""
    proto = parsed("g (uint8 x) => (uint8 y) { i = Identity(x) y = Identity(i) }")
    values = numpy_helper.from_array(np.uint8([7, 9]), "w")
    places = numpy_helper.from_array(np.array([3, (1 << 62) - 1]), "at")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [1 << 31, 1 << 31]))
    proto.graph.output.append(helper.make_tensor_value_info("w", TensorProto.UINT8, [1 << 31, 1 << 31]))
    model = load(written(proto, tmp_path))
    cleaned(model)
    assert (summarize(model).weights[0].zeros, summarize(model).weights[0].distinct) == ((1 << 62) - 2, 3)
    save(model, tmp_path / "o.onnx")
    assert f"sparse {{3: 7, {(1 << 62) - 1}: 9}}" in text(load(tmp_path / "o.onnx"))
    assert why_not_runnable(model) is not None


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    proto = if_with_captured_values()
    annotate(proto.graph.node[1].attribute[0].g, "kept", SCALE_TENSOR="w")
    with pytest.raises(BadFile, match=r"graph 'inner' annotates 'kept' \(quantization_annotation\), which it lacks"):
        load(written(proto, tmp_path))
    proto = function()
    proto.functions[0].value_info.add(name="i").type.opaque_type.name = "Own"
    with pytest.raises(BadFile, match="a value has an opaque type, which would be lost"):
        load(written(proto, tmp_path))


def test_a_newer_ir_version_keeps_types_in_functions(tmp_path: Path) -> None:
    """Raised on saving to 10, which overloads need, they go from the main graph into the functions."""
    model = loaded(types_in_functions_before_they_could_have_them, tmp_path)
    for key, function_ in list(model.functions.items()):
        del model.functions[key]
        function_.overload = model.graph[0].overload = "new"
        model.functions[function_.identifier()] = function_
    save(model, tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx").ir_version == 10
    assert model.ir_version == 9
    assert "%h: float32[N,2] = Relu" in text(load(tmp_path / "o.onnx"))


# IR versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", range(3, 15))
def test_ir_versions(version: int, tmp_path: Path) -> None:
    """Kept up to 13; 14 added nothing but floats of 6 bits, and without them is written as 13."""
    proto = parsed("g (float[2] x, float[2] w) => (float[2] y) { i = Identity(x) y = Add(i, w) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2]), "w"))
    proto.ir_version = version
    model = load(written(proto, tmp_path))
    Pipeline.parse("clean").run(model)
    save(model, tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx").ir_version == min(version, 13)
    assert why_not_runnable(load(tmp_path / "o.onnx")) is None


@pytest.mark.parametrize("version", [1, 2, 15])
def test_other_ir_versions_are_refused(version: int, tmp_path: Path) -> None:
    proto = parsed("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    proto.ir_version = version
    with pytest.raises(BadFile, match=f"has IR version {version}, (older|newer) than any that is understood"):
        load(written(proto, tmp_path))


def test_training_information_is_refused(tmp_path: Path) -> None:
    proto = parsed("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    proto.training_info.add()
    with pytest.raises(BadFile, match=r"training information .* export it for inference, or delete that field"):
        load(written(proto, tmp_path))
