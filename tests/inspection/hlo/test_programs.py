"""Programs that XLA compiled for TPU and CUDA, read as their schedules say.

Each is JAX code compiled by jax 0.10.2 for four devices that were not there, shortened: metadata,
most configuration and the arithmetic on indices are left out. A failure means that the reader
misses, doubles or misplaces something in a whole program of that platform.

    tpu_ring      v5e, acc = ppermute(acc) + W_t @ h four times: three permutes
    tpu_gather    v5e, h = tanh(all_gather(W_l) @ h) twice, its second gather fused with a product
    cuda_gather   H100, the same and its gradient, products in Triton fusions
    cuda_ring     H100, z += W_t @ h; h = ppermute(h) four times, in a scan of five; cuBLAS products
"""

from pathlib import Path

import pytest

from tpmlp.inspection.hlo.collectives import collectives
from tpmlp.inspection.hlo.products import Product, products
from tpmlp.inspection.hlo.text import parse_module

PROGRAMS = Path(__file__).parent / "programs"
RING, TANH = {"m": 512, "k": 512, "n": 1024}, {"m": 4096, "k": 4096, "n": 1024}

# name -> (kind, bytes of the whole array, asynchronous, count, products meanwhile) of each, in
# program order
COLLECTIVES = {
    "tpu_ring": [
        ("ppermute", 2**20, True, 1, []),
        ("ppermute", 2**20, True, 1, [(RING, 1)]),
        ("ppermute", 2**20, True, 1, [(RING, 1)]),
    ],
    "tpu_gather": [
        ("all_gather", 2**25, False, 1, []),
        ("all_gather", 2**25, True, 1, [(TANH, 1)]),
    ],
    "cuda_gather": [
        ("all_gather", 2**25, False, 1, []),
        ("all_gather", 2**25, True, 1, [(TANH, 1)]),
        ("reduce_scatter", 2**26, False, 1, []),
    ],
    "cuda_ring": [
        ("ppermute", 2**20, False, 5, []),
        ("ppermute", 2**20, False, 5, []),
        ("ppermute", 2**20, True, 5, [(RING, 3)]),
    ],
}
PRODUCTS = {
    "tpu_ring": [(RING, 4)],
    "tpu_gather": [(TANH, 2)],
    "cuda_gather": [(TANH, 3), ({"m": 4096, "k": 1024, "n": 4096}, 2)],
    "cuda_ring": [(RING, 20)],
}


def program(name):
    return parse_module((PROGRAMS / f"{name}.txt").read_text())


def of(rows):
    return tuple(Product(**sizes, dtype="bfloat16", count=count) for sizes, count in rows)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_each_collective_is_found_once_with_what_runs_meanwhile(name):
    assert [
        (found.kind, found.payload_bytes, found.asynchronous, found.count, found.overlaps)
        for found in collectives(program(name))
    ] == [(*row, of(overlaps)) for *row, overlaps in COLLECTIVES[name]]


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_product_is_found_as_often_as_it_runs(name):
    assert products(program(name)) == of(PRODUCTS[name])
