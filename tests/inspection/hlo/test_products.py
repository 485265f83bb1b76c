"""Matrix products as XLA prints them for CPU, TPU and CUDA; a failure means a misread size.

The literals are shortened from what XLA printed for CPU, TPU v5e and H100; oneDNN's follows its
documented form, as JAX's own builds do not use it.
"""

import pytest

from tests.inspection.hlo.cases import module
from tpmlp.inspection.hlo.counts import known, merged, total
from tpmlp.inspection.hlo.products import Product, products

ONEDNN = 'custom_call_target="__onednn$matmul", backend_config={"onednn_matmul_config":{}}'
DILATED = "window={size=4 stride=3 lhs_dilate=4}"


def cublas(lhs_dim, rhs_dim, batch="", target="__cublas$lt$matmul"):
    """Return the configuration of a product that sums over these dims."""
    dims = (
        f'"lhs_contracting_dimensions":["{lhs_dim}"],"rhs_contracting_dimensions":["{rhs_dim}"],'
        f'"lhs_batch_dimensions":[{batch}],"rhs_batch_dimensions":[{batch}]'
    )
    config = f'{{"gemm_backend_config":{{"dot_dimension_numbers":{{{dims}}}}}}}'
    return f'custom_call_target="{target}", backend_config={config}'


def only_product(shapes, text):
    lhs, rhs, out = shapes
    (found,) = products(
        module(f"%a = {lhs} parameter(0)", f"%b = {rhs} parameter(1)", f"ROOT %c = {out} {text}")
    )
    return found


# (lhs, rhs, result, the rest of the line) -> (batch, m, k, n)
FORMS = [
    (
        ("f32[2,3]{1,0}", "f32[3,5]{1,0}", "f32[2,5]{1,0}"),
        "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        (1, 2, 3, 5),
    ),
    (
        ("f32[3,2]{1,0}", "f32[5,3]{1,0}", "f32[2,5]{1,0}"),
        "dot(%a, %b), lhs_contracting_dims={0}, rhs_contracting_dims={1}",
        (1, 2, 3, 5),
    ),
    (
        ("f32[7,2,3]{2,1,0}", "f32[7,3,5]{2,1,0}", "f32[7,2,5]{2,1,0}"),
        "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}",
        (7, 2, 3, 5),
    ),
    (
        # The sum of TN split in four, as CUDA programs do.
        ("f32[4,128,2]{2,1,0}", "f32[4,128,3]{2,1,0}", "f32[4,2,3]{2,1,0}"),
        "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={1}, "
        'rhs_batch_dims={0}, rhs_contracting_dims={1}, backend_config={"sizes":["16"]}',
        (4, 2, 128, 3),
    ),
    (
        ("f32[11]{0}", "f32[11]{0}", "f32[]"),
        "dot(%a, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}",
        (1, 1, 11, 1),
    ),
    (
        ("f32[2,3]{1,0}", "f32[3,5]{1,0}", "f32[2,5]{1,0}"),
        "convolution(%a, %b), dim_labels=bf_io->bf",
        (1, 2, 3, 5),
    ),
    (
        ("f32[3,2]{1,0}", "f32[5,3]{1,0}", "f32[2,5]{1,0}"),
        "convolution(%a, %b), dim_labels=fb_oi->bf",
        (1, 2, 3, 5),
    ),
    (
        # A batched product, as TPU programs write it.
        ("f32[4,2,3]{2,1,0}", "f32[4,3,5]{2,1,0}", "f32[4,2,5]{2,1,0}"),
        f"convolution(%a, %b), {DILATED}, dim_labels=0bf_0io->0bf",
        (4, 2, 3, 5),
    ),
    (
        # A window of 3 x 3 on 5 x 5, at 4 + 5 + 4 entries along each dim inside the padding.
        ("f32[2,5,5,3]{3,2,1,0}", "f32[3,3,3,8]{3,2,1,0}", "f32[2,5,5,8]{3,2,1,0}"),
        "convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
        (13 * 13, 2, 3, 8),
    ),
    (
        ("f32[3,2]{1,0}", "f32[3,5]{1,0}", "(f32[2,5]{1,0}, s8[4194304]{0})"),
        f"custom-call(%a, %b), {cublas(0, 0)}",
        (1, 2, 3, 5),
    ),
    (
        ("f32[7,2,3]{2,1,0}", "f32[7,3,5]{2,1,0}", "(f32[7,2,5]{2,1,0}, s8[4194304]{0})"),
        f"custom-call(%a, %b), {cublas(2, 1, batch='0')}",
        (7, 2, 3, 5),
    ),
    (
        # With a matrix to add; its own name among XLA's calls for 8-bit operands.
        ("f32[2,3]{1,0}", "f32[3,5]{1,0}", "f32[2,5]{1,0}"),
        f"custom-call(%a, %b, %c0), {cublas(1, 0, target='__cublas$lt$matmul$f8')}",
        (1, 2, 3, 5),
    ),
    (
        ("f32[7,2,3]{2,1,0}", "f32[3,5]{1,0}", "f32[7,2,5]{2,1,0}"),
        f"custom-call(%a, %b), {ONEDNN}",
        (1, 14, 3, 5),
    ),
]


@pytest.mark.parametrize(("shapes", "text", "sizes"), FORMS)
def test_a_product_is_read_from_every_form(shapes, text, sizes):
    found = only_product(shapes, text)
    assert (found.batch, found.m, found.k, found.n) == sizes
    assert (found.dtype, found.count) == ("float32", 1)
    assert found.flops == found.total_flops == 2 * sizes[0] * sizes[1] * sizes[2] * sizes[3]


def test_operands_of_two_types_are_both_named():
    found = only_product(
        ("bf16[2,3]{1,0}", "f32[3,5]{1,0}", "f32[2,5]{1,0}"),
        "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    assert found.dtype == "bfloat16+float32"


def test_other_custom_calls_are_no_products():
    call = 'ROOT %c = f32[2,2]{1,0} custom-call(%a), custom_call_target="cu_threefry2x32"'
    assert products(module("%a = f32[2,2]{1,0} parameter(0)", call)) == ()


def test_products_that_differ_only_in_their_place_are_one_with_their_counts_added():
    fused = (
        "%fused (p: f32[2,2]) -> f32[2,2] {\n  %p = f32[2,2]{1,0} parameter(0)\n"
        "  ROOT %d = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={0}\n}\n"
    )
    fusion = "f32[2,2]{1,0} fusion(%a), kind=kCustom, calls=%fused"
    found = products(
        module(
            "%a = f32[2,2]{1,0} parameter(0)",
            f"%b = {fusion}",
            "%e = f32[2,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            "ROOT %c = f32[2,2]{1,0} conditional(%i, %a, %a), branch_computations={%fused, %fused}",
            before=fused,
        )
    )
    square = {"m": 2, "k": 2, "n": 2, "dtype": "float32"}
    assert found == (
        Product(**square, count=2),
        Product(**square, note="if branch 0 of 2 is taken"),
        Product(**square, note="if branch 1 of 2 is taken"),
    )


def test_a_sum_with_an_unknown_count_is_unknown_in_whichever_order():
    row = Product(m=1, k=1, n=1, dtype="float32")
    unknown = Product(m=1, k=1, n=1, dtype="float32", count=None)
    assert merged([row, unknown, row]) == merged([unknown, row]) == (unknown,)
    assert (total([1, None]), total([1, 2]), total([])) == (None, 3, 0)
    with pytest.raises(ValueError, match="got count=None for that"):
        known(None, "that")
