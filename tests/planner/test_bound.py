"""The bound is one: a failure means that a plan leaves out what fits."""

from itertools import product

import pytest

from tests.planner.cases import problem
from tpmlp.planner.bound import least_temp_bytes
from tpmlp.predict import layer_shapes, step_types
from tpmlp.strategy import Strategy

MODELS = [((64,) * 9, 256), ((256,) * 9, 16), ((16, 512, 64, 512, 8), 64), ((32, 48), 32)]
MESHES = [{}, {"x": 4}, {"x": 2, "y": 4}, {"data": 4}, {"data": 2, "x": 2, "y": 2}]
DTYPES = [("float32", None), ("float32", "bfloat16"), ("bfloat16", None)]


def bounds(model, mesh, types):
    """Yield the bound and the prediction for each way to keep, to split and to cut the batch."""
    (widths, batch_size), (dtype, compute_dtype) = model, types
    given = problem(widths, batch_size, dtype=dtype)
    for keep, shard, m in product(("shard", "gathered", "recompute"), (False, True), (1, 4)):
        strategy = Strategy(
            keep=keep, shard_weights=shard, microbatches=m, compute_dtype=compute_dtype
        )
        placement = given.place({"data": 1, "stage": 1, "x": 1, "y": 1, **mesh}, strategy)
        shapes = layer_shapes(placement, bias=True, batch_size=batch_size)
        least = least_temp_bytes(shapes, step_types(placement, dtype), strategy)
        yield least, given.temp_bytes(placement), strategy


@pytest.mark.parametrize("types", DTYPES, ids=["-".join(map(str, t)) for t in DTYPES])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=["square", "weights", "uneven", "linear"])
def test_no_step_holds_less_than_the_bound(model, mesh, types):
    for least, predicted, strategy in bounds(model, mesh, types):
        assert 0 <= least <= predicted, strategy


def test_the_bound_is_worth_something():
    found = [
        least / predicted
        for model, mesh in product(MODELS, MESHES)
        for least, predicted, _ in bounds(model, mesh, DTYPES[0])
    ]
    assert sum(found) / len(found) > 0.5
