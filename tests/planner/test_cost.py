"""A plan's costs are those of summary and audit, and of the equations, on meshes that are there.

A failure means that a plan is of another program than the one that runs.
"""

from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest

import tpmlp
from tests.planner.cases import PLAIN, problem
from tpmlp.kernels.cost import forward_collectives, total_bytes
from tpmlp.planner.cost import Problem
from tpmlp.planner.hardware import Span, get_hardware
from tpmlp.planner.timing import Clock
from tpmlp.predict import layer_shapes, step_types
from tpmlp.strategy import Strategy

WIDTHS = (17, 24, 24, 24, 24, 10)
CHAINS = [
    {},
    {"x": 8},
    {"y": 7},
    {"x": 3, "y": 2},
    {"data": 2, "x": 2, "y": 2},
    {"data": 8},
]
STRATEGIES = [
    Strategy(),
    Strategy(keep="gathered", compute_dtype="bfloat16"),
    Strategy(keep="recompute", shard_weights=True),
    Strategy(keep="recompute", keep_every=3, microbatches=3),
    Strategy(shard_weights=True, microbatches=2, reduce_dtype="bfloat16"),
]
PIPELINES = [
    ({"stage": 2}, Strategy(microbatches=4)),
    ({"stage": 2, "x": 2, "y": 2}, Strategy(microbatches=2, schedule="zb-h1")),
    ({"data": 2, "stage": 2, "x": 2}, Strategy(microbatches=4, shard_weights=True)),
    ({"stage": 4, "x": 2}, Strategy(microbatches=4, keep="recompute", schedule="gpipe")),
    ({"data": 2, "stage": 2}, Strategy(microbatches=4, schedule="zb-v", keep="gathered")),
    ({"stage": 2, "x": 2}, Strategy(microbatches=4, schedule="interleaved", chunks=2)),
]


def name_of(value):
    """Name a mesh in a test's id."""
    return "x".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


def by_kind(rows):
    """Return bytes by axes and kind."""
    found = defaultdict(list)
    for row in rows:
        found[row.axes, row.kind].append(row)
    return {kind: total_bytes(alike) for kind, alike in found.items()}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=range(len(STRATEGIES)))
@pytest.mark.parametrize("mesh", CHAINS, ids=name_of)
def test_bytes_of_a_chain_are_those_of_its_summary(mesh, strategy):
    given = problem(WIDTHS, 24)
    cost = given.cost(mesh, strategy)
    on_devices = tpmlp.make_mesh(**{"x": 1, **mesh})
    summary = given.model.summary(on_devices, batch_size=24, strategy=strategy, loss="mse")
    assert cost.memory.param_bytes == cost.memory.gradient_bytes == summary.param_bytes
    assert cost.memory.temp_bytes == summary.temp_bytes
    assert {(t.axes, t.kind): t.bytes for t in cost.traffic} == by_kind(summary.collectives)


@pytest.mark.parametrize(("mesh", "strategy"), PIPELINES, ids=name_of)
def test_bytes_of_a_pipeline_are_those_of_its_summary(mesh, strategy):
    given = problem(WIDTHS, 24)
    cost = given.cost(mesh, strategy)
    on_devices = tpmlp.make_mesh(**{"x": 1, **mesh})
    summary = given.model.summary(on_devices, batch_size=24, strategy=strategy, loss="mse")
    assert cost.memory.param_bytes == summary.param_bytes
    assert cost.memory.temp_bytes == summary.step.total
    received = max(stage.received_bytes for stage in summary.stages)
    total = sum(t.bytes for t in cost.traffic)
    assert total == pytest.approx(received + summary.messages.moved, rel=1e-12)


# Products take no time, and a byte a second: collectives take as many seconds as there are bytes.
BYTES = replace(PLAIN, flops_per_s=dict.fromkeys(PLAIN.flops_per_s, 1e18))


@pytest.mark.parametrize(
    ("mesh", "strategy"), [*PIPELINES, *((mesh, STRATEGIES[2]) for mesh in CHAINS)], ids=name_of
)
def test_collectives_take_what_their_bytes_do(mesh, strategy):
    cost = problem(WIDTHS, 24, hardware=BYTES).cost(mesh, strategy)
    received = float(sum(t.bytes for t in cost.traffic))
    assert cost.time.collectives_s == pytest.approx(received, rel=1e-12)


@pytest.mark.parametrize(
    ("axes", "span"),
    [
        (["y"], Span(5, 1, 120)),
        (["x"], Span(4, 5, 120)),
        (["x", "y"], Span(20, 1, 120)),
        (["stage"], Span(3, 20, 120)),
        (["data"], Span(2, 60, 120)),
    ],
)
def test_neighbours_on_the_last_axis_are_neighbours(axes, span):
    placement = problem(WIDTHS, 24).place({"data": 2, "stage": 3, "x": 4, "y": 5}, Strategy())
    assert Clock(PLAIN, placement, "float32").span(axes, span.size) == span


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("mesh", [{"x": 4, "y": 2}, {"data": 2, "x": 3}], ids=name_of)
def test_arguments_are_those_that_the_compiled_step_takes(mesh, loss):
    given = problem((16, 24, 10), 12, loss=loss)
    memory = given.cost(mesh).memory
    step = tpmlp.value_and_grad(given.model, loss=loss, mesh=tpmlp.make_mesh(**mesh))
    compiled = step.compile(12).memory_analysis()
    assert compiled is not None
    assert memory.param_bytes + memory.batch_bytes == compiled.argument_size_in_bytes


def test_a_device_computes_its_share_of_the_products():
    flops = problem((32,) * 5, 48).cost({"data": 2, "x": 2, "y": 2}).time.flops
    assert flops == (3 * 4 - 1) * 2 * 48 * 32 * 32 / 8


@pytest.mark.parametrize(("every", "again"), [(1, 0), (2, 2), (5, 4)])
def test_what_is_computed_again_is_computed_again(every, again):
    strategy = Strategy(keep="recompute", keep_every=every)
    flops = problem((32,) * 6, 48).cost({"x": 4}, strategy).time.flops
    assert flops == (3 * 5 - 1 + again) * 2 * 48 * 32 * 32 / 4


def test_seconds_of_one_layer_are_those_of_the_equations():
    # Column over 4: h is gathered forward and backward, and the first layer has no dh; the loss
    # of each sample is summed over the four. One FLOP and one byte a second.
    strategy = Strategy(layout="column")
    time = problem((8, 16), 10, loss="output").cost({"x": 4}, strategy).time
    assert time.products_s == 2 * (2 * 10 * 8 * 16 / 4)
    assert time.collectives_s == 2 * (8 * 10 * 4 * 3 / 4) + 2 * (10 * 4 * 3 / 4)
    assert time.step_s == time.products_s + time.collectives_s
    assert time.overlapped_s == max(time.products_s, time.collectives_s)


def sent(placement, given):
    """Return the words that a device receives in the forward product of the first layer."""
    types = step_types(placement, given.dtype)
    shapes = layer_shapes(placement, bias=False, batch_size=given.batch_size)
    return sum(row.words for row in forward_collectives(shapes[0], types))


def least_words(sizes, num_devices):
    """Return the lower bound of Al Daas et al., SPAA 2022, theorem 1."""
    m, n, k = sorted(sizes, reverse=True)
    P = num_devices
    if m / n >= P:
        data = (m * n + m * k) / P + n * k
    elif m * n / k**2 >= P:
        data = 2 * (m * n * k**2 / P) ** 0.5 + m * n / P
    else:
        data = 3 * (m * n * k / P) ** (2 / 3)
    return data - (m * n + m * k + n * k) / P


@pytest.mark.parametrize("sizes", [(64, 64, 64), (64, 64, 512), (256, 64, 64), (64, 512, 128)])
def test_no_mesh_moves_fewer_words_forward_than_any_algorithm_can(sizes):
    d_out, d_in, batch = sizes
    given = Problem(model=tpmlp.MLP((d_in, d_out), bias=False), batch_size=batch, hardware=PLAIN)
    for data, x, y in product((1, 2, 4, 8), repeat=3):
        mesh, strategy = {"data": data, "x": x, "y": y}, Strategy(shard_weights=True)
        words = sent(given.place(mesh, strategy), given)
        assert words >= least_words(sizes, data * x * y) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("sizes", "mesh"),
    [
        ((64, 64, 64), {"data": 2, "x": 2, "y": 2}),
        ((64, 64, 64), {"data": 4, "x": 4, "y": 4}),
        ((128, 64, 64), {"x": 4, "y": 2, "data": 2}),
        ((64, 64, 512), {"data": 8}),
    ],
)
def test_the_grid_like_the_sizes_moves_the_fewest_words_there_can_be(sizes, mesh):
    d_out, d_in, batch = sizes
    given = Problem(model=tpmlp.MLP((d_in, d_out), bias=False), batch_size=batch, hardware=PLAIN)
    strategy = Strategy(shard_weights=True, layout="column")
    words = sent(given.place(mesh, strategy), given)
    num_devices = mesh["data"] * mesh.get("x", 1) * mesh.get("y", 1)
    assert words == pytest.approx(least_words(sizes, num_devices), rel=1e-12)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-h2"])
def test_a_pipeline_takes_what_simulate_says_of_stages_in_step(schedule):
    given = problem((64,) * 9, 64, loss="output")
    mesh, strategy = {"stage": 4}, Strategy(microbatches=8, schedule=schedule)
    time = given.cost(mesh, strategy).time
    # Two layers a stage, eight samples a microbatch. Of the first layer W is in B, and no B; all
    # of the last is in F.
    one = 2 * 8 * 64 * 64
    simulated = tpmlp.simulate(
        tpmlp.make_schedule(schedule, 4, 8),
        F_s=[2 * one, 2 * one, 2 * one, 4 * one],
        B_s=[2 * one, 2 * one, 2 * one, one],
        W_s=[one, 2 * one, 2 * one, one],
    )
    assert time.products_s == max(simulated.busy_s)
    assert time.products_s + time.bubble_s == simulated.lockstep_s


def test_stages_that_split_backward_wait_less():
    given = problem((64,) * 9, 64)
    names = ("1f1b", "zb-h1")
    one, zero = (
        given.cost({"stage": 4}, Strategy(microbatches=8, schedule=name)).time for name in names
    )
    assert zero.bubble_s < one.bubble_s
    assert zero.products_s == one.products_s


def test_more_microbatches_leave_less_of_a_bubble():
    given = problem((64,) * 9, 64)
    bubbles = [given.cost({"stage": 4}, Strategy(microbatches=m)).time.bubble_s for m in (4, 8, 16)]
    assert bubbles == sorted(bubbles, reverse=True)


def test_a_fast_link_is_worth_what_the_collectives_take():
    given = problem((1024,) * 5, 4096, hardware="h100")
    inside = given.cost({"x": 8}).time
    outside = given.cost({"x": 16}).time
    assert outside.collectives_s > inside.collectives_s
    assert outside.products_s < inside.products_s


def test_thousands_of_devices_need_not_be_there_to_be_predicted():
    given = problem((32768,) * 65, 16384, hardware="v5p", dtype="bfloat16")
    mesh = {"data": 64, "x": 8, "y": 8}
    placement = given.place(mesh, Strategy())
    assert given.time(placement).step_s > 0
    # W_l and g_l h_l^T of 32768 x 32768 over 64, in two bytes.
    assert given.held(placement).param_bytes == 64 * (32768 + 1) * 32768 // 64 * 2


def test_a_cost_prints_times_memory_and_traffic():
    text = str(problem(WIDTHS, 24).cost({"x": 4}))
    for word in ("on data=1 stage=1 x=4 y=1", "step, overlapped", "optimizer", "all_gather"):
        assert word in text


def test_the_optimiser_has_its_bytes_for_each_parameter():
    adam, plain = (problem(WIDTHS, 24, optimizer_bytes=b).cost({"x": 3}).memory for b in (8, 0))
    assert (adam.optimizer_bytes, plain.optimizer_bytes) == (2 * adam.param_bytes, 0)
    assert adam.peak_bytes - plain.peak_bytes == adam.optimizer_bytes


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer: got batch_size=0"),
        ({"hardware": "h1000"}, "hardware must be one of.*'h100'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": "float64", "hardware": "v5p"}, "dtype must be one that tpu-v5p computes in"),
        ({"loss": "hinge"}, "loss"),
        ({"optimizer_bytes": -1}, "optimizer_bytes must be.*-1"),
        ({"model": "mlp"}, "model must be an MLP.*got a str"),
    ],
)
def test_a_problem_that_is_none_is_refused(wrong, says):
    given = {"model": tpmlp.MLP((4, 4)), "batch_size": 4, "hardware": PLAIN}
    with pytest.raises(ValueError, match=says):
        Problem(**{**given, **wrong})


@pytest.mark.parametrize(
    ("mesh", "strategy", "says"),
    [
        ({"z": 2}, Strategy(), "mesh must be devices on some of the axes"),
        (8, Strategy(), "mesh must be devices on some of the axes"),
        ({"x": 0}, Strategy(), "mesh axis x must be a positive integer: got mesh axis x=0"),
        ({"stage": 8}, Strategy(), "at least one layer for each chunk"),
        ({"x": 2, "y": 2}, Strategy(layout="row"), "layout must alternate"),
        ({"x": 4}, Strategy(overlap="ring"), "strategy must be one whose memory is predicted"),
        ({"x": 4}, "fast", "strategy must be a tpmlp.Strategy"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, strategy, says):
    with pytest.raises(ValueError, match=says):
        problem(WIDTHS, 24).cost(mesh, strategy)


def test_the_chips_rank_as_their_rates_do():
    given = {"widths": (8192,) * 9, "batch_size": 8192, "dtype": "bfloat16"}
    seconds = {
        name: problem(**given, hardware=name).cost({"x": 8}).time.step_s
        for name in ("a100", "h100", "b200")
    }
    assert sorted(seconds, key=seconds.__getitem__) == ["b200", "h100", "a100"]
    assert get_hardware("h200").memory_bytes > get_hardware("h100").memory_bytes
