"""Ways to break a model file: on its bytes, on the wire format, on the fields of its protobuf, in its data files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

EDGES = (-1, 0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))
HOSTILE = (
    *("", " ", ".", "..", "/", "\\", "x" * 300, "ai.onnx", "ai.onnx.ml", "com.microsoft", "Constant", "If", "Loop"),
    *(
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "line\nbreak",
        "tab\tbell\a",
        "nul\0nul",
        "\u202eright to left",
        "\x9b2J",
    ),
    *("[red]markup[/red]", "[link=file:///etc/passwd]x[/link]", "[/]", "%s{0}$(x)`x`", "../canary.bin", "/etc/passwd"),
)
_SIZES = ("dims", "dim_value", "ints", "data_type", "elem_type")
OFFSETS = (
    *("-1", "0", "1", "64", "1e9", "0x10", "\u0661\u0662", " 1", "1_000", "+1", "", "nan", "4096", "2147483648"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "9" * 40),
)
LOCATIONS = (
    *("../canary.bin", "./w.bin", "sub/../w.bin", "sub/../../canary.bin", "/etc/passwd", "/dev/zero", "/proc/self/mem"),
    *(
        "",
        ".",
        "..",
        "none.bin",
        "link.bin",
        "folder/canary.bin",
        "hard.bin",
        "pipe",
        "w.bin\0",
        "w.bin/",
        "mutant.onnx",
    ),
    *(
        "saved.onnx",
        "\x1b[31m.bin",
        "file://w.bin",
        "~/w.bin",
        "/",
        "a" * 5000,
        "//../canary.bin",
        "./" * 3000 + "w.bin",
    ),
)
"""Of the last two lines some lead outside; the harness lays links, a pipe and a canary in their way."""


@dataclass(frozen=True)
class Sample:
    """A sound model: its file, and the data files beside it by name."""

    name: str
    model: bytes
    data: dict[str, bytes] = field(default_factory=dict)


Corpus = Sequence[Sample]
Mutation = Callable[[random.Random, Sample, Corpus], Sample | None]


def mutant(seed: int, number: int, corpus: Corpus) -> tuple[str, Sample]:
    """The mutant of that number, and the kinds of what was done to it: the same for the same corpus and seed."""
    rng = random.Random(f"{seed}/{number}")
    sample = rng.choice(corpus)
    kinds = []
    while not kinds or rng.random() < 0.4:
        names = [name for name in MUTATIONS if sample.data or not name.startswith("data")]
        kind = rng.choices(names, [_weight(name) for name in names])[0]
        changed = MUTATIONS[kind](rng, sample, corpus)
        if changed is not None and changed != sample:
            sample = changed
            kinds.append(kind)
    return "+".join(sorted(set(kinds))), sample


# Bytes ----------------------------------------------------------------------------------------------------------------


def _on_bytes(change: Callable[[random.Random, bytearray], None]) -> Mutation:
    def mutation(rng: random.Random, sample: Sample, corpus: Corpus) -> Sample | None:
        if not sample.model:
            return None
        contents = bytearray(sample.model)
        change(rng, contents)
        return Sample(sample.name, bytes(contents), sample.data)

    return mutation


def _span(rng: random.Random, contents: bytes | bytearray) -> tuple[int, int]:
    start = rng.randrange(len(contents))
    return start, min(len(contents), start + min(rng.randint(1, 8) ** rng.randint(1, 4), len(contents)))


def _flip_bits(rng: random.Random, contents: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)


def _run(rng: random.Random, contents: bytearray) -> None:
    start, stop = _span(rng, contents)
    contents[start:stop] = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f", b"\x1b", b"[")) * (stop - start)


def _noise(rng: random.Random, contents: bytearray) -> None:
    start, stop = _span(rng, contents)
    contents[start:stop] = rng.randbytes(stop - start)


def _truncate(rng: random.Random, contents: bytearray) -> None:
    del contents[rng.randrange(len(contents)) :]


def _repeat(rng: random.Random, contents: bytearray) -> None:
    start, stop = _span(rng, contents)
    contents[stop:stop] = contents[start:stop] * rng.choice((1, 1, 2, 50))


def _delete(rng: random.Random, contents: bytearray) -> None:
    start, stop = _span(rng, contents)
    del contents[start:stop]


def _insert(rng: random.Random, contents: bytearray) -> None:
    start = rng.randrange(len(contents) + 1)
    contents[start:start] = rng.randbytes(rng.randint(1, 20))


# The wire format ------------------------------------------------------------------------------------------------------


@dataclass
class _Record:
    """A field on the wire: ``tag``, the whole of its payload, and where it is a message the fields in it."""

    tag: int
    payload: bytes
    inside: list[_Record] | None = None

    def encode(self) -> bytes:
        payload = self.payload if self.inside is None else b"".join(record.encode() for record in self.inside)
        return _varint(self.tag) + (_varint(len(payload)) if self.tag & 7 == 2 else b"") + payload


def _varint(number: int, padding: int = 0) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    for _ in range(padding):  # longer than it must be, which readers accept up to ten bytes
        out[-1] |= 128
        out.append(0)
    return bytes(out)


def _read_varint(contents: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = contents[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


def _records(contents: bytes, message: Any) -> list[_Record]:
    """The fields of a message; raises ``ValueError`` or ``IndexError`` for what is none."""
    found, place = [], 0
    while place < len(contents):
        tag, place = _read_varint(contents, place)
        kind = tag & 7
        if kind == 0:
            stop = _read_varint(contents, place)[1]
        elif kind in (1, 5):
            stop = place + (8 if kind == 1 else 4)
        elif kind == 2:
            length, place = _read_varint(contents, place)
            stop = place + length
        else:
            raise ValueError("groups")
        if stop > len(contents):
            raise ValueError("cut short")
        known = message.fields_by_number.get(tag >> 3)
        inside = None
        if kind == 2 and known is not None and known.message_type is not None:
            inside = _records(contents[place:stop], known.message_type)
        found.append(_Record(tag, contents[place:stop], inside))
        place = stop
    return found


def _lists(records: list[_Record]) -> Iterator[list[_Record]]:
    if records:
        yield records
    for record in records:
        yield from _lists(record.inside or [])


def _wire(rng: random.Random, sample: Sample, corpus: Corpus) -> Sample | None:
    """Duplicated, unknown, regrouped and reordered fields, unlike wire types, over-long varints."""
    try:
        records = _records(sample.model, onnx.ModelProto.DESCRIPTOR)
    except (ValueError, IndexError):
        return None
    choices = list(_lists(records))
    if not choices:
        return None
    for _ in range(rng.randint(1, 3)):
        _rewire(rng, rng.choice(choices))
    return Sample(sample.name, b"".join(record.encode() for record in records), sample.data)


def _rewire(rng: random.Random, records: list[_Record]) -> None:
    place = rng.randrange(len(records)) if records else 0
    if not records:
        return
    record = records[place]
    match rng.randrange(8):
        case 0:
            records.insert(rng.randrange(len(records) + 1), record)
        case 1:
            record.tag = rng.choice((1, 2, 7, 20, 100, 19000, (1 << 29) - 1)) << 3 | record.tag & 7
        case 2:
            record.tag = record.tag & ~7 | rng.randrange(8)
        case 3:
            rng.shuffle(records)
        case 4 if record.tag & 7 == 0:
            number = _read_varint(record.payload, 0)[0]
            record.payload = _varint(number, rng.choice((1, 5, 9, 20)))
        case 4 | 5:
            unknown = rng.choice((b"", b"\x1b[31m", b"\xff\xfe", bytes(50)))
            records.insert(place, _Record(rng.randrange(1000, 9000) << 3 | 2, unknown))
        case 6:
            number = record.tag >> 3
            records[place : place + 1] = [_Record(number << 3 | 3, b""), record, _Record(number << 3 | 4, b"")]
        case 7:
            record.payload, record.inside = rng.randbytes(rng.randint(0, 12)), None


# Fields ---------------------------------------------------------------------------------------------------------------


def _on_fields(change: Callable[[random.Random, onnx.ModelProto, Corpus], None]) -> Mutation:
    def mutation(rng: random.Random, sample: Sample, corpus: Corpus) -> Sample | None:
        proto = _parsed(sample)
        if proto is None:
            return None
        change(rng, proto, corpus)
        try:
            return Sample(sample.name, proto.SerializeToString(), sample.data)
        except Exception:  # nested deeper than protobuf writes
            return None

    return mutation


def _parsed(sample: Sample) -> onnx.ModelProto | None:
    try:
        return onnx.ModelProto.FromString(sample.model)
    except Exception:
        return None


def _messages(message: Any) -> Iterator[Any]:
    stack = [message]
    while stack:
        message = stack.pop()
        yield message
        for about, value in message.ListFields():
            if about.message_type is not None:
                stack += value if about.is_repeated else [value]


def _fields(proto: Any, wanted: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
    """The fields that are set and wanted, each with its message."""
    return [(message, about) for message in _messages(proto) for about, _ in message.ListFields() if wanted(about)]


def _is_text(about: Any) -> bool:
    return about.type == Field.TYPE_STRING or (about.type == Field.TYPE_BYTES and about.name == "s")


def _is_number(about: Any) -> bool:
    return about.cpp_type in (Field.CPPTYPE_INT32, Field.CPPTYPE_INT64, Field.CPPTYPE_UINT64, Field.CPPTYPE_ENUM)


def _is_message(about: Any) -> bool:
    return about.message_type is not None


def _put(rng: random.Random, message: Any, about: Any, value: Any) -> None:
    """Set a field, or one entry of it; a value that it does not take is left out."""
    try:
        if not about.is_repeated:
            setattr(message, about.name, value)
        else:
            entries = getattr(message, about.name)
            entries[rng.randrange(len(entries))] = value
    except (ValueError, TypeError):
        pass


def _splice(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    """A message of another model in the place of one of the same type, or beside it."""
    donor = _parsed(rng.choice(corpus))
    if donor is None:
        return
    found = _fields(proto, _is_message)
    if not found:
        return
    message, about = rng.choice(found)
    like = [m for m in _messages(rng.choice((donor, proto))) if m.DESCRIPTOR is about.message_type]
    if not like:
        return
    copy = _copy(rng.choice(like))  # it may hold what it replaces, or be held by it
    if not about.is_repeated:
        getattr(message, about.name).CopyFrom(copy)
    elif rng.random() < 0.5:
        rng.choice(getattr(message, about.name)).CopyFrom(copy)
    else:
        getattr(message, about.name).add().CopyFrom(copy)


def _copy(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


def _graft(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    """A field, set or not, from anywhere in another model."""
    donor = _parsed(rng.choice(corpus))
    if donor is None:
        return
    given, about = rng.choice(_fields(donor, lambda _: True))
    takers = [message for message in _messages(proto) if message.DESCRIPTOR is given.DESCRIPTOR]
    if takers:
        part = type(given)()
        value = getattr(given, about.name)
        if about.is_repeated:
            getattr(part, about.name).extend(value)
        elif about.message_type is not None:
            getattr(part, about.name).CopyFrom(value)
        else:
            setattr(part, about.name, value)
        rng.choice(takers).MergeFrom(part)


def _edge(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    if found := _fields(proto, _is_number):
        message, about = rng.choice(found)
        _put(rng, message, about, rng.choice((*EDGES, rng.randint(0, 30))))


def _dims(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    found = _fields(proto, lambda about: _is_number(about) and about.name in _SIZES)
    if found:
        message, about = rng.choice(found)
        _put(rng, message, about, rng.choice((*EDGES, *range(30))))
        if about.is_repeated and rng.random() < 0.3:
            getattr(message, about.name).extend(rng.choices(EDGES, k=rng.choice((1, 2, 40))))


def _rename(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    """A text becomes another of the model: cycles, doubles, captures, recursion."""
    found = _fields(proto, _is_text)
    if not found:
        return
    message, about = rng.choice(found)
    other, from_ = rng.choice(found if rng.random() < 0.3 else [f for f in found if f[1].name == about.name])
    value = getattr(other, from_.name)
    _put(rng, message, about, rng.choice(value) if from_.is_repeated else value)


def _hostile(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    if found := _fields(proto, _is_text):
        message, about = rng.choice(found)
        value = rng.choice(HOSTILE)
        _put(rng, message, about, value.encode() if about.type == Field.TYPE_BYTES else value)


def _drop(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    message, about = rng.choice(_fields(proto, lambda _: True) or [(proto, proto.DESCRIPTOR.fields[0])])
    if about.is_repeated and rng.random() < 0.7 and len(getattr(message, about.name)):
        del getattr(message, about.name)[rng.randrange(len(getattr(message, about.name)))]
    else:
        message.ClearField(about.name)


def _double(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    if found := _fields(proto, lambda about: about.is_repeated):
        message, about = rng.choice(found)
        entries = getattr(message, about.name)
        entry = rng.choice(entries)
        entries.extend([entry if about.message_type is None else _copy(entry)] * rng.choice((1, 1, 2, 100)))


def _order(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    if found := _fields(proto, lambda about: about.is_repeated and about.message_type is not None):
        message, about = rng.choice(found)
        entries = [_copy(entry) for entry in getattr(message, about.name)]
        rng.shuffle(entries)
        del getattr(message, about.name)[:]
        getattr(message, about.name).extend(entries)


def _nest(rng: random.Random, proto: onnx.ModelProto, corpus: Corpus) -> None:
    """A graph becomes a body of one of its own nodes."""
    graph = rng.choice([m for m in _messages(proto) if isinstance(m, onnx.GraphProto)] or [proto.graph])
    if not graph.node:
        return
    inner = _copy(graph)
    node = rng.choice(graph.node)
    for name in rng.choice((("body",), ("then_branch", "else_branch"))):
        node.attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
    node.op_type = rng.choice((node.op_type, "If", "Loop", "Scan"))


# Data files -----------------------------------------------------------------------------------------------------------


def _entries(rng: random.Random, sample: Sample, corpus: Corpus) -> Sample | None:
    proto = _parsed(sample)
    if proto is None:
        return None
    entries = [entry for m in _messages(proto) if isinstance(m, onnx.TensorProto) for entry in m.external_data]
    if not entries:
        return None
    entry = rng.choice(entries)
    match rng.randrange(6):
        case 0:
            entry.key = rng.choice(("location", "offset", "length", "checksum", "basepath", "\x1b[1m"))
        case _ if entry.key == "location":
            entry.value = rng.choice((*LOCATIONS, *sample.data))
        case _:
            entry.value = rng.choice(OFFSETS)
    return Sample(sample.name, proto.SerializeToString(), sample.data)


def _contents(rng: random.Random, sample: Sample, corpus: Corpus) -> Sample | None:
    name = rng.choice(list(sample.data))
    contents = bytearray(sample.data[name])
    if contents:
        rng.choice((_flip_bits, _noise, _truncate, _delete, _repeat))(rng, contents)
    data = dict(sample.data)
    if rng.random() < 0.2:
        del data[name]
    else:
        data[name] = bytes(contents)
    return Sample(sample.name, sample.model, data)


MUTATIONS: dict[str, Mutation] = {
    "flip bits": _on_bytes(_flip_bits),
    "byte run": _on_bytes(_run),
    "noise": _on_bytes(_noise),
    "truncate": _on_bytes(_truncate),
    "repeat span": _on_bytes(_repeat),
    "delete span": _on_bytes(_delete),
    "insert bytes": _on_bytes(_insert),
    "wire format": _wire,
    "splice": _on_fields(_splice),
    "graft field": _on_fields(_graft),
    "edge number": _on_fields(_edge),
    "dimensions": _on_fields(_dims),
    "rename": _on_fields(_rename),
    "hostile text": _on_fields(_hostile),
    "drop field": _on_fields(_drop),
    "double entries": _on_fields(_double),
    "reorder": _on_fields(_order),
    "nest": _on_fields(_nest),
    "data: entries": _entries,
    "data: contents": _contents,
}


def _weight(kind: str) -> int:
    """Most mutations of bytes break only the syntax; few samples have data files."""
    if kind.startswith("data"):
        return 20
    return 1 if MUTATIONS[kind].__qualname__ == "_on_bytes.<locals>.mutation" else 3
