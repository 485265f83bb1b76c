"""Shapes as XLA prints them; a failure means that one printed form is misread."""

import pytest

from tpmlp.inspection.hlo.text import Array, parse_shape


@pytest.mark.parametrize(
    ("text", "dtype", "dims", "num_bytes"),
    [
        ("f32[2,8]{1,0}", "float32", (2, 8), 64),
        ("f64[]", "float64", (), 8),
        ("bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}", "bfloat16", (512, 1024), 2**20),
        ("pred[3]{0}", "bool", (3,), 3),
        ("s4[5]{0:E(4)}", "int4", (5,), 3),
        ("u32[]{:S(2)}", "uint32", (), 4),
        ("c64[2]", "complex64", (2,), 16),
        ("f8e4m3fn[16]{0}", "float8_e4m3fn", (16,), 16),
        ("f32[0,8]{1,0}", "float32", (0, 8), 0),
        ("token[]", "token", (), 0),
    ],
)
def test_an_array_shape_has_its_type_dims_and_bytes(text, dtype, dims, num_bytes):
    assert parse_shape(text) == Array(dtype=dtype, dims=dims, num_bytes=num_bytes)


def test_a_tuple_shape_nests():
    word = Array(dtype="uint32", dims=(), num_bytes=4)
    block = Array(dtype="float32", dims=(2, 8), num_bytes=64)
    text = "((f32[2,8]{1,0:T(8,128)}), f32[2,8]{1,0}, u32[]{:S(2)}, ())"
    assert parse_shape(text) == ((block,), block, word, ())
