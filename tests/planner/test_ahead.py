"""compile_for on devices that are here: predicted is compiled, and errors are clear.

A failure means that a prediction is not that of the compiled program, that a difference goes by
without a name, or that bad input is told by somebody else, later. tests/planner/test_aot.py says
the same of the compilers for TPUs and GPUs (make test-aot).
"""

from dataclasses import replace
from importlib.resources import files
from typing import Any

import jax
import numpy as np
import optax
import pytest

import tpmlp
from tpmlp import reference
from tpmlp.graph import Dense, Dropout, Input
from tpmlp.kernels.cost import Collective
from tpmlp.pipeline.summary import PipelineSummary
from tpmlp.planner import topology
from tpmlp.planner.moved import compare_collectives
from tpmlp.planner.topology import parse_topology
from tpmlp.table import format_bytes

MLP = tpmlp.MLP((17, 30, 10))
CHAIN = tpmlp.MLP((8,) * 5)
BLOCK = tpmlp.Graph([tpmlp.Vertex("z", Input(8)), tpmlp.Vertex("out", Dense(8), "z")])
GRAPH = tpmlp.Graph(
    [
        tpmlp.Vertex("x", Input(8)),
        tpmlp.Vertex("drop", Dropout(0.5), "x"),
        tpmlp.Repeat("blocks", BLOCK, "drop", 2),
    ]
)
PIPELINE = tpmlp.Strategy(schedule="1f1b", microbatches=2)


@pytest.fixture(scope="module")
def step():
    return tpmlp.compile_for(MLP, 30, "cpu:8", {"x": 4, "y": 2}, loss="cross_entropy")


def test_arguments_and_collectives_are_those_predicted(step):
    assert step.audit.argument_bytes == step.predicted_argument_bytes
    assert step.moved
    assert all(row.bytes == row.predicted_bytes and not row.note for row in step.moved)
    assert sum(row.bytes for row in step.moved) == step.audit.bytes_by()
    assert sum(row.predicted_bytes for row in step.moved) == step.summary.bytes_moved
    assert step.predicted_temp_bytes == step.summary.temp_bytes


def test_it_prints_predicted_beside_compiled(step):
    lines = str(step).splitlines()
    assert lines[0].startswith("one step on data=1 stage=1 x=4 y=2, compiled for cpu:8 in ")
    argument = next(line.split() for line in lines if line.startswith("argument"))
    assert argument[1:3] == argument[3:5] == format_bytes(step.audit.argument_bytes).split()
    assert any(line.startswith("reduce_scatter  y") for line in lines)


def test_the_program_is_the_step_and_runs_where_its_devices_are(step):
    mesh = tpmlp.make_mesh(x=4, y=2)
    params = MLP.init(jax.random.key(0), mesh)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 17)).astype(np.float32), np.arange(30, dtype=np.int32) % 10
    weight = np.ones(30, np.float32)
    batch = tpmlp.shard_batch(MLP, x, y, mesh=mesh, weight=weight)
    loss, grads = step.compiled(params, batch)
    arrays = tpmlp.to_numpy(MLP, params)
    wanted, _ = reference.value_and_grad(arrays, x, y, loss="cross_entropy", activation="relu")
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert grads[0][0].sharding == params[0][0].sharding


def compile_update(model, topology, mesh, strategy=None):
    """Return a step that updates by Adam; check what it holds."""
    tx = optax.adam(1e-3)
    step = tpmlp.compile_for(model, 8, topology, mesh, strategy=strategy, optimizer=tx)
    count = 4  # Adam's, of steps
    assert step.audit.argument_bytes == step.predicted_argument_bytes
    assert step.audit.alias_bytes == 3 * step.summary.param_bytes + count
    assert step.predicted_temp_bytes is None
    assert step.moved
    assert all(row.bytes == row.predicted_bytes for row in step.moved)
    return step


def test_an_update_takes_the_memory_of_padded_parameters_and_their_state():
    compile_update(MLP, "cpu:4", {"data": 2})


def test_an_update_of_a_pipeline_sends_the_messages_that_are_predicted():
    step = compile_update(CHAIN, "cpu:2", {"stage": 2}, PIPELINE)
    (row,) = (row for row in step.moved if row.kind == "ppermute")
    assert isinstance(step.summary, PipelineSummary)
    assert row.axes == ("stage",)
    assert row.bytes == row.predicted_bytes == step.summary.messages.in_program


def test_a_graph_is_compiled_with_the_key_of_what_it_drops():
    step = tpmlp.compile_for(GRAPH, 8, "cpu:6", {"y": 3})
    assert step.mesh == {"data": 1, "stage": 1, "x": 2, "y": 3}
    assert step.audit.argument_bytes == step.predicted_argument_bytes
    assert step.moved
    assert all(row.bytes == row.predicted_bytes for row in step.moved)


def test_what_a_pipeline_of_a_graph_moves_is_said_not_to_be_predicted():
    step = tpmlp.compile_for(GRAPH, 8, "cpu:2", {"stage": 2}, strategy=PIPELINE)
    assert step.audit.argument_bytes == step.predicted_argument_bytes
    assert isinstance(step.summary, PipelineSummary)
    assert step.predicted_temp_bytes == step.summary.step.total
    assert step.moved == ()
    assert "collectives: not predicted" in str(step)


# What the compilers for TPUs make of collectives, put into an audit.


def scatter(**changes):
    row = Collective(
        phase="forward",
        layer=1,
        tensor="z",
        kind="reduce_scatter",
        axes=("x",),
        num_devices=4,
        elements=64,
    )
    return replace(row, **changes)


def counted(step, **changes):
    """Return an audit in which one reduce-scatter over x is all there is, changed."""
    row = next(r for r in step.audit.collectives if r.kind == "reduce_scatter" and "x" in r.axes)
    row = replace(row, group_size=4, payload_bytes=256, count=1, **changes)
    return replace(step.audit, collectives=(row,))


def test_a_scatter_that_runs_as_an_all_reduce_is_named(step):
    reduced, scattered = compare_collectives([scatter()], counted(step, kind="all_reduce"))
    assert (scattered.predicted_bytes, scattered.bytes, reduced.bytes) == (192, 0, 384)
    assert scattered.note == "run as all_reduce, twice the bytes"
    assert reduced.note == "runs what was reduce_scatter"
    assert scattered.is_explained
    assert reduced.is_explained


def test_another_type_is_named(step):
    audit = counted(step)
    (halved,) = audit.collectives
    halved = replace(halved, dtype="bfloat16", payload_bytes=128)
    (row,) = compare_collectives([scatter()], replace(audit, collectives=(halved,)))
    assert (row.predicted_bytes, row.bytes, row.note) == (192, 96, "moves bfloat16")


def test_what_no_rule_accounts_for_is_not_passed_over(step):
    (row,) = compare_collectives([scatter(elements=32)], counted(step))
    assert (row.note, row.is_explained) == ("not predicted", False)
    rows = compare_collectives([scatter(elements=32)], counted(step, kind="all_reduce"))
    assert not any(row.is_explained for row in rows)


def test_a_topology_is_a_chip_and_sizes():
    assert parse_topology("V5P:4x4x4") == parse_topology("v5p:4x4x4")
    sizes = {"v5e:16x16": 256, "v6e:1x1": 1, "h100:8": 8, "h100:8x8": 64, "h100:3x5": 15}
    assert {name: parse_topology(name).num_devices for name in sizes} == sizes


BAD = {
    "no sizes": ("v5p", ("topology='v5p'", "'v5p:4x4x4'")),
    "a zero": ("v5p:4x0x4", ("topology='v5p:4x0x4'",)),
    "no text": (8, ("topology=8",)),
    "trailing": ("v5p:4x4x4x", ("topology='v5p:4x4x4x'",)),
    "two sizes": ("v5p:8x8", ("v5p must have 3 sizes", "'v5p:8x8'", "'v5p:4x4x4'")),
    "three sizes": ("v6e:4x4x4", ("v6e must have 2 sizes", "'v6e:4x4'")),
    "many nodes": ("h100:2x2x2", ("h100 must have 1 or 2 sizes", "'h100:4x4'")),
    "an odd size": ("v5p:3x4x4", ("whole hosts of 2x2 chips", "'v5p:4x4x4'")),
    "another v": ("v5:4x4", ("'v5:4x4'", "nearest are v5p and v5e")),
    "another h": ("h1000:8", ("'h1000:8'", "nearest are h100 and ")),
    "nothing like it": ("trainium:16", ("'trainium:16'", "v5e, v5p, v6e, h100, cpu")),
}


@pytest.mark.parametrize("case", BAD)
def test_a_topology_that_is_none_is_refused(case):
    value, parts = BAD[case]
    with pytest.raises(ValueError, match="topology") as info:
        tpmlp.compile_for(MLP, 8, value)
    assert all(part in str(info.value) for part in parts), info.value


def test_a_mesh_of_another_size_is_refused_before_a_compiler_is_asked_for():
    devices: Any = tpmlp.make_mesh(x=8)
    with pytest.raises(ValueError, match=r"x=4 \* y=4 = 16, topology='v5p:4x4x4' of 64 devices"):
        tpmlp.compile_for(MLP, 8, "v5p:4x4x4", {"x": 4, "y": 4})
    with pytest.raises(ValueError, match=r"data=3 \* .* x=21 \* y=1 = 63, .* of 64"):
        tpmlp.compile_for(MLP, 8, "h100:8x8", {"data": 3})
    with pytest.raises(ValueError, match=r"mesh axis must be one of .*: got model=8"):
        tpmlp.compile_for(MLP, 8, "cpu:8", {"model": 8})
    with pytest.raises(ValueError, match=r"mesh axis x must be a positive integer: got .*x=0"):
        tpmlp.compile_for(MLP, 8, "cpu:8", {"x": 0})
    with pytest.raises(ValueError, match=r"mesh must be sizes of mesh axes: got mesh=Mesh"):
        tpmlp.compile_for(MLP, 8, "cpu:8", devices)


def test_devices_that_this_process_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"'cpu:9', devices=8. Call tpmlp.simulate_devices\(9\)"):
        tpmlp.compile_for(MLP, 8, "cpu:9")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("v5p:4x4x4", "libtpu", "tpu"), ("h100:8x8", "jax_cuda13_plugin", "cuda")],
)
def test_a_compiler_that_is_missing_is_named_with_its_extra(monkeypatch, name, module, extra):
    monkeypatch.setattr(topology, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError) as info:
        tpmlp.compile_for(MLP, 8, name)
    message = str(info.value)
    assert f"topology='{name}', and {module} is not installed" in message
    assert f"pip install 'tpmlp[{extra}]'" in message
    assert info.value.name == module


def test_what_the_step_refuses_is_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        tpmlp.compile_for(MLP, 0, "cpu:8")
    with pytest.raises(ValueError, match="dtype='float16'"):
        tpmlp.compile_for(MLP, 8, "cpu:8", dtype="float16")
    with pytest.raises(ValueError, match=r"optimizer must be an optax"):
        tpmlp.compile_for(MLP, 8, "cpu:8", optimizer="adam")


def test_what_a_gpu_would_answer_is_in_the_package():
    assert "H100 80GB" in files("tpmlp.planner").joinpath("h100.txtpb").read_text()


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    before = dict(topology.os.environ)
    with topology._environment(topology._FOR_LIBTPU):
        assert topology.os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
        assert topology.os.environ["TPU_SKIP_MDS_QUERY"] == "0"
    assert dict(topology.os.environ) == before
