"""The comparison of protobufs: every change of every field is found, and explained only where the docs say so."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from reliability.differences import Difference, Explained, differences

from penjing.ir.files import load, save

Path_ = tuple[tuple[str, int], ...]

SENSIBLE = """
ir_version: 14  producer_name: "p"  model_version: 3
opset_import { domain: "" version: 21 } opset_import { domain: "ours" version: 1 }
metadata_props { key: "a" value: "1" } metadata_props { key: "b" value: "2" }
functions { name: "F" domain: "ours" input: "x" output: "y" attribute: "alpha"
  opset_import { domain: "" version: 21 }
  attribute_proto { name: "beta" type: FLOAT f: 0.5 } attribute_proto { name: "gamma" type: INT i: 1 }
  value_info { name: "h" type { tensor_type { elem_type: 1 } } }
  node { op_type: "Elu" input: "x" output: "h" attribute { name: "alpha" type: FLOAT ref_attr_name: "alpha" } }
  node { op_type: "Relu" input: "h" output: "y" }
}
graph { name: "main"
  input { name: "x" type { tensor_type { elem_type: 1 shape { dim { dim_param: "N" } dim { dim_value: 3 } dim {} } } } }
  input { name: "s" type { sequence_type { elem_type { tensor_type { elem_type: 1 } } } } }
  output { name: "y" type { tensor_type { elem_type: 1 shape {} } } }
  node { name: "one" op_type: "Add" input: "x" input: "w" output: "t"
    metadata_props { key: "from" value: "l" } metadata_props { key: "to" value: "m" } }
  node { op_type: "Split" input: "t" output: "u" output: "v"
    attribute { name: "axis" type: INT i: 0 } attribute { name: "num_outputs" type: INT i: 2 } }
  node { name: "if" op_type: "If" input: "c" output: "y"
    attribute { name: "then_branch" type: GRAPH g { name: "b" node { op_type: "Neg" input: "u" output: "k" }
      output { name: "k" } initializer { name: "k2" data_type: 7 dims: 1 int64_data: 5 } } } }
  node { op_type: "Constant" output: "c" attribute { name: "value" type: TENSOR
    t { name: "c" data_type: 9 dims: 1 raw_data: "\\001" } } }
  initializer { name: "w" data_type: 1 dims: 3 float_data: 1 float_data: 2 float_data: 3 }
  initializer { name: "i4" data_type: 22 dims: 3 raw_data: "\\041\\003" doc_string: "d" }
  sparse_initializer { dims: 4 values { name: "sp" data_type: 1 dims: 1 float_data: 2 }
    indices { data_type: 7 dims: 1 int64_data: 3 } }
  value_info { name: "t" type { tensor_type { elem_type: 1 shape { dim { dim_param: "N" } } } } }
  value_info { name: "u" type { tensor_type { elem_type: 1 } } }
  quantization_annotation { tensor_name: "t"
    quant_parameter_tensor_names { key: "SCALE_TENSOR" value: "w" }
    quant_parameter_tensor_names { key: "ZERO_POINT_TENSOR" value: "i4" } }
  quantization_annotation { tensor_name: "u" quant_parameter_tensor_names { key: "SCALE_TENSOR" value: "w" } }
}
"""

EXPLAINED = {  # all mutations of the sensible model that mean nothing
    "swap OperatorSetIdProto of ModelProto.opset_import",
    "swap StringStringEntryProto of ModelProto.metadata_props",
    "swap StringStringEntryProto of NodeProto.metadata_props",
    "swap StringStringEntryProto of TensorAnnotation.quant_parameter_tensor_names",
    "swap AttributeProto of FunctionProto.attribute_proto",
    "swap AttributeProto of NodeProto.attribute",
    "swap TensorProto of GraphProto.initializer",
    "swap ValueInfoProto of GraphProto.value_info",
    "swap TensorAnnotation of GraphProto.quantization_annotation",
    "double OperatorSetIdProto of ModelProto.opset_import",
    "double OperatorSetIdProto of FunctionProto.opset_import",
    "double StringStringEntryProto of ModelProto.metadata_props",
    "double StringStringEntryProto of NodeProto.metadata_props",
    "double StringStringEntryProto of TensorAnnotation.quant_parameter_tensor_names",
    "double AttributeProto of FunctionProto.attribute_proto",
    "double AttributeProto of NodeProto.attribute",
    "double TensorProto of GraphProto.initializer",
    "double SparseTensorProto of GraphProto.sparse_initializer",
    "double ValueInfoProto of GraphProto.value_info",
    "double ValueInfoProto of FunctionProto.value_info",
    "double TensorAnnotation of GraphProto.quantization_annotation",
    "clear OperatorSetIdProto.domain ''",
    "clear AttributeProto.i 0",
}


def sensible() -> onnx.ModelProto:
    return text_format.Parse(SENSIBLE, onnx.ModelProto())


def full() -> onnx.ModelProto:
    """A model with every field of every message, alternatives in turn, and no two values alike."""
    model = onnx.ModelProto()
    _fill(model, itertools.count(1), Counter())
    return model


def _fill(message: Any, numbers: Iterator[int], met: Counter[str]) -> None:
    """Set all plain fields of a message, and the first times that one of its kind is met the messages in it."""
    kind = message.DESCRIPTOR
    chosen = {group.name: group.fields[met[kind.full_name] % len(group.fields)].name for group in kind.oneofs}
    met[kind.full_name] += 1
    deep = met[kind.full_name] <= 6
    for field in kind.fields:
        group = field.containing_oneof
        if group is not None and chosen[group.name] != field.name:
            continue
        value = getattr(message, field.name)
        if field.message_type is None:
            _set(message, field, value, numbers)
        elif deep:
            single = hasattr(value, "DESCRIPTOR")
            value.SetInParent() if single else [value.add(), value.add()]
            for item in [value] if single else value:
                _fill(item, numbers, met)


def _set(message: Any, field: Any, value: Any, numbers: Iterator[int]) -> None:
    kind: Callable[[int], Any] = {
        "string": lambda n: f"s{n}",
        "bytes": lambda n: b"b%d" % n,
        "float": lambda n: n + 0.5,
        "enum": lambda n: field.enum_type.values[1].number,
    }.get(_kind(field), lambda n: n)
    if isinstance(value, int | float | str | bytes):
        setattr(message, field.name, kind(next(numbers)))
    else:
        value.extend([kind(next(numbers)), kind(next(numbers))])


def _kind(field: Any) -> str:
    if field.enum_type is not None:
        return "enum"
    if field.cpp_type == field.CPPTYPE_STRING:
        return "bytes" if field.type == field.TYPE_BYTES else "string"
    return "float" if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE) else "int"


def messages(model: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every message in a message, with the fields and places that lead to it."""
    yield path, model
    for field, value in model.ListFields():
        if field.message_type is not None:
            for place, item in enumerate([value] if hasattr(value, "DESCRIPTOR") else value):
                yield from messages(item, (*path, (field.name, place)))


def at(model: Any, path: Path_) -> Any:
    for name, place in path:
        value = getattr(model, name)
        model = value if hasattr(value, "DESCRIPTOR") else value[place]
    return model


def mutations(message: Any) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Ways to change one message, with their names: every field changed, cleared, and if repeated lengthened ..."""
    own = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        name, word = field.name, f"{own}.{field.name}"
        if isinstance(value, int | float | str | bytes):
            yield f"change {word}", lambda m, n=name: setattr(m, n, _other(getattr(m, n)))
            yield f"clear {word}" + ("" if value else f" {value!r}"), lambda m, n=name: m.ClearField(n)
        elif hasattr(value, "DESCRIPTOR"):
            yield f"clear {word}", lambda m, n=name: m.ClearField(n)
        else:
            of = word if field.message_type is None else f"{field.message_type.name} of {word}"
            yield f"shorten {of}", lambda m, n=name: getattr(m, n).pop()
            yield f"double {of}", lambda m, n=name: getattr(m, n).append(getattr(m, n)[-1])
            if len(value) > 1:
                yield f"swap {of}", lambda m, n=name: _swap(getattr(m, n))
            if field.message_type is None:
                yield f"change {of}", lambda m, n=name: _put(getattr(m, n), _other(getattr(m, n)[0]))


def _other(value: Any) -> Any:
    if isinstance(value, float):
        return float(np.nextafter(np.float32(value), np.float32(np.inf)))
    return value ^ 1 if isinstance(value, int) else value + type(value)(b"'" if isinstance(value, bytes) else "'")


def _put(values: Any, value: Any) -> None:
    values[0] = value


def _swap(values: Any) -> None:
    pair = values[:2]
    if hasattr(pair[0], "DESCRIPTOR"):
        copies = [type(item).FromString(item.SerializePartialToString()) for item in pair]
        values[0].CopyFrom(copies[1])
        values[1].CopyFrom(copies[0])
    else:
        values[0], values[1] = pair[1], pair[0]


def mutants(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    for path, message in list(messages(model)):
        for name, mutate in mutations(message):
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            mutate(at(copy, path))
            if copy != model:
                yield name, copy


def test_the_full_model_has_every_field_there_is() -> None:
    kinds: dict[str, Any] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        kind = waiting.pop()
        if kind.full_name not in kinds:
            kinds[kind.full_name] = kind
            waiting += [field.message_type for field in kind.fields if field.message_type is not None]
    every = {f"{kind.full_name}.{field.name}" for kind in kinds.values() for field in kind.fields}
    found = {
        f"{message.DESCRIPTOR.full_name}.{field.name}"
        for _, message in messages(full())
        for field, _ in message.ListFields()
    }
    assert found == every


def test_a_model_has_no_difference_from_itself() -> None:
    for model in (full(), sensible()):
        copy = onnx.ModelProto.FromString(model.SerializePartialToString())
        assert differences(model, copy) == []


def test_every_change_of_every_field_is_found() -> None:
    """One mutation of each kind and depth of place, both ways round."""
    model, seen = full(), set()
    for path, message in messages(model):
        for name, mutate in mutations(message):
            if name in seen:
                continue
            seen.add(name)
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            mutate(at(copy, path))
            if copy != model:
                assert differences(model, copy), name
                assert differences(copy, model), name
    assert len(seen) > 250


def test_only_what_is_documented_is_explained() -> None:
    explained, count = set(), 0
    for name, mutant in mutants(sensible()):
        count += 1
        for found in (differences(sensible(), mutant), differences(mutant, sensible())):
            assert found, name
            if all(difference.why for difference in found):
                explained.add(name)
    assert count > 300
    assert explained == EXPLAINED


def changed(edit: Callable[[onnx.ModelProto], object], start: onnx.ModelProto | None = None) -> list[Difference]:
    before = start or sensible()
    after = onnx.ModelProto()
    after.CopyFrom(before)
    edit(after)
    return differences(before, after)


def only(found: list[Difference]) -> Difference:
    (difference,) = found
    return difference


def test_sentences_name_place_found_and_expected() -> None:
    node = only(changed(lambda model: setattr(model.graph.node[1].attribute[0], "i", -1)))
    assert str(node) == "Split#1/axis: i is -1, was 0"
    inner = only(changed(lambda model: setattr(model.graph.node[2].attribute[0].g.node[0], "op_type", "Abs\x1b[2J")))
    assert str(inner) == r"if/then_branch/Neg#0: op_type is 'Abs\x1b[2J', was 'Neg'"
    dim = only(changed(lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 4)))
    assert str(dim) == "input x/tensor_type/shape/dim[1]: dim_value is 4, was 3"
    gone = only(changed(lambda model: model.graph.value_info.pop()))
    assert str(gone) == "model: value_info 'u' is gone"
    default = only(changed(lambda model: setattr(model.functions[0].attribute_proto[0], "f", 0.25)))
    assert str(default) == "functions F/attribute beta: f is 0.25, was 0.5"


@pytest.mark.parametrize(
    ("attribute", "a", "b"),
    [("floats", [0.0], [-0.0]), ("floats", [np.nan], [0.0]), ("f", 0.0, -0.0), ("floats", [1.0], [1.0000001])],
)
def test_numbers_compare_by_their_bits(attribute: str, a: Any, b: Any) -> None:
    def model(value: Any) -> onnx.ModelProto:
        held = onnx.AttributeProto(name="v", **{attribute: value})
        return onnx.ModelProto(graph=onnx.GraphProto(node=[onnx.NodeProto(attribute=[held])]))

    assert not differences(model(a), model(a))
    assert only(differences(model(a), model(b))).why is None


def tensor(**fields: Any) -> onnx.ModelProto:
    return onnx.ModelProto(graph=onnx.GraphProto(initializer=[TensorProto(name="w", **fields)]))


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {0, TensorProto.STRING}))
def test_elements_in_any_field_are_the_same(kind: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    array = np.array([1, 0, 1, 1, 0, 1, 0], np.float32).astype(dtype)
    if np.dtype(dtype).kind == "f":
        array[:2] = np.nan, -0.0
    raw = numpy_helper.from_array(array)
    if kind in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        flat = array.view(array.real.dtype).tolist()
        typed = TensorProto(data_type=kind, dims=[7])
        getattr(typed, helper.tensor_dtype_to_field(kind)).extend(flat)
    elif kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        typed = TensorProto(data_type=kind, dims=[7], int32_data=array.view(np.uint16).tolist())
    else:
        typed = helper.make_tensor("w", kind, [7], array.tolist() if np.dtype(dtype).kind in "fiub" else array)
    fields = [field.name for field, _ in typed.ListFields() if field.name.endswith("_data")]
    assert len(fields) == 1
    before = tensor(data_type=kind, dims=[7], raw_data=raw.raw_data)
    after = tensor(data_type=kind, dims=[7], **{fields[0]: getattr(typed, fields[0])})
    assert only(differences(before, after)).why is (None if fields == ["raw_data"] else Explained.STORAGE) or fields
    other = bytearray(raw.raw_data)
    other[0] ^= 1
    assert only(differences(before, tensor(data_type=kind, dims=[7], raw_data=bytes(other)))).why is None
    assert only(differences(after, tensor(data_type=kind, dims=[7], raw_data=bytes(other)))).why is None


def test_bits_after_the_last_element_do_not_count() -> None:
    a, b, c = (
        tensor(data_type=TensorProto.INT4, dims=[3], raw_data=raw) for raw in (b"\x21\x03", b"\x21\xf3", b"\x21\x13")
    )
    assert differences(a, b) == differences(a, c) == []
    assert only(differences(a, tensor(data_type=TensorProto.INT4, dims=[3], raw_data=b"\x21\x02"))).why is None


def test_data_files_are_read_where_they_are_named(tmp_path: Path) -> None:
    array = np.arange(5000, dtype=np.float32)
    (tmp_path / "d").write_bytes(b"....." + array.tobytes())
    out = tensor(data_type=1, dims=[5000], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "d"), ("offset", "5"), ("length", "20000")):
        out.graph.initializer[0].external_data.add(key=key, value=value)
    within = tensor(data_type=1, dims=[5000], raw_data=array.tobytes())
    folders = (str(tmp_path), str(tmp_path))
    assert only(differences(within, out, folders)).why is Explained.STORAGE
    array[4999] += 1
    other = tensor(data_type=1, dims=[5000], raw_data=array.tobytes())
    assert only(differences(out, other, folders)).why is None
    assert differences(out, out) == []
    assert all(difference.why is None for difference in differences(within, out))


def sparse(values: list[float], indices: list[list[int]] | list[int], dims: list[int]) -> onnx.SparseTensorProto:
    index = numpy_helper.from_array(np.array(indices, np.int64).reshape(np.shape(indices)))
    return onnx.SparseTensorProto(
        values=numpy_helper.from_array(np.array(values, np.float32), "w"), indices=index, dims=dims
    )


@pytest.mark.parametrize("indices", [[[0, 1], [1, 2]], [1, 5]])
def test_sparse_and_dense(indices: Any) -> None:
    dense = np.float32([[0, 2, 0], [0, 0, 3]])
    before = onnx.ModelProto(graph=onnx.GraphProto(sparse_initializer=[sparse([2, 3], indices, [2, 3])]))

    def after(array: np.ndarray) -> onnx.ModelProto:
        return onnx.ModelProto(graph=onnx.GraphProto(initializer=[numpy_helper.from_array(array, "w")]))

    assert only(differences(before, after(dense))).why is Explained.SPARSE
    dense[0, 0] = -0.0
    assert only(differences(before, after(dense))).why is None
    assert only(differences(before, after(np.float32([[0, 2, 0], [0, 3, 0]])))).why is None
    before.graph.sparse_initializer[0].values.doc_string = "lost"
    assert [one.why for one in differences(before, after(np.float32([[0, 2, 0], [0, 0, 3]])))] == [
        Explained.SPARSE,
        None,
    ]


def test_a_sparse_constant_may_become_a_dense_one() -> None:
    def model(node: onnx.NodeProto) -> onnx.ModelProto:
        return onnx.ModelProto(graph=onnx.GraphProto(node=[node]))

    held = sparse([2], [1], [3])
    before = model(helper.make_node("Constant", [], ["c"], sparse_value=held))
    dense = numpy_helper.from_array(np.float32([0, 2, 0]), "w")
    assert (
        only(differences(before, model(helper.make_node("Constant", [], ["c"], value=dense)))).why is Explained.SPARSE
    )
    other = helper.make_node("Other", [], ["c"], sparse_value=held), helper.make_node("Other", [], ["c"], value=dense)
    assert all(found.why is None for found in differences(*map(model, other)))


def test_an_ir_version_is_lowered_only_where_nothing_needs_it() -> None:
    assert only(changed(lambda model: setattr(model, "ir_version", 13))).why is Explained.IR_VERSION
    assert only(changed(lambda model: setattr(model, "ir_version", 12))).why is None
    small = sensible()
    small.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT6E2M3
    assert only(changed(lambda model: setattr(model, "ir_version", 13), small)).why is None
    cast = sensible()
    cast.graph.node[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT6E3M2))
    assert only(changed(lambda model: setattr(model, "ir_version", 13), cast)).why is None


def test_types_of_values_that_mean_nothing() -> None:
    def describe(model: onnx.ModelProto, name: str, shape: list[int | str] | None, doc: str = "") -> None:
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape, doc))

    for shape in ([3], None):
        assert only(changed(lambda model, shape=shape: describe(model, "w", shape))).why is Explained.IMPLIED
    assert only(changed(lambda model: describe(model, "w", [4]))).why is None
    assert only(changed(lambda model: describe(model, "w", [3], "said"))).why is None
    start = sensible()
    describe(start, "nowhere", [3])
    assert only(changed(lambda model: model.graph.value_info.pop(), start)).why is Explained.ELSEWHERE
    assert only(changed(lambda model: describe(model, "nowhere", [3]))).why is None


def test_names_of_the_standard_domain_and_outputs_left_out() -> None:
    assert only(changed(lambda model: setattr(model.graph.node[0], "domain", "ai.onnx"))).why is Explained.DOMAIN
    assert only(changed(lambda model: setattr(model.opset_import[0], "domain", "ai.onnx"))).why is Explained.DOMAIN
    assert only(changed(lambda model: setattr(model.graph.node[0], "domain", "other"))).why is None
    assert only(changed(lambda model: model.graph.node[1].output.append(""))).why is Explained.OMITTED
    assert only(changed(lambda model: model.graph.node[1].input.append(""))).why is None
    both = changed(lambda model: model.opset_import.add(domain="ai.onnx", version=21))
    assert {one.why for one in both} <= {Explained.REPEATED, Explained.DOMAIN}
    assert any(one.why is None for one in changed(lambda model: model.opset_import.add(domain="ai.onnx", version=20)))


def test_fields_that_onnx_does_not_know_count() -> None:
    found = changed(lambda model: model.graph.node[0].MergeFromString(b"\xf8\x07\x01"))
    assert "fields that onnx does not know" in str(only(found))
    assert only(found).why is None


def test_nesting_deeper_than_pythons_stack() -> None:
    def nested(depth: int, last: str) -> onnx.ModelProto:
        model = onnx.ModelProto()
        graph = model.graph
        for _ in range(depth):
            graph = graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
        graph.doc_string = last
        return model

    depth = 2 * sys.getrecursionlimit()
    found = only(differences(nested(depth, "a"), nested(depth, "b")))
    assert found.place.count("then_branch") == depth


def test_load_and_save_keep_the_sensible_model(tmp_path: Path) -> None:
    before = sensible()
    (tmp_path / "a.onnx").write_bytes(before.SerializeToString())
    save(load(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    found = differences(before, onnx.load(tmp_path / "b.onnx"))
    assert [str(difference) for difference in found if not difference.why] == []


def test_strings_and_types_said_twice() -> None:
    words = [tensor(data_type=TensorProto.STRING, dims=[2], string_data=[b"a", word]) for word in (b"b", b"b", b"c")]
    assert differences(*words[:2]) == []
    assert only(differences(*words[1:])).why is None
    start = sensible()
    start.graph.value_info.extend(helper.make_tensor_value_info("w", TensorProto.FLOAT, shape) for shape in ([3], [4]))
    found = changed(lambda model: [model.graph.value_info.pop() for _ in range(2)], start)
    assert only(found).why is None
