"""What the compilers for TPUs and GPUs make of the step, beside what is predicted (make test-aot).

A failure means that an argument takes other bytes than predicted, that a collective moves other
bytes, or that a compiler rewrites them in a way that has no name yet. Steps are small: compilers
do to large ones what `make absent` records.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding

import tpmlp
from tpmlp.graph import Dense, Input, language_model, residual_mlp_block
from tpmlp.pipeline.summary import PipelineSummary
from tpmlp.planner.tiles import argument_bytes
from tpmlp.planner.topology import parse_topology

pytestmark = pytest.mark.aot

TOPOLOGIES = {"v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "h100": "h100:2x4"}
NAMES = tuple(TOPOLOGIES)
TPUS = ("v5p", "v6e")

SCATTER_AS_REDUCE = "run as all_reduce, twice the bytes"
MLP = tpmlp.MLP((256, 512, 128))
GRAPH = tpmlp.Graph(
    [
        tpmlp.Vertex("x", Input(256)),
        tpmlp.Repeat("blocks", residual_mlp_block(256, 512), "x", 2),
        tpmlp.Vertex("out", Dense(128), "blocks"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step.

    Attributes:
        model: what is trained.
        mesh: on eight devices.
        options: of compile_for.
        batch_size: samples.
    """

    model: Any
    mesh: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64


CASES = {
    "2d": Case(model=MLP, mesh={"x": 4, "y": 2}),
    "adam": Case(
        model=tpmlp.MLP((250, 512, 128)),
        mesh={"data": 2, "x": 4},
        options={"optimizer": optax.adam(1e-3), "loss": "cross_entropy"},
    ),
    "odd": Case(
        model=tpmlp.MLP((17, 30, 10)), mesh={"x": 4, "y": 2}, options={"loss": "cross_entropy"}
    ),
    "gathered": Case(
        model=MLP, mesh={"x": 8}, options={"strategy": tpmlp.Strategy(keep="gathered")}
    ),
    "ring": Case(model=MLP, mesh={"x": 8}, options={"strategy": tpmlp.Strategy(overlap="ring")}),
    "zero": Case(
        model=MLP,
        mesh={"data": 4, "x": 2},
        options={"strategy": tpmlp.Strategy(shard_weights=True), "optimizer": optax.sgd(0.1)},
    ),
    "graph": Case(model=GRAPH, mesh={"data": 2, "x": 2, "y": 2}),
    "transformer": Case(
        model=language_model(64, 64, 32, num_blocks=1, num_heads=4),
        mesh={"data": 2, "x": 2, "y": 2},
        options={"loss": "cross_entropy", "optimizer": optax.adam(1e-3)},
    ),
    "pipeline": Case(
        model=tpmlp.MLP((256,) * 5),
        mesh={"stage": 2, "x": 4},
        options={"strategy": tpmlp.Strategy(schedule="1f1b", microbatches=4)},
    ),
    # Of 256 instead of 1024, libtpu 0.0.42.1 ends the process: "Check failed: preferred_offset".
    "zb-v": Case(
        model=tpmlp.MLP((1024,) * 9),
        mesh={"stage": 2, "x": 4},
        options={"strategy": tpmlp.Strategy(schedule="zb-v", microbatches=4)},
        batch_size=1024,
    ),
}


@pytest.fixture(autouse=True)
def narrow():
    """Compile as users do: 64-bit types are off unless they are asked for."""
    with jax.enable_x64(False):
        yield


def compile_case(case, name, dtype="bfloat16"):
    where = TOPOLOGIES[name]
    return tpmlp.compile_for(
        case.model, case.batch_size, where, case.mesh, dtype=dtype, **case.options
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_arguments_and_collectives_are_those_predicted(case, name):
    step = compile_case(CASES[case], name)
    print(f"\n{case}\n{step}")
    assert step.audit.argument_bytes == step.predicted_argument_bytes
    assert step.moved
    assert step.not_predicted == ()
    if name == "h100":
        assert all(row.bytes == row.predicted_bytes and not row.note for row in step.moved)
    # Nothing is left out of the comparison.
    assert sum(row.bytes for row in step.moved) == step.audit.bytes_by()


@pytest.mark.parametrize("name", NAMES)
def test_float32_products_are_gathered_in_what_they_are_rounded_to(name):
    step = compile_case(CASES["2d"], name, dtype="float32")
    gathers = [row for row in step.moved if row.kind == "all_gather"]
    share, note = (2, "moves bfloat16") if name in TPUS else (1, "")
    assert {row.note for row in gathers} == {note}
    assert all(row.predicted_bytes == share * row.bytes for row in gathers)
    assert step.not_predicted == ()
    exact = tpmlp.Strategy(compute_dtype="bfloat16")
    step = tpmlp.compile_for(MLP, 64, TOPOLOGIES[name], {"x": 8}, strategy=exact)
    assert all(r.bytes == r.predicted_bytes for r in step.moved if r.kind == "all_gather")


@pytest.mark.parametrize("name", TPUS)
def test_scatters_that_run_as_all_reduces_are_named(name):
    step = compile_case(CASES["gathered"], name)
    (scattered,) = (row for row in step.moved if row.kind == "reduce_scatter")
    (reduced,) = (row for row in step.moved if row.kind == "all_reduce")
    assert (scattered.bytes, scattered.note) == (0, SCATTER_AS_REDUCE)
    assert reduced.bytes == reduced.predicted_bytes + 2 * scattered.predicted_bytes
    assert reduced.note == "runs what was reduce_scatter"


@pytest.mark.parametrize(("name", "least"), [("v5p", 12), ("h100", 12)])
def test_hops_of_rings_run_beside_products(name, least):
    step = compile_case(CASES["ring"], name)
    (hops,) = (row for row in step.moved if row.kind == "ppermute")
    assert hops.count == hops.predicted_count
    assert hops.overlapped >= least


@pytest.mark.parametrize("name", TPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
def test_arrays_take_the_tiles_that_are_predicted(name, dtype):
    device = parse_topology(TOPOLOGIES[name]).devices()[0]
    one = [(), (1,), (5,), (129,), (300,), (1000,), (1025,), (4100,)]
    two = [(1, 1), (2, 2), (3, 30), (30, 3), (5, 5), (130, 7), (17, 257), (100, 200), (1000, 9)]
    more = [(4, 16, 32), (3, 5, 7), (2, 300, 5), (300, 8, 8), (1, 40, 40), (2, 3, 4, 5)]
    for shape in one + two + more:
        array = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=SingleDeviceSharding(device))
        compiled = jax.jit(lambda x: x.max()).lower(array).compile()
        held = tpmlp.audit(compiled).argument_bytes
        assert argument_bytes([array], "tpu") == held, shape


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_of_a_graph_compiles(name):
    strategy = tpmlp.Strategy(schedule="1f1b", microbatches=4)
    case = Case(model=GRAPH, mesh={"stage": 2, "x": 2, "y": 2}, options={"strategy": strategy})
    step = compile_case(case, name)
    assert step.audit.argument_bytes == step.predicted_argument_bytes
    assert isinstance(step.summary, PipelineSummary)
    moved = [r for r in step.audit.collectives if r.kind == "ppermute" and "stage" in r.axes]
    assert sum(r.total_bytes or 0 for r in moved) == step.summary.messages.in_program


@pytest.mark.parametrize("name", ["v5p:4x4x4", "v6e:16x16", "h100:8x8"])
def test_as_many_devices_as_no_machine_here_has(name):
    size = {"v5p:4x4x4": 8, "v6e:16x16": 16, "h100:8x8": 8}[name]
    mlp = tpmlp.MLP((4096, 4096, 4096))
    step = tpmlp.compile_for(mlp, 4096, name, {"x": size, "y": size}, dtype="bfloat16")
    assert step.audit.argument_bytes == step.predicted_argument_bytes
    assert step.not_predicted == ()


def test_x_and_y_are_the_fast_links():
    """Eight GPUs of a node are one row of the mesh; the two dims of a 2 x 4 torus are x and y."""
    gpus = compile_case(CASES["2d"], "h100").compiled.input_shardings[0][0][0][0].mesh.devices
    assert [d.id for d in gpus[0, 0].flat] == list(range(8))
    wide = tpmlp.compile_for(MLP, 64, "h100:2x4", {"data": 2, "x": 4})
    nodes = wide.compiled.input_shardings[0][0][0][0].mesh.devices
    assert [{d.id // 4 for d in nodes[i].flat} for i in range(2)] == [{0}, {1}]
    tpus = compile_case(CASES["2d"], "v6e").compiled.input_shardings[0][0][0][0].mesh.devices
    lines = [{d.coords[1] for d in tpus[0, 0, :, j]} for j in range(2)]
    assert [len(line) for line in lines] == [4, 4]


def test_a_step_that_does_not_fit_shows_what_was_predicted():
    huge = tpmlp.MLP((65536, 65536, 65536))
    with pytest.raises(MemoryError, match="batch_size=1024") as info:
        tpmlp.compile_for(huge, 1024, "v6e:1x1")
    assert "Predicted" in str(info.value)
