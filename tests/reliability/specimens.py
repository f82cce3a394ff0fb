"""The models that are mutated: those of the ONNX corpus that are small, and some that hold all else of the language."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from .mutations import Sample

LARGEST = 200_000  # bytes
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
RELEASED = Path(__file__).parents[2] / "models" / "cnn-a-legacy.onnx"

_TEXTS = {
    "functions": """
        <ir_version: 10, opset_import: ["": 18, "local": 1], producer_name: "hand", metadata_props: ["who": "me"]>
        main (float[N, 4] x, bool c) => (float[N, 4] y, float z)
        <float[4] w = {1, 2, 3, 4}>
        { a = local.twice <gain = 3.0> (x)   b = Add (a, w)
          y = If (c) <then_branch = yes () => (float[N, 4] p) { p = local.outer (b) },
                      else_branch = no () => (float[N, 4] q) { k = Constant <value_float = 2.0> () q = Mul (b, k) }>
          z = ReduceSum <keepdims = 0> (y) }
        <domain: "local", opset_import: ["": 18]>
        twice <gain> (a) => (b) { g = Constant <value_float: float = @gain> () s = Add (a, a) b = Mul (s, g) }
        <domain: "local", opset_import: ["": 18, "local": 1]>
        outer (a) => (b) { t = local.twice <gain = 1.5> (a) b = Relu (t) }
    """,
    "loop": """
        <ir_version: 8, opset_import: ["": 17]>
        main (float[4] x, int64 n) => (float[4] y, float[T, 4] scanned, float[4] sum)
        { t = Constant <value = bool {1}> ()   zero = Constant <value = float[4] {0, 0, 0, 0}> ()
          y, scanned = Loop (n, t, x) <body = b (int64 i, bool go, float[4] v) => (bool more, float[4] w, float[4] s)
            { more = Identity (go)  u = Add (v, x)  w = Relu (u)  s = Identity (w) }>
          sum, last = Scan <num_scan_inputs = 1, body = s (float[4] acc, float[4] row) => (float[4] next, float[4] o)
            { next = Add (acc, row)  o = Identity (next) }> (zero, scanned) }
    """,
    "shapes": """
        <ir_version: 9, opset_import: ["": 19, "ai.onnx.ml": 3]>
        main (float[B, 3, 8, 8] x) => (float[B, K] y, string[2] names)
        <float[4, 3, 3, 3] w, float[4] b, float[4] mean, float[4] var, int64[2] names0 = {1, 2}>
        { s = Shape (x)  zero = Constant <value_ints = [0]> ()  first = Gather <axis = 0> (s, zero)
          minus = Constant <value_ints = [-1]> ()  target = Concat <axis = 0> (first, minus)
          c = Conv <pads = [1, 1, 1, 1]> (x, w, b)  n = BatchNormalization (c, b, b, mean, var)
          pads = Constant <value_ints = [0, 0, 0, 0, 0, 0, 1, 1]> ()  p = Pad (n, pads)
          f = Reshape (n, target)  y = Softmax <axis = 1> (f)
          size = Constant <value_ints = [2, 2]> ()  cs = ConstantOfShape <value = float[1] {1.5}> (size)
          i0 = Constant <value_int = 0> ()  i3 = Constant <value_int = 30> ()  i1 = Constant <value_int = 3> ()
          big = Constant <value_ints = [4, 2, 2]> ()  r = Range (i0, i3, i1)  e = Expand (cs, big)
          tile = Tile (cs, size)
          names = Constant <value_strings = ["a", "b"]> ()  d = Dropout (cs)  i = Identity (d) j = Cast <to = 10> (i) }
    """,
}


@functools.cache
def corpus() -> tuple[Sample, ...]:
    """All samples up to ``LARGEST`` bytes, by name; twice those that are made by hand, which hold the most."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = [Sample(f"node {case.name}", case.model.SerializeToString()) for case in collect_testcases(None)]
    files = [
        Sample(f"file {path.relative_to(DATA)}", path.read_bytes(), _beside(path))
        for path in sorted(DATA.rglob("*.onnx"))
        if path.stat().st_size < LARGEST
    ]
    by_hand = [
        *map(_parsed, _TEXTS),
        external(),
        everything(),
        sparse(),
        containers(),
        maps(),
        quantized(),
        _released(),
    ]
    return (*nodes, *files, *by_hand * 40)


def _beside(path: Path) -> dict[str, bytes]:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return {name: (path.parent / name).read_bytes() for name in sorted(names) if (path.parent / name).is_file()}


def _parsed(name: str) -> Sample:
    model = parser.parse_model("".join(line.strip() + "\n" for line in _TEXTS[name].splitlines() if line.strip()))
    rng = np.random.default_rng(0)
    for info in model.graph.value_info:  # the syntax has no other way to say a large initializer
        sizes = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        model.graph.initializer.append(numpy_helper.from_array(rng.random(sizes, np.float32), info.name))
    return Sample(f"hand {name}", model.SerializeToString())


def _model(nodes: list[onnx.NodeProto], inputs: str, outputs: str, tensors: list[TensorProto]) -> ModelProto:
    """Names of float inputs and outputs [4, 4], apart by spaces."""
    given, made = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in names.split()]
        for names in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "main", given, made, initializer=tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def _external(name: str, dims: list[int], location: str, offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def external() -> Sample:
    """Tensors in two data files, overlapping, one of them in a Constant node and one in a body."""
    weights = np.arange(4096, dtype=np.float32)
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=_external("t", [4, 4], "w.bin", 64, 64))],
        "branch",
        [],
        [helper.make_tensor_value_info("k", TensorProto.FLOAT, [4, 4])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"),
        helper.make_node("Add", ["h", "v"], ["a"], name="add"),
        helper.make_node("Constant", [], ["c"], value=_external("c", [64, 16], "v.bin", 0, 4096)),
        helper.make_node("ReduceMax", ["c"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "m"], ["g"]),
        helper.make_node("If", ["g"], ["i"], then_branch=inner, else_branch=inner, name="if"),
        helper.make_node("Add", ["a", "i"], ["y"], name="last"),
    ]
    tensors = [_external("w", [4, 4], "w.bin", 0, 64), _external("v", [4, 4], "w.bin", 32, 64)]
    tensors += [_external("u", [1024], "w.bin", 4096, 4096)]
    data = {"w.bin": weights.tobytes(), "v.bin": weights[:1024].tobytes()}
    return Sample("hand external", _model(nodes, "x", "y", tensors).SerializeToString(), data)


def everything() -> Sample:
    """Doc strings, metadata, annotations, devices, training-free leftovers, and a tensor of each element type."""
    tensors = []
    for kind in sorted(set(helper.get_all_tensor_dtypes()) - {TensorProto.STRING}):
        values = np.zeros(6, helper.tensor_dtype_to_np_dtype(kind))
        tensors.append(numpy_helper.from_array(values, f"t{kind}"))
        tensors[-1].doc_string = "a tensor"
    tensors.append(helper.make_tensor("strings", TensorProto.STRING, [2], [b"one", b"\xff\xfe"]))
    tensors.append(helper.make_tensor("typed", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]))
    tensors.append(helper.make_tensor("x", TensorProto.FLOAT, [4, 4], [0.5] * 16))  # an input with a default
    kinds = [tensor.name for tensor in tensors if tensor.name != "x"]
    nodes = [helper.make_node("Identity", [name], [f"o_{name}"], name=f"id_{name}") for name in kinds]
    nodes += [helper.make_node("Relu", ["x"], ["y"], name="relu", doc_string="a node")]
    nodes += [helper.make_node("LabelEncoder", ["strings"], ["e"], domain="ai.onnx.ml", keys_strings=["one"])]
    model = _model(nodes, "x", "y", tensors)
    for owner in (model, model.graph, nodes and model.graph.node[0], model.graph.initializer[0], model.graph.input[0]):
        owner.metadata_props.add(key="key", value="value")
        owner.doc_string = "what it is for"
    annotation = model.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="typed")
    model.graph.value_info.add().CopyFrom(helper.make_tensor_value_info("e", TensorProto.STRING, ["n"]))
    model.configuration.add(name="gpu", num_devices=2)
    model.graph.node[0].device_configurations.add(configuration_id="gpu")
    return Sample("hand everything", model.SerializeToString())


def sparse() -> Sample:
    """Sparse tensors: an initializer with linear indices, one with coordinates, and one in a Constant node."""

    def tensor(name: str, indices: np.ndarray) -> onnx.SparseTensorProto:
        values = numpy_helper.from_array(np.arange(1, 4, dtype=np.float32), name)
        return helper.make_sparse_tensor(values, numpy_helper.from_array(indices, ""), [4, 4])

    nodes = [
        helper.make_node("MatMul", ["x", "s1"], ["h"]),
        helper.make_node("MatMul", ["h", "s2"], ["g"]),
        helper.make_node("Constant", [], ["s3"], sparse_value=tensor("", np.array([1, 2, 3]))),
        helper.make_node("Add", ["g", "s3"], ["y"]),
    ]
    model = _model(nodes, "x", "y", [])
    model.graph.sparse_initializer.add().CopyFrom(tensor("s1", np.array([0, 5, 15])))
    model.graph.sparse_initializer.add().CopyFrom(tensor("s2", np.array([[0, 1], [2, 2], [3, 0]])))
    return Sample("hand sparse", model.SerializeToString())


def containers() -> Sample:
    """Sequences and optionals."""
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        helper.make_node("SequenceAt", ["s", "zero"], ["y"]),
        helper.make_node("Optional", ["s"], ["o"]),
    ]
    model = _model(nodes, "x", "y", [numpy_helper.from_array(np.int64(0), "zero")])
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [4, 4]))
    model.graph.output.add().CopyFrom(helper.make_value_info("s", sequence))
    model.graph.output.add().CopyFrom(helper.make_value_info("o", helper.make_optional_type_proto(sequence)))
    return Sample("hand containers", model.SerializeToString())


def maps() -> Sample:
    """A sequence of maps, as classifiers give."""
    nodes = [helper.make_node("ZipMap", ["x"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2, 3])]
    model = _model(nodes, "x", "", [])
    map_ = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    model.graph.output.add().CopyFrom(helper.make_value_info("m", helper.make_sequence_type_proto(map_)))
    return Sample("hand maps", model.SerializeToString())


def quantized() -> Sample:
    """Quantize and dequantize, packed int4, a batch of duplicates and chains that clean folds."""
    weight = helper.make_tensor("q", TensorProto.INT4, [4, 4], np.arange(16) % 8)
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    zero = numpy_helper.from_array(np.uint8(128), "zero")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("MatMul", ["xd", "w"], ["h"]),
        helper.make_node("Concat", ["one", "one"], ["two"], axis=0),
        helper.make_node("Concat", ["two", "two"], ["four"], axis=0),
        helper.make_node("ReduceSum", ["four"], ["k"], keepdims=0),
        helper.make_node("Mul", ["h", "k"], ["y"]),
    ]
    tensors = [
        weight,
        scale,
        zero,
        *(numpy_helper.from_array(np.ones(4, np.float32), name) for name in ("one", "same")),
    ]
    return Sample("hand quantized", _model(nodes, "x", "y", tensors).SerializeToString())


def _released() -> Sample:
    """A trained model with its larger weights in a data file."""
    model = onnx.load(RELEASED)
    data = bytearray()
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= 1024:
            reference = _external(tensor.name, list(tensor.dims), "cnn.data", len(data), len(tensor.raw_data))
            reference.data_type = tensor.data_type
            data += tensor.raw_data
            tensor.CopyFrom(reference)
    return Sample("hand cnn", model.SerializeToString(), {"cnn.data": bytes(data)})
