"""A plan has all there is, ranked, and runs; a failure means that it recommends something else."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest

import tpmlp
from tests.planner.cases import PLAIN, problem
from tpmlp.planner.hardware import Level
from tpmlp.planner.plan import Plan, plan
from tpmlp.planner.search import SMALLER, all_candidates, meshes, strategies

WIDTHS = (24, 32, 32, 32, 32, 32, 32, 16)
MODEL = tpmlp.MLP(WIDTHS)
# A FLOP takes a thousandth of what a byte does: neither products nor collectives decide alone.
MINE = replace(
    PLAIN,
    flops_per_s=dict.fromkeys(PLAIN.flops_per_s, 1e9),
    levels=(Level(name="link", devices=None, bytes_per_s=1e6, latency_s=1e-6),),
)


@pytest.fixture(scope="module")
def found() -> Plan:
    """Return a plan for 8 devices."""
    return plan(MODEL, 64, MINE, 8)


@pytest.fixture(scope="module")
def everything():
    """Return the cost of every candidate that the model can have, and how many it cannot."""
    costs, refused = [], 0
    for mesh, strategy in all_candidates(8, None):
        if mesh["data"] * strategy.microbatches > 64:
            refused += 1
            continue
        try:
            costs.append(problem(WIDTHS, 64, hardware=MINE).cost(mesh, strategy))
        except ValueError:
            refused += 1
    return costs, refused


@pytest.mark.parametrize("devices", [1, 2, 7, 12, 64])
def test_meshes_are_all_that_have_so_many_devices(devices):
    listed = [tuple(mesh.values()) for mesh in meshes(devices)]
    sizes = range(1, devices + 1)
    expected = {
        (data, stage, x, devices // (data * stage * x))
        for data in sizes
        for stage in sizes
        if devices % (data * stage) == 0
        for x in sizes
        if devices % (data * stage * x) == 0 and (x > 1 or devices == data * stage)
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_strategies_are_distinct_and_valid_on_their_mesh():
    for mesh in meshes(8):
        listed = list(strategies(mesh, "bfloat16"))
        assert len(listed) == len(set(listed))
        assert {one.compute_dtype for one in listed} == {"bfloat16"}
        assert any(one.shard_weights for one in listed) == (mesh["data"] > 1)


def test_the_best_is_the_fastest_of_all(found, everything):
    costs, _ = everything
    assert found.best.time.step_s == min(cost.time.step_s for cost in costs)


def test_the_fastest_are_listed_in_the_order_of_time(found, everything):
    costs, _ = everything
    seconds = [cost.time.step_s for cost in found.costs]
    assert seconds == sorted(seconds)
    distinct = {(c.time.step_s, c.time.overlapped_s, c.memory) for c in costs}
    fastest = sorted(one[0] for one in distinct)[:20]
    assert seconds[:20] == pytest.approx(fastest)


def test_what_a_plan_says_of_a_mesh_is_its_cost(found):
    given = problem(WIDTHS, 64, hardware=MINE)
    for cost in found.costs:
        alone = given.cost(cost.mesh, cost.strategy)
        assert (cost.time, cost.memory, cost.traffic) == (alone.time, alone.memory, alone.traffic)


def test_overlap_is_bounded_by_products_and_by_none(everything):
    costs, _ = everything
    for taken in (cost.time for cost in costs):
        assert taken.products_s <= taken.overlapped_s * (1 + 1e-12)
        assert taken.overlapped_s <= taken.step_s * (1 + 1e-12)


def test_nothing_is_both_faster_and_much_smaller_than_what_is_listed(found, everything):
    costs, _ = everything
    for cost in costs:
        faster = [c for c in found.costs if c.time.step_s <= cost.time.step_s]
        assert min(c.memory.peak_bytes for c in faster) * SMALLER <= cost.memory.peak_bytes


def test_every_candidate_is_listed_or_counted(found, everything):
    costs, refused = everything
    assert len(found.costs) + sum(found.left_out.values()) == len(costs) + refused
    assert found.left_out["stages that the layers cannot be cut into"] <= refused


def test_the_front_is_ever_slower_and_ever_smaller(found):
    for one, other in pairwise(found.front):
        assert one.time.step_s <= other.time.step_s
        assert one.memory.peak_bytes > other.memory.peak_bytes
    assert found.front[0] is found.best


def test_less_memory_is_never_faster(found):
    peaks = sorted({cost.memory.peak_bytes for cost in found.costs})[::4]
    best = [plan(MODEL, 64, MINE, 8, memory_limit=limit).best for limit in peaks]
    seconds = [cost.time.step_s for cost in best]
    assert seconds == sorted(seconds, reverse=True)
    assert all(c.memory.peak_bytes <= limit for c, limit in zip(best, peaks, strict=True))
    assert len(set(seconds)) > 1


def step_of(cost):
    """Return the step of a cost, and its arguments."""
    given = {"mesh": tpmlp.make_mesh(**cost.mesh), "strategy": cost.strategy}
    params = MODEL.init(jax.random.key(0), **given)
    x, y, weight = (np.ones((64, *dims), np.float32) for dims in ((24,), (16,), ()))
    batch = tpmlp.shard_batch(MODEL, x, y, weight=weight, **given, loss="mse")
    return tpmlp.value_and_grad(MODEL, loss="mse", **given), params, *batch


def test_the_best_runs_as_it_is_returned_and_moves_and_holds_what_it_says(found):
    cost = found.best
    assert cost.mesh["stage"] == 1
    step, *args = step_of(cost)
    assert np.isfinite(step(*args)[0])
    audit = tpmlp.audit(step, *args)
    moved: defaultdict[Any, float] = defaultdict(float)
    for row in audit.collectives:
        assert row.total_bytes is not None
        moved[row.axes, row.kind] += row.total_bytes
    assert moved == {(t.axes, t.kind): t.bytes for t in cost.traffic}
    assert audit.product_flops == cost.time.flops
    assert audit.argument_bytes == cost.memory.param_bytes + cost.memory.batch_bytes
    assert cost.memory.temp_bytes == pytest.approx(audit.temp_bytes, rel=0.15)


def test_a_pipeline_takes_the_arguments_that_it_is_said_to(found):
    cost = next(cost for cost in found.costs if cost.mesh["stage"] > 1)
    _, *args = step_of(cost)
    first = jax.devices()[0]
    shards = [s for array in jax.tree.leaves(args) for s in array.addressable_shards]
    held = sum(shard.data.nbytes for shard in shards if shard.device == first)
    assert held == cost.memory.param_bytes + cost.memory.batch_bytes


def test_thousands_of_devices_and_70_billion_parameters_are_planned_without_a_device():
    found = plan(tpmlp.MLP((32768,) * 65), 16384, "v5p", 4096, dtype="bfloat16")
    assert len(found.costs) >= 20
    counted = len(found.costs) + sum(found.left_out.values())
    assert counted == len(list(all_candidates(4096, None)))


def test_slower_links_turn_a_plan_from_tensor_to_data_parallel():
    # A large batch and small layers, and the other way round.
    data, tensor = (plan(tpmlp.MLP((256,) * 4), batch, MINE, 8).best for batch in (8192, 8))
    assert data.mesh["data"] == 8
    assert tensor.mesh["data"] == 1


def test_a_tight_memory_splits_the_weights():
    roomy = plan(tpmlp.MLP((256,) * 4), 8192, MINE, 8).best
    tight = plan(tpmlp.MLP((256,) * 4), 8192, MINE, 8, roomy.memory.peak_bytes - 1).best
    assert tight.memory.param_bytes < roomy.memory.param_bytes or tight.strategy != roomy.strategy
    assert tight.time.step_s >= roomy.time.step_s


@pytest.mark.parametrize("devices", [1, 7, 13])
def test_a_prime_number_of_devices_is_on_one_axis(devices):
    for cost in plan(MODEL, 64, MINE, devices).costs:
        assert sorted(cost.mesh.values())[-1] == devices
        assert np.prod(list(cost.mesh.values())) == devices


def test_a_plan_prints_its_table_and_what_was_left_out(found):
    text = str(found)
    assert "on 8 x plain with 953.67 MiB each" in text
    assert "step [s]  overlapped" in text
    assert "slower than those listed and hardly smaller" in text
    assert text.count("microbatches=") == len(found.costs)


def test_a_plan_plots_every_mesh_below_the_front(found):
    (panel,) = found.plot().axes
    assert panel.get_title().startswith("fastest: ")
    assert "GiB" in panel.get_xlabel()
    points = [line for line in panel.lines if line.get_label() in ("with stages", "without stages")]
    assert sum(len(line.get_xdata()) for line in points) == len(found.costs)


def test_layers_that_no_pipeline_can_have_are_planned_without():
    found = plan(tpmlp.MLP((24, 32, 48, 16)), 64, MINE, 4)
    assert all(cost.mesh["stage"] == 1 for cost in found.costs)
    assert found.left_out["stages that the layers cannot be cut into"] > 0


@pytest.mark.parametrize("wrong", [0, -2, 2.5, True, "8"])
def test_a_number_of_devices_that_is_none_is_refused(wrong):
    with pytest.raises(
        ValueError, match=f"devices must be a positive integer: got devices={wrong!r}"
    ):
        plan(MODEL, 64, MINE, wrong)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), "80GB", True])
def test_a_memory_limit_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="memory_limit must be a positive number"):
        plan(MODEL, 64, MINE, 8, wrong)


def test_an_unknown_chip_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"got hardware='h1000'\. Did you mean 'h100'"):
        plan(MODEL, 64, "h1000", 8)


def test_a_type_that_the_chip_has_not_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one that tpu-v5p computes in.*float64"):
        plan(MODEL, 64, "v5p", 8, compute_dtype="float64")


def test_a_model_that_fits_nowhere_is_refused_with_the_nearest_miss_and_the_way_out(found):
    least = min(cost.memory.peak_bytes for cost in found.costs)
    with pytest.raises(ValueError, match="memory_limit must have room") as caught:
        plan(MODEL, 64, MINE, 8, memory_limit=1000)
    said = str(caught.value)
    assert "got memory_limit=1000 (1000 B), devices=8, where the nearest takes" in said
    assert "Use more devices, memory_limit=" in said
    # 16 bytes for each parameter: itself, its gradient and Adam's two.
    assert f"fill {-(-MODEL.num_parameters * 16 // 1000)} such devices" in said
    offered = int(said.split("memory_limit=")[2].split(" ")[0])
    assert offered <= least
    assert plan(MODEL, 64, MINE, 8, memory_limit=offered).best.memory.peak_bytes == offered
