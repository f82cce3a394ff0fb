"""What flattens the pixel of a pool of integers, without a Transpose of ONNX Runtime's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

import penjing
from penjing.models import zoo
from penjing.passes.base import Context
from penjing.passes.quantize.pooled import turn_pixels
from penjing.runtime.session import OrtRunner, optimized

Parse = Callable[[str], ir.Model]

HEAD = """m (float[batch,8,6,6] x) => (float y)
<float[16,8,3,3] w, int64[2] axes = {{2, 3}}, int64[2] last = {{-1, -2}}, int64[2] known = {{-1, 16}},
 int64[2] rest = {{0, -1}}, int64[2] other = {{-1, 8}}> {{
    c = Conv (x, w)
    r = Relu (c)
    p = GlobalAveragePool (r)
    y = {how}
}}"""


def head(parse: Parse, how: str) -> ir.Model:
    model = parse(HEAD.format(how=how))
    for node in model.graph:
        if node.op_type == "Conv":
            value = node.inputs[1]
            assert value is not None
            weight = np.random.default_rng(0).standard_normal((16, 8, 3, 3)).astype(np.float32)
            value.const_value = ir.tensor(weight, name="w")
            model.graph.initializers["w"] = value
    model.graph.outputs[0].shape = None
    return model


def data(runs: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return {"x": np.random.default_rng(1).standard_normal((runs, 8, 6, 6)).astype(np.float32)}


@pytest.mark.parametrize(
    ("how", "turned"),
    [
        ("Flatten (p)", True),
        ("Flatten <axis=-3> (p)", True),
        ("Squeeze (p, axes)", True),
        ("Squeeze (p, last)", True),
        ("Reshape (p, known)", True),
        ("Reshape (p, rest)", True),
        ("Reshape <allowzero=1> (p, known)", True),
        ("Flatten <axis=3> (p)", False),  # [N * C, 1]
        ("Reshape (p, other)", False),
        ("Identity (p)", False),
    ],
)
def test_a_pixel_is_flattened_in_the_order_it_has(how: str, turned: bool, parse: Parse) -> None:
    model = head(parse, how)
    penjing.run(model, "quantize-static{target=any},infer-shapes", data=data(32))
    plain = model.clone()
    turn_pixels(model, Context())
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["Transpose"] == int(turned)
    for runs in (0, 5) if "rest" not in how else (5,):
        before, after = (next(iter(OrtRunner().run(some, [data(runs)])))["y"] for some in (plain, model))
        assert before.shape == after.shape
        assert np.array_equal(before, after)
    if turned:
        last = [node.op_type for node in optimized(model).graph]
        assert last[last.index("QLinearGlobalAveragePool") + 1] == "Squeeze"


def test_a_pool_of_floats_stays_as_it_is(parse: Parse) -> None:
    model = head(parse, "Flatten (p)")
    before = [node.op_type for node in model.graph]
    turn_pixels(model, Context())
    assert [node.op_type for node in model.graph] == before


def test_quantizing_ends_with_it() -> None:
    model = zoo.load("cnn-a")
    penjing.run(model, "quantize-static", data={"image": zoo.data("validation")["image"][:64]})
    last = [node.op_type for node in optimized(model).graph]
    assert last[last.index("QLinearGlobalAveragePool") + 1] == "Squeeze"
