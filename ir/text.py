"""A model as stable text, a line a node, and the difference of two such texts.

The text is for reading and comparing, not for loading. It depends on the model only: no ids, no order of hashing.
A weight is its type and digest; above 1 MiB it is where it comes from, unless digests are asked for.
"""

from __future__ import annotations

import bisect
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from .address import bodies, function_prefix, printable
from .external import MappedTensor
from .maps import MapType
from .references import ANNOTATION
from .sparse import SparseTensor
from .storage import StreamedTensor

FEW = 8  # elements of a tensor shown by value
MANY = 64  # elements above which the list of an attribute is cut
LARGE = 1 << 20  # bytes above which a tensor is not read
LONG = 60  # characters of a note above which it is cut

_PLAIN = re.compile(r"[\w./:~+@#$<>|-]+")

# Nested generators instead of recursive calls: models nest deeper than Python's stack goes.
_Lines: TypeAlias = "Iterator[str | _Lines]"


def text(model: ir.Model, *, digests: bool = False) -> str:
    """The model as text, ending in a newline; with ``digests`` every tensor is read and shown by its whole digest."""
    return "".join(line.rstrip() + "\n" for line in _flatten(_Writer(digests).model(model)))


def diff(before: str, after: str) -> str:
    """The unified difference of two texts with one line of context; empty where they are equal.

    Lines that occur once on either side are matched first (patience diff), so it takes O(n log n) for texts of models,
    whose lines hardly repeat.
    """
    old, new = before.splitlines(), after.splitlines()
    lines = [] if old == new else ["--- before", "+++ after"]
    for group in _Patience(None, old, new, autojunk=False).get_grouped_opcodes(1):
        lines.append(f"@@ -{_span(group[0][1], group[-1][2])} +{_span(group[0][3], group[-1][4])} @@")
        for tag, i, i_end, j, j_end in group:
            if tag == "equal":
                lines += (" " + line for line in old[i:i_end])
                continue
            lines += ("-" + line for line in old[i:i_end])
            lines += ("+" + line for line in new[j:j_end])
    return "".join(line + "\n" for line in lines)


def type_text(type: ir.TypeProtocol | None, shape: ir.ShapeProtocol | None) -> str:
    """``float32[N,3]``, ``float32[...]`` of unknown rank, ``sequence(float32[2])``, ``?`` for an unknown type."""
    if isinstance(type, ir.SequenceType):
        return f"sequence({type_text(type.elem_type, shape)})"
    if isinstance(type, ir.OptionalType):
        return f"optional({type_text(type.elem_type, shape)})"
    if isinstance(type, MapType):
        return f"map({dtype_text(type.key)}, {type_text(type.elem_type, shape)})"
    if isinstance(type, ir.SparseTensorType):
        return f"sparse({type_text(ir.TensorType(type.dtype), shape)})"
    word = dtype_text(type.dtype) if type is not None else "?"
    return word + ("[...]" if shape is None else f"[{','.join(_dim(dim) for dim in shape)}]")


def tensor_text(tensor: ir.TensorProtocol, *, digests: bool = False) -> str:
    """A tensor's content: up to 8 elements by value, up to 1 MiB by digest (blake2b), above by provenance.

    Of a sparse one the stored elements: ``sparse {0: 1.5, 7: 2.0}`` has their places in the flat tensor.
    """
    if isinstance(tensor, SparseTensor):
        return _sparse(tensor, digests)
    if digests:
        return "#" + _digest(tensor, 32)
    if tensor.size <= FEW:
        return _values(tensor)
    if tensor.nbytes <= LARGE:
        return "#" + _digest(tensor, 6)
    if isinstance(tensor, ir.ExternalTensor):
        place = printable(PurePath(tensor.location).name)
        return f"{place}@{tensor.offset or 0}+{tensor.length if tensor.length is not None else tensor.nbytes}"
    provenance = getattr(tensor, "provenance", None)
    if provenance is not None:
        return printable(str(provenance))
    return "lazy" if isinstance(tensor, ir.LazyTensor) else "in memory"


class _Writer:
    def __init__(self, digests: bool) -> None:
        self.digests = digests

    def model(self, model: ir.Model) -> _Lines:
        yield f"model ir={model.ir_version} {_opsets(model.opset_imports)}"
        fields = {
            "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
            "domain": model.domain,
            "version": str(model.model_version or ""),
            "doc": model.doc_string,
        }
        for word, content in fields.items():
            if content:
                yield f"  {word} {_note(content)}"
        for configuration in model.device_configurations:
            yield f"  devices {_devices(configuration)}"
        for key, content in sorted(model.metadata_props.items()):
            yield f"  metadata {_quoted(key)} = {_note(content)}"
        yield self.graph("graph ", model.graph, "")
        for function in model.functions.values():
            yield self.function(function)

    def function(self, function: ir.Function) -> _Lines:
        name = f"function {printable(function_prefix(function).removesuffix('/'))}"
        attributes = ", ".join(
            printable(attribute.name) + (f"={self.attribute(attribute)}" if attribute.value is not None else "")
            for attribute in sorted(function.attributes.values(), key=lambda attribute: attribute.name)
        )
        yield self.graph(name, function.graph, "", f" {{{attributes}}}" * bool(attributes), function)

    def graph(
        self, head: str, graph: ir.Graph, indent: str, tail: str = "", function: ir.Function | None = None
    ) -> _Lines:
        """The signature and, one step further in, the initializers in graph order and the nodes."""
        name = _quoted(graph.name or "") if function is None and graph.name else ""
        inputs, outputs = ", ".join(map(_typed, graph.inputs)), ", ".join(map(_typed, graph.outputs))
        opsets = f" {_opsets(graph.opset_imports)}" if function is not None else ""
        yield f"{indent}{head}{name}({inputs}) -> ({outputs}){tail}{opsets}{_notes(graph)}"
        indent += "  "
        for value in graph.inputs:
            if notes := _notes(value):
                yield f"{indent}{_value(value)}:{notes}"
        for value in sorted(graph.initializers.values(), key=_is_sparse):  # ONNX keeps sparse ones apart
            if (tensor := value.const_value) is None:
                yield f"{indent}{_value(value)}: {type_text(value.type, value.shape)} = nothing"
            else:
                notes = "" if value.is_graph_input() else _notes(value)
                yield f"{indent}{_value(value)}: {self.tensor(tensor, ' = ')}{notes}"
        for node in graph:
            yield indent + self.node(node)
            for value in node.outputs:
                if notes := _notes(value):
                    yield f"{indent}  {_value(value)}:{notes}"
            for word, body in bodies(node):
                yield self.graph(f"{printable(word)}: ", body, indent + "  ")

    def node(self, node: ir.Node) -> str:
        outputs = list(node.outputs)
        while outputs and not outputs[-1].name:  # saving drops outputs left out at the end
            outputs.pop()
        results = ", ".join(_value(value) if value.is_graph_output() else _typed(value) for value in outputs)
        inputs = ", ".join(map(_value, node.inputs))
        domain = f"{node.domain}::" if node.domain else ""
        operator = printable(domain + node.op_type + f":{node.overload}" * bool(node.overload))
        attributes = ", ".join(
            f"{printable(name)}={self.attribute(attribute)}"
            for name, attribute in sorted(node.attributes.items())
            if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        )
        name = f"  # {printable(node.name)}" if node.name else ""
        notes = "".join(f" on {_devices(item)}" for item in node.device_configurations) + _notes(node)
        return f"{results or '_'} = {operator}({inputs}){f' {{{attributes}}}' * bool(attributes)}{name}{notes}"

    def attribute(self, attribute: ir.Attr) -> str:
        if attribute.is_ref():
            return f"@{printable(attribute.ref_attr_name or '')}"
        match attribute.type:
            case ir.AttributeType.FLOAT | ir.AttributeType.FLOATS:
                return _list(attribute.value, lambda number: str(np.float32(number)))
            case ir.AttributeType.TENSOR | ir.AttributeType.TENSORS:
                return _list(attribute.value, lambda tensor: self.tensor(tensor, " "))
            case ir.AttributeType.TYPE_PROTO | ir.AttributeType.TYPE_PROTOS:
                return _list(attribute.value, lambda item: type_text(item.type, item.shape))
            case ir.AttributeType.STRING | ir.AttributeType.STRINGS:
                return _list(attribute.value, _note)
            case ir.AttributeType.INT | ir.AttributeType.INTS:
                return _list(attribute.value, str)
        return attribute.type.name.lower()

    def tensor(self, tensor: ir.TensorProtocol, between: str) -> str:
        content = tensor_text(tensor, digests=self.digests)
        return f"{type_text(ir.TensorType(tensor.dtype), tensor.shape)}{between}{content}"


def _is_sparse(value: ir.Value) -> bool:
    return type(value.const_value) is SparseTensor


def _flatten(lines: _Lines) -> Iterator[str]:
    stack = [lines]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif isinstance(item, str):
            yield item
        else:
            stack.append(item)


def _opsets(imports: Mapping[str, int]) -> str:
    shown = ", ".join(f"{printable(domain) or 'ai.onnx'}: {imports[domain]}" for domain in sorted(imports))
    return f"opsets={{{shown}}}"


def _quoted(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else '"' + printable(name).replace('"', '\\"') + '"'


def _value(value: ir.Value | None) -> str:
    return f"%{_quoted(value.name)}" if value is not None and value.name else "_"


def _typed(value: ir.Value) -> str:
    if value.type is None and value.shape is None:
        return _value(value)
    return f"{_value(value)}: {type_text(value.type, value.shape)}"


def _dim(dim: int | ir.SymbolicDimProtocol) -> str:
    if isinstance(dim, int):
        return str(dim)
    return "?" if dim.value is None else _quoted(str(dim.value))


def dtype_text(dtype: ir.DataType) -> str:
    """``float32``, ``int4``, ``string``: the name that numpy and ml_dtypes have for the type."""
    if dtype == ir.DataType.STRING:
        return "string"
    return "undefined" if dtype == ir.DataType.UNDEFINED else str(dtype.numpy())


def _values(tensor: ir.TensorProtocol) -> str:
    shown = [_element(element) for element in tensor.numpy().reshape(-1)]
    return ", ".join(shown) if tensor.shape.rank() == 0 else f"[{', '.join(shown)}]"


def _element(element: object) -> str:
    if isinstance(element, bytes):
        return repr(element.decode(errors="backslashreplace"))
    return repr(element) if isinstance(element, str) else str(element)


def _sparse(tensor: SparseTensor, digests: bool) -> str:
    if tensor.count <= FEW and not digests:
        shown = (f"{place}: {_element(element)}" for place, element in zip(*tensor.entries(), strict=True))
        return f"sparse {{{', '.join(shown)}}}"
    if not digests and tensor.stored_bytes > LARGE:
        return f"sparse, {tensor.count} stored"
    places, values = tensor.entries()
    digest = blake2b(places.tobytes(), digest_size=32 if digests else 6)
    digest.update(values.tobytes())
    return f"sparse, {tensor.count} stored #{digest.hexdigest()}"


def _digest(tensor: ir.TensorProtocol, size: int) -> str:
    """blake2b of the tensor's bytes as ONNX stores them; of a string tensor, of each string after its length."""
    digest = blake2b(digest_size=size)
    if tensor.dtype == ir.DataType.STRING:
        for item in tensor.numpy().reshape(-1):
            content = item if isinstance(item, bytes) else str(item).encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    elif isinstance(tensor, MappedTensor | StreamedTensor):
        tensor.tofile(SimpleNamespace(write=digest.update))  # never whole in memory
    else:
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _list(value: object, show: Callable[[Any], str]) -> str:
    if not isinstance(value, tuple):
        return show(value)
    shown = [show(item) for item in value]
    if len(shown) > MANY:
        rest = f"... {len(shown)} in all #{_hash(', '.join(shown))}"
        shown = [*shown[:FEW], rest]
    return f"[{', '.join(shown)}]"


def _hash(content: str) -> str:
    return blake2b(content.encode(errors="surrogatepass"), digest_size=6).hexdigest()


def _note(content: str | bytes) -> str:
    if len(content) <= LONG:
        return repr(content)
    return f"{content[: LONG // 2]!r}... #{_hash(repr(content))}"


def _notes(thing: ir.Graph | ir.Node | ir.Value) -> str:
    """Doc string, metadata and quantization annotation, where present, short enough to stay on the line."""
    notes = f" doc {_note(thing.doc_string)}" if thing.doc_string else ""
    if metadata := thing.metadata_props:
        content = ", ".join(f"{_quoted(key)}={value!r}" for key, value in sorted(metadata.items()))
        if len(content) > LONG:
            content = f"{len(metadata)}: #{_hash(content)}"
        notes += f" meta {{{content}}}"
    if isinstance(thing, ir.Value) and (names := thing.meta.get(ANNOTATION)):
        notes += f" quantized {{{', '.join(f'{_quoted(role)}=%{_quoted(names[role])}' for role in sorted(names))}}}"
    return notes


def _devices(configuration: ir.ModelConfiguration | ir.NodeDeviceConfiguration) -> str:
    """A group of devices, or where a node runs in one and how its values are split, in brief."""
    if isinstance(configuration, ir.ModelConfiguration):
        names = f" {_list(configuration.device_names, _quoted)}" * bool(configuration.device_names)
        return f"{_quoted(configuration.name)}: {configuration.num_devices}{names}"
    name = configuration.configuration.name if configuration.configuration is not None else ""
    shown = [] if configuration.pipeline_stage is None else [f"stage {configuration.pipeline_stage}"]
    for spec in configuration.sharding_specs:
        rest = repr((spec.device, spec.index_to_device_group_map, spec.sharded_dims))
        shown.append(f"{_value(spec.value)} #{_hash(rest)}")
    return _quoted(name) + f" {{{', '.join(shown)}}}" * bool(shown)


def _span(start: int, end: int) -> str:
    length = end - start
    return str(start + 1) if length == 1 else f"{start + bool(length)},{length}"


class _Patience(difflib.SequenceMatcher[str]):
    a: Sequence[str]
    b: Sequence[str]

    def get_matching_blocks(self) -> list[difflib.Match]:
        blocks: list[difflib.Match] = []
        i = j = 0
        for x, y in (*_anchors(self.a, self.b), (len(self.a), len(self.b))):
            if 0 < (x - i) * (y - j) <= 1 << 20:
                gap = difflib.SequenceMatcher(None, self.a[i:x], self.b[j:y], autojunk=False)
                blocks += (difflib.Match(i + a, j + b, size) for a, b, size in gap.get_matching_blocks() if size)
            blocks.append(difflib.Match(x, y, int(x < len(self.a))))
            i, j = x + 1, y + 1
        return _joined(blocks)


def _anchors(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """The longest run of lines, in order on both sides, that occur once on each."""
    olds, news = Counter(old), Counter(new)
    place = {line: j for j, line in enumerate(new) if news[line] == 1 == olds.get(line)}
    pairs = [(i, place[line]) for i, line in enumerate(old) if line in place]
    ends: list[int] = []  # the smallest last place of an increasing run of each length
    lasts: list[int] = []  # the pair that ends that run
    before: list[int] = []  # for each pair, the one before it in its run
    for index, (_, j) in enumerate(pairs):
        length = bisect.bisect_left(ends, j)
        ends[length : length + 1] = [j]
        lasts[length : length + 1] = [index]
        before.append(lasts[length - 1] if length else -1)
    run: list[tuple[int, int]] = []
    index = lasts[-1] if lasts else -1
    while index >= 0:
        run.append(pairs[index])
        index = before[index]
    return run[::-1]


def _joined(blocks: Iterable[difflib.Match]) -> list[difflib.Match]:
    joined: list[difflib.Match] = []
    for block in blocks:
        last = joined[-1] if joined else None
        if block.size and last and (last.a + last.size, last.b + last.size) == (block.a, block.b):
            joined[-1] = difflib.Match(last.a, last.b, last.size + block.size)
        else:
            joined.append(block)
    return joined
