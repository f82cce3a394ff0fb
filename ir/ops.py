"""What each operator does with its inputs: one table, which every pass reads and none keeps a copy of.

    operator(node).port(1).kind            # Kind.MATRIX for Conv: its second input is a prunable weight
    operator(node).port(1).axes(node, 4)   # Axes(output=0, input=1, groups=...)
    operator(node).commutative

An operator lists its inputs in order. Sources: the ONNX operator specification, and ONNX Runtime's schemas of its own
operators (domain ``com.microsoft``); tests compare every name here with both.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

__all__ = ["OPERATORS", "Axes", "Integer", "Kind", "Operator", "Port", "is_random", "operator"]

MICROSOFT = "com.microsoft"


class Kind(enum.StrEnum):
    """What a constant is to the operator that reads it."""

    MATRIX = "matrix"  # contracted with the activations: what pruning, sharing and quantization are about
    BIAS = "bias"
    NORM = "norm"  # scale, shift, mean or variance of a normalization
    EMBEDDING = "embedding"  # rows picked by indices that are computed at run time
    TABLE = "table"  # looked up otherwise: palettes, decoder tables, caches of sines
    INDEX = "index"  # which elements to take or write
    SHAPE = "shape"  # shapes, axes, pads, bounds, limits and other settings
    SCALE = "scale"
    ZERO_POINT = "zero point"
    PACKED = "packed"  # weights packed in a layout of the operator's own
    OPERAND = "operand"  # of arithmetic, or data moved about
    OUTPUT = "output"  # an output of the model itself
    UNKNOWN = "unknown"  # the operator is not in this table
    UNUSED = "unused"  # nothing reads it


@dataclass(frozen=True, slots=True)
class Axes:
    """Channel axes of a weight, from 0: ``output`` (N) and ``input`` (K, the contracted one); None where not one axis.

    ``groups`` > 1: a grouped convolution, where the channels of one group do not meet those of another. Conv holds
    the input channels of one group only, ConvTranspose the output channels of one group only.
    """

    output: int | None = None
    input: int | None = None
    groups: int = 1


AxesOf = Callable[[ir.Node, int, int], Axes]  # node, port index, rank of the input


def _no_axes(node: ir.Node, index: int, rank: int) -> Axes:
    del node, index, rank
    return Axes()


@dataclass(frozen=True, slots=True)
class Port:
    """One input of an operator. ``scale`` and ``zero_point`` are the ports that go with an integer input.

    A scale or zero point of one dimension runs along the output-channel axis.
    """

    index: int
    name: str
    kind: Kind
    axes_of: AxesOf = _no_axes
    scale: int | None = None
    zero_point: int | None = None

    def axes(self, node: ir.Node, rank: int) -> Axes:
        """The channel axes of the ``rank``-dimensional tensor that ``node`` reads here."""
        return self.axes_of(node, self.index, rank)


@dataclass(frozen=True, slots=True)
class Integer:
    """How ONNX Runtime's CPU provider runs the operator on int8 between DequantizeLinear and QuantizeLinear.

    ``kernel`` is the operator it becomes. ``needs_output``: only where the output goes to exactly one QuantizeLinear.
    ``equal``: only where input and output have the same scale and zero point. (Measured with 1.31.)
    """

    kernel: str
    needs_output: bool = True
    equal: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """What is known of one operator; every flag is false for an operator that is not in the table."""

    name: str
    domain: str = ""
    ports: tuple[Port, ...] = ()
    variadic: bool = False  # the last port repeats
    elementwise: Literal["unary", "binary", "variadic"] | None = None  # after broadcasting
    commutative: bool = False
    moves: bool = False  # outputs hold values of the inputs, unchanged: only shape, order or choice differ
    random: bool = False
    control: bool = False  # holds graphs that run conditionally or repeatedly
    integer: Integer | None = None
    known: bool = True

    def port(self, index: int) -> Port:
        """The port of input ``index``; an unlisted input of a known operator is a plain operand."""
        if index < len(self.ports):
            return self.ports[index]
        if self.variadic and self.ports:
            return replace(self.ports[-1], index=index)
        return Port(index, "", Kind.OPERAND if self.known else Kind.UNKNOWN)

    @property
    def bias(self) -> int | None:
        """The index of the bias port."""
        return next((port.index for port in self.ports if port.kind is Kind.BIAS), None)

    @property
    def matrices(self) -> tuple[Port, ...]:
        """The ports of prunable weights."""
        return tuple(port for port in self.ports if port.kind is Kind.MATRIX)


_UNKNOWN = Operator("", known=False)


def operator(node: ir.Node) -> Operator:
    """The table's entry for the operator of ``node``, or one that knows nothing (``known`` is false)."""
    return OPERATORS.get((node.domain, node.op_type), _UNKNOWN)


def is_random(node: ir.Node) -> bool:
    """Whether two runs of ``node`` may differ: random operators, and Dropout that may be told to train."""
    if node.op_type == "Dropout" and node.domain == "":
        return len(node.inputs) > 2 and node.inputs[2] is not None
    return operator(node).random


# Channel axes ---------------------------------------------------------------------------------------------------------


def _conv(node: ir.Node, index: int, rank: int) -> Axes:
    """W [M, C/group, k1, k2, ...]."""
    del index, rank
    return Axes(output=0, input=1, groups=_int(node, "group", 1))


def _conv_transpose(node: ir.Node, index: int, rank: int) -> Axes:
    """W [C, M/group, k1, k2, ...]."""
    del index, rank
    return Axes(output=1, input=0, groups=_int(node, "group", 1))


def _matmul(node: ir.Node, index: int, rank: int) -> Axes:
    """A [..., M, K] and B [..., K, N]; a vector is all K. The first matrix input is A."""
    if rank < 2:
        return Axes(input=0 if rank else None)
    first = index == operator(node).matrices[0].index
    side = "A" if first else "B"
    if _int(node, f"transBatch{side}", 0):
        return Axes()
    contracted_last = first != bool(_int(node, f"trans{side}", 0))
    return Axes(rank - 2, rank - 1) if contracted_last else Axes(rank - 1, rank - 2)


def _input_first(node: ir.Node, index: int, rank: int) -> Axes:
    """[..., input, output]: a projection stored as x @ W takes it."""
    del node, index
    return Axes(output=rank - 1, input=rank - 2)


def _output_first(node: ir.Node, index: int, rank: int) -> Axes:
    """[..., output, input]: gates of recurrent operators, experts."""
    del node, index
    return Axes(output=rank - 2, input=rank - 1)


def _einsum(node: ir.Node, index: int, rank: int) -> Axes:
    """From the equation: input is the one contracted label, output the one that no other operand has."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if index >= len(terms):
        return Axes()
    labels = _labels(terms[index], rank)
    others = "".join(terms[:index] + terms[index + 1 :])
    if not arrow:  # implicit output: every label that occurs once
        right = "".join(label for label in left if label.isalpha() and left.count(label) == 1)
    contracted = [axis for axis, label in enumerate(labels) if label in others and label not in right]
    produced = [axis for axis, label in enumerate(labels) if label in right and label not in others]
    return Axes(_only(produced), _only(contracted))


def _labels(term: str, rank: int) -> list[str]:
    """One label an axis; the axes under ``...`` get one that never matches as a channel."""
    head, dots, tail = term.partition("...")
    return [*head, *("?" * (rank - len(head) - len(tail)) if dots else ""), *tail]


def _only(axes: list[int]) -> int | None:
    return axes[0] if len(axes) == 1 else None


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


# The table ------------------------------------------------------------------------------------------------------------

_PortSpec = tuple[str, Kind, AxesOf, int | None, int | None]


def _port(name: str, kind: Kind = Kind.OPERAND, axes: AxesOf = _no_axes) -> _PortSpec:
    return (name, kind, axes, None, None)


def _matrix(name: str, axes: AxesOf, scale: int | None = None, zero_point: int | None = None) -> _PortSpec:
    return (name, Kind.MATRIX, axes, scale, zero_point)


def _ports(kind: Kind, names: str) -> list[_PortSpec]:
    return [_port(name, kind) for name in names.split()]


def _data(names: str) -> list[_PortSpec]:
    return _ports(Kind.OPERAND, names)


def _bias(name: str = "B") -> _PortSpec:
    return _port(name, Kind.BIAS)


def _norm(names: str) -> list[_PortSpec]:
    return _ports(Kind.NORM, names)


def _embeddings(names: str) -> list[_PortSpec]:
    return _ports(Kind.EMBEDDING, names)


def _shape(names: str) -> list[_PortSpec]:
    return _ports(Kind.SHAPE, names)


def _index(names: str) -> list[_PortSpec]:
    return _ports(Kind.INDEX, names)


def _scale(name: str) -> _PortSpec:
    return _port(name, Kind.SCALE)


def _zero(name: str) -> _PortSpec:
    return _port(name, Kind.ZERO_POINT)


def _quantized(name: str) -> list[_PortSpec]:
    """The scale and zero point that belong to the activation ``name``."""
    return [_scale(f"{name}_scale"), _zero(f"{name}_zero_point")]


def _op(
    name: str,
    *ports: _PortSpec,
    domain: str = "",
    variadic: bool = False,
    moves: bool = False,
    elementwise: Literal["unary", "binary", "variadic"] | None = None,
    integer: Integer | None = None,
) -> Operator:
    made = tuple(Port(index, *spec) for index, spec in enumerate(ports))
    return Operator(name, domain, made, variadic, elementwise, moves=moves, integer=integer)


def _contrib(name: str, *ports: _PortSpec, moves: bool = False, integer: Integer | None = None) -> Operator:
    return _op(name, *ports, domain=MICROSOFT, moves=moves, integer=integer)


def _layers() -> Iterable[Operator]:
    """Operators that contract a weight with the activations."""
    gates = [_matrix("W", _output_first), _matrix("R", _output_first), _bias()]
    recurrent = [*_data("X"), *gates, *_shape("sequence_lens"), *_data("initial_h")]
    fused = Integer("QLinearConv")
    yield _op("Conv", *_data("X"), _matrix("W", _conv), _bias(), integer=fused)
    yield _op("ConvTranspose", *_data("X"), _matrix("W", _conv_transpose), _bias())
    yield _op("DeformConv", *_data("X"), _matrix("W", _conv), *_data("offset"), _bias(), *_data("mask"))
    yield _op("CausalConvWithState", *_data("input"), _matrix("weight", _conv), _bias("bias"), *_data("past_state"))
    yield _op("Gemm", _matrix("A", _matmul), _matrix("B", _matmul), _bias("C"), integer=Integer("QGemm"))
    matmul = Integer("QLinearMatMul", needs_output=False)
    yield _op("MatMul", _matrix("A", _matmul), _matrix("B", _matmul), integer=matmul)
    yield _op("Einsum", _matrix("Inputs", _einsum), variadic=True)
    yield _op("LSTM", *recurrent, *_data("initial_c P"))
    yield _op("GRU", *recurrent)
    yield _op("RNN", *recurrent)

    attention = [*_data("input"), _matrix("weights", _input_first), _bias("bias")]
    yield _contrib("Attention", *attention, *_data("mask_index past attention_bias"), *_shape("past_sequence_length"))
    yield _contrib(
        "PackedAttention",
        *attention,
        *_shape("token_offset cumulative_sequence_length"),
        *_data("attention_bias"),
    )
    yield _contrib(
        "DecoderAttention",
        *_data("query key"),
        _matrix("q_weight", _input_first),
        _matrix("kv_weight", _input_first),
        _bias("bias"),
        *_data("key_padding_mask key_cache value_cache"),
        *_shape("static_kv use_past has_layer_state has_key_padding_mask"),
    )
    yield _contrib(
        "LongformerAttention",
        *_data("input"),
        _matrix("weight", _input_first),
        _bias("bias"),
        *_data("mask"),
        _matrix("global_weight", _input_first),
        _bias("global_bias"),
        *_data("global"),
    )
    yield _contrib(
        "GatedRelativePositionBias",
        *_data("query_layer"),
        _bias("query_bias"),
        *_data("rel_pos"),
        _matrix("weight", _input_first),
        _bias("bias"),
        *_data("eco_a"),
        *_shape("token_offset"),
    )
    yield _contrib("FusedMatMul", _matrix("A", _matmul), _matrix("B", _matmul))
    yield _contrib("FusedMatMulActivation", _matrix("A", _matmul), _matrix("B", _matmul))
    yield _contrib("TransposeMatMul", _matrix("A", _matmul), _matrix("B", _matmul))
    yield _contrib("FusedGemm", _matrix("A", _matmul), _matrix("B", _matmul), _bias("C"))
    yield _contrib("GemmFastGelu", _matrix("X", _matmul), _matrix("W", _matmul), _bias("bias"))
    for name in ("FusedConv", "NhwcFusedConv"):
        yield _contrib(name, *_data("X"), _matrix("W", _conv), _bias(), *_data("Z"))
    yield _contrib("NhwcConv", *_data("X"), _matrix("W", _conv), _bias())
    yield _contrib("ConvTransposeWithDynamicPads", *_data("X"), _matrix("W", _conv_transpose), *_shape("Pads"), _bias())
    experts = [
        spec
        for n in (1, 2, 3)
        for spec in (_matrix(f"fc{n}_experts_weights", _output_first), _bias(f"fc{n}_experts_bias"))
    ]
    yield _contrib("MoE", *_data("input router_probs"), *experts)


def _integer_layers() -> Iterable[Operator]:
    """Layers on int8 with their scales and zero points, and layers on packed weights."""
    conv = [
        *_data("x"),
        *_quantized("x"),
        _matrix("w", _conv, scale=4, zero_point=5),
        *_quantized("w"),
        *_quantized("y"),
        _bias(),
    ]
    yield _op("QLinearConv", *conv)
    yield _contrib("QLinearConv", *conv)
    a, b = _matrix("a", _matmul, scale=1, zero_point=2), _matrix("b", _matmul, scale=4, zero_point=5)
    yield _op("QLinearMatMul", a, *_quantized("a"), b, *_quantized("b"), *_quantized("y"))
    a, b = _matrix("A", _matmul, zero_point=2), _matrix("B", _matmul, zero_point=3)
    yield _op("MatMulInteger", a, b, _zero("a_zero_point"), _zero("b_zero_point"))
    yield _op(
        "ConvInteger",
        *_data("x"),
        _matrix("w", _conv, zero_point=3),
        _zero("x_zero_point"),
        _zero("w_zero_point"),
    )
    a, b = _matrix("A", _matmul, scale=1, zero_point=2), _matrix("B", _matmul, scale=4, zero_point=5)
    yield _contrib("QGemm", a, *_quantized("a"), b, *_quantized("b"), _bias("C"), *_quantized("y"))
    a, b = _matrix("A", _matmul, scale=2, zero_point=4), _matrix("B", _matmul, scale=3, zero_point=5)
    scales = [_scale("a_scale"), _scale("b_scale"), _zero("a_zero_point"), _zero("b_zero_point")]
    yield _contrib("MatMulIntegerToFloat", a, b, *scales, _bias("bias"))
    weight = _matrix("B", _input_first, scale=2, zero_point=3)
    yield _contrib("DynamicQuantizeMatMul", *_data("A"), weight, *_quantized("b"), _bias("bias"))
    yield _contrib(
        "QAttention",
        *_data("input"),
        _matrix("weight", _input_first, scale=4, zero_point=7),
        _bias("bias"),
        _scale("input_scale"),
        _scale("weight_scale"),
        *_data("mask_index"),
        _zero("input_zero_point"),
        _zero("weight_zero_point"),
        *_data("past"),
    )
    yield _contrib(
        "DynamicQuantizeLSTM",
        *_data("X"),
        _matrix("W", _input_first, scale=8, zero_point=9),
        _matrix("R", _input_first, scale=10, zero_point=11),
        _bias(),
        *_shape("sequence_lens"),
        *_data("initial_h initial_c P"),
        *_quantized("W"),
        *_quantized("R"),
    )
    packed = _port("B", Kind.PACKED)
    yield _contrib(
        "MatMulNBits",
        *_data("A"),
        packed,
        _scale("scales"),
        _zero("zero_points"),
        *_index("g_idx"),
        _bias("bias"),
    )
    yield _contrib("MatMulBnb4", *_data("A"), packed, _scale("absmax"))
    yield _contrib("MatMulFpQ4", *_data("A"), packed, *_shape("B_shape"))
    yield _contrib(
        "GatherBlockQuantized",
        _port("data", Kind.PACKED),
        *_index("indices"),
        _scale("scales"),
        _zero("zero_points"),
    )


def _normalizations() -> Iterable[Operator]:
    yield _op("BatchNormalization", *_data("X"), *_norm("scale B input_mean input_var"))
    yield _op("LayerNormalization", *_data("X"), *_norm("Scale B"))
    yield _op("InstanceNormalization", *_data("input"), *_norm("scale B"))
    yield _op("GroupNormalization", *_data("X"), *_norm("scale bias"))
    yield _op("RMSNormalization", *_data("X"), *_norm("scale"))
    yield _op("SimplifiedLayerNormalization", *_data("X"), *_norm("scale"))  # ONNX Runtime's, in the ONNX domain
    yield _contrib("SkipLayerNormalization", *_data("input skip"), *_norm("gamma beta"), _bias("bias"))
    yield _contrib("SkipSimplifiedLayerNormalization", *_data("input skip"), *_norm("gamma"), _bias("bias"))
    yield _contrib("GroupNorm", *_data("X"), *_norm("gamma beta"))
    yield _contrib("SkipGroupNorm", *_data("X"), *_norm("gamma beta"), *_data("skip"), _bias("bias"))
    yield _contrib(
        "EmbedLayerNormalization",
        *_index("input_ids segment_ids"),
        *_embeddings("word_embedding position_embedding segment_embedding"),
        *_norm("gamma beta"),
        *_data("mask"),
        *_index("position_ids"),
    )
    parts = ["word_embedding", "position_embedding", "segment_embedding", "gamma", "beta"]
    yield _contrib(
        "QEmbedLayerNormalization",
        *_index("input_ids segment_ids"),
        *_embeddings("word_embedding_quant position_embedding_quant segment_embedding"),
        *_norm("gamma_quant beta_quant"),
        *_data("mask"),
        *(_scale(f"{part}_scale") for part in parts),
        *(_zero(f"{part}_zero_point") for part in parts),
    )


def _movements() -> Iterable[Operator]:
    """Operators that only rearrange, pick or repeat, and their like that also pad or compute sizes."""
    picks = Integer("itself", equal=True)
    yield _op("Identity", *_data("input"), moves=True, elementwise="unary", integer=picks)
    yield _op("Reshape", *_data("data"), *_shape("shape"), moves=True, integer=picks)
    yield _op("Transpose", *_data("data"), moves=True, integer=picks)
    yield _op("Flatten", *_data("input"), moves=True, integer=picks)
    yield _op("Squeeze", *_data("data"), *_shape("axes"), moves=True, integer=picks)
    yield _op("Unsqueeze", *_data("data"), *_shape("axes"), moves=True, integer=picks)
    yield _op("Concat", *_data("inputs"), variadic=True, moves=True, integer=Integer("QLinearConcat"))
    yield _op("Split", *_data("input"), *_shape("split"), moves=True, integer=picks)
    yield _op("SplitToSequence", *_data("input"), *_shape("split"))
    yield _op("Slice", *_data("data"), *_shape("starts ends axes steps"), moves=True, integer=picks)
    yield _op("Expand", *_data("input"), *_shape("shape"), moves=True, integer=picks)
    yield _op("Tile", *_data("input"), *_shape("repeats"), moves=True, integer=picks)
    yield _op("DepthToSpace", *_data("input"), moves=True, integer=picks)
    yield _op("SpaceToDepth", *_data("input"), moves=True)
    yield _op("ReverseSequence", *_data("input"), *_shape("sequence_lens"), moves=True)
    yield _op("Compress", *_data("input"), *_index("condition"), moves=True)
    yield _op("Gather", *_embeddings("data"), *_index("indices"), moves=True, integer=picks)
    yield _op("GatherElements", _port("data", Kind.TABLE), *_index("indices"), moves=True, integer=picks)
    yield _op("GatherND", _port("data", Kind.TABLE), *_index("indices"), moves=True)
    yield _op("MaxPool", *_data("X"), integer=picks)
    yield _op("Pad", *_data("data"), *_shape("pads constant_value axes"))
    yield _contrib("Pad", *_data("data"), *_shape("pads value"))
    yield _op("CenterCropPad", *_data("input_data"), *_shape("shape"))
    yield _op("Col2Im", *_data("input"), *_shape("image_shape block_shape"))
    yield _op("MaxUnpool", *_data("X"), *_index("I"), *_shape("output_shape"))
    yield _op("AffineGrid", *_data("theta"), *_shape("size"))
    yield _op("Resize", *_data("X"), *_shape("roi scales sizes"), integer=picks)
    yield _op("Upsample", *_data("X"), *_shape("scales"))
    yield _op("Trilu", *_data("input"), *_shape("k"))
    yield _op("ScatterElements", *_data("data"), *_index("indices"), *_data("updates"))
    yield _op("ScatterND", *_data("data"), *_index("indices"), *_data("updates"))
    yield _op("TensorScatter", *_data("past_cache update"), *_index("write_indices"))
    yield _op("OneHot", *_index("indices"), *_shape("depth"), *_data("values"))
    yield _op("ConstantOfShape", *_shape("input"))
    yield _op("Range", *_shape("start limit delta"))
    yield _op("TopK", *_data("X"), *_shape("K"))
    yield _op("CumSum", *_data("x"), *_shape("axis"))
    yield _op("CumProd", *_data("x"), *_shape("axis"))
    reductions = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
    for name in reductions.split():
        yield _op(f"Reduce{name}", *_data("data"), *_shape("axes"), integer=picks if name in ("Max", "Min") else None)


def _quantizers() -> Iterable[Operator]:
    for domain in ("", MICROSOFT):
        yield _op("QuantizeLinear", *_data("x"), _scale("y_scale"), _zero("y_zero_point"), domain=domain)
        yield _op("DequantizeLinear", *_data("x"), _scale("x_scale"), _zero("x_zero_point"), domain=domain)
    for name in ("QLinearAdd", "QLinearMul"):
        yield _contrib(name, *_data("A"), *_quantized("A"), *_data("B"), *_quantized("B"), *_quantized("C"))
    yield _contrib("QLinearAveragePool", *_data("X"), *_quantized("x"), *_quantized("y"))
    yield _contrib("QLinearGlobalAveragePool", *_data("X"), *_quantized("x"), *_quantized("y"))
    yield _contrib("QLinearSigmoid", *_data("X"), *_quantized("X"), *_quantized("Y"))
    yield _contrib("QLinearLeakyRelu", *_data("X"), *_quantized("X"), *_quantized("Y"))
    yield _contrib("QLinearSoftmax", *_data("X"), _scale("X_scale"), _zero("x_zero_point"), *_quantized("y"))
    yield _contrib("QLinearReduceMean", *_data("data"), *_quantized("data"), *_quantized("reduced"))
    x, y = [*_data("X"), *_quantized("x")], [*_data("Y"), *_quantized("y")]
    yield _contrib("QLinearWhere", *_data("condition"), *x, *y, *_quantized("z"))


def _others() -> Iterable[Operator]:
    """Operators with settings or biases among their inputs, and ones whose inputs are all plain operands."""
    yield _op("Clip", *_data("input"), *_shape("min max"), elementwise="unary")
    yield _op("Dropout", *_data("data"), *_shape("ratio training_mode"), elementwise="unary")
    yield _op("PRelu", *_data("X slope"), elementwise="binary")
    yield _op("Cast", *_data("input"), elementwise="unary")
    yield _op("CastLike", *_data("input target_type"), elementwise="unary")
    yield _op("Where", *_data("condition X Y"), elementwise="variadic", integer=Integer("QLinearWhere"))
    yield _op("Attention", *_data("Q K V attn_mask past_key past_value"), *_shape("nonpad_kv_seqlen"))
    caches = _ports(Kind.TABLE, "cos_cache sin_cache")
    yield _op("RotaryEmbedding", *_data("X"), *caches, *_index("position_ids"))
    yield _contrib("RotaryEmbedding", *_data("input"), *_index("position_ids"), *caches)
    attention = [
        *_data("query key value"),
        _bias("bias"),
        *_data("key_padding_mask attention_bias past_key past_value"),
    ]
    yield _contrib("MultiHeadAttention", *attention, *_shape("past_sequence_length"), *_index("cache_indirection"))
    yield _contrib(
        "GroupQueryAttention",
        *_data("query key value past_key past_value"),
        *_shape("seqlens_k total_sequence_length"),
        *caches,
        *_index("position_ids"),
        *_data("attention_bias head_sink"),
        _scale("k_scale"),
        _scale("v_scale"),
        *_norm("q_norm_weight k_norm_weight"),
    )
    yield _contrib("RelativePositionBias", _port("bias_table", Kind.EMBEDDING), *_shape("query_length key_length"))
    yield _contrib("BiasGelu", *_data("A"), _bias("B"))
    yield _contrib("BiasAdd", *_data("X"), _bias("bias"), *_data("skip"))
    yield _contrib("BiasSplitGelu", *_data("X"), _bias("bias"))
    yield _contrib("FastGelu", *_data("X"), _bias("bias"))
    yield _contrib("Gelu", *_data("X"))
    yield _contrib("QuickGelu", *_data("X"))
    yield _contrib("NhwcMaxPool", *_data("x"))
    yield _op(
        "NonMaxSuppression",
        *_data("boxes scores"),
        *_shape("max_output_boxes_per_class iou_threshold score_threshold"),
    )
    yield _op("DFT", *_data("input"), *_shape("dft_length axis"))
    yield _op("STFT", *_data("signal"), *_shape("frame_step"), *_data("window"), *_shape("frame_length"))
    for name in ("Softmax", "GlobalAveragePool"):
        yield Operator(name, integer=Integer(f"QLinear{name}"))
    yield Operator("AveragePool", integer=Integer("QLinearAveragePool"))
    plain = """
        ArgMax ArgMin BitCast BlackmanWindow ConcatFromSequence Constant Det DynamicQuantizeLinear
        EyeLike GlobalLpPool GlobalMaxPool GridSample HammingWindow HannWindow Hardmax ImageDecoder LRN LinearAttention
        LogSoftmax LpNormalization LpPool MaxRoiPool MeanVarianceNormalization MelWeightMatrix
        NegativeLogLikelihoodLoss NonZero Optional OptionalGetElement OptionalHasElement RegexFullMatch RoiAlign Scatter
        SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Size
        SoftmaxCrossEntropyLoss StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
    """
    yield from (Operator(name) for name in plain.split())
    yield from (Operator(name, control=True) for name in ("If", "Scan", "SequenceMap"))
    yield replace(_op("Loop", *_shape("M cond"), *_data("v_initial"), variadic=True), control=True)
    random = "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
    yield from (Operator(name, random=True) for name in random.split())
    random = "BiasDropout BitmaskBiasDropout BitmaskDropout Sampling"
    yield from (Operator(name, MICROSOFT, random=True) for name in random.split())


def _arithmetic() -> Iterable[Operator]:
    unary = """
        Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
        HardSwish IsInf IsNaN Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sign Sin Sinh Softplus Softsign Sqrt
        Swish Tan Tanh ThresholdedRelu
    """
    yield from (Operator(name, elementwise="unary") for name in unary.split())
    for name in ("LeakyRelu", "Sigmoid"):
        yield Operator(name, elementwise="unary", integer=Integer(f"QLinear{name}"))
    ordered = "BitShift Div Greater GreaterOrEqual Less LessOrEqual Mod Pow Sub SwiGLU"
    yield from (Operator(name, elementwise="binary") for name in ordered.split())
    for name in ("Add", "Mul"):
        yield Operator(name, elementwise="binary", commutative=True, integer=Integer(f"QLinear{name}"))
    commutative = "And BitwiseAnd BitwiseOr BitwiseXor Equal Or Xor"
    yield from (Operator(name, elementwise="binary", commutative=True) for name in commutative.split())
    yield from (Operator(name, elementwise="variadic", commutative=True) for name in ("Max", "Mean", "Min", "Sum"))


OPERATORS: dict[tuple[str, str], Operator] = {
    (entry.domain, entry.name): entry
    for family in (_layers, _integer_layers, _normalizations, _movements, _quantizers, _others, _arithmetic)
    for entry in family()
}
