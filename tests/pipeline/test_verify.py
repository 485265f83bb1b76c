"""verify says ok for a pipeline, and names the tensor, layer, phase and devices of a fault in one.

A failure means that a green report on a mesh with stages says nothing, or that a fault of a layer
is taken for one of the schedule.
"""

from dataclasses import dataclass
from typing import Any

import pytest

import tpmlp
from tests.pipeline.test_executor import Case
from tests.planted import planted
from tests.test_mutants import MUTANTS
from tpmlp.inspection.report import Fault

# A slot a stage, the second's empty; layers are columns and rows in turn.
ODD = Case(sizes=(1, 2, 2, 2), schedule="1f1b", microbatches=4, num_layers=3, loss="mse")
DATA = Case(sizes=(2, 3, 1, 1), schedule="zb-h1", microbatches=3, num_layers=5, bias=False)
# Integers stay exact in float32 for few and narrow layers.
CHUNKS = Case(
    sizes=(1, 2, 1, 2), schedule="interleaved", microbatches=2, num_layers=5, chunks=2, hidden=3
)
V = Case(sizes=(1, 2, 3, 1), schedule="zb-v", microbatches=2, num_layers=6, loss="logistic")


@pytest.mark.parametrize(
    ("case", "kind"),
    [(ODD, "float64"), (DATA, "float64"), (CHUNKS, "integers"), (V, "float32")],
    ids=str,
)
def test_trace_and_step_are_within_their_bounds(case, kind):
    # 3 microbatches of 2 shards do not divide the batch of 30 evenly, nor do 4.
    report = tpmlp.verify(
        case.model, case.mesh, kind=kind, strategy=case.strategy, loss=case.loss, batch_size=26
    )
    assert report.ok, report
    names = [check.tensor for check in report.checks]
    assert len(names) == len(set(names))
    layers = range(1, case.num_layers + 1)
    of_both = ["loss", *(f"dW_{l}" for l in layers), *(f"db_{l}" for l in layers if case.bias)]
    of_trace = [f"{name}_{l}" for name in ("z", "g") for l in layers]
    if kind == "float32":
        # A bound that is far away would find nothing.
        assert max(check.error for check in report.checks if check.tensor in of_both) > 1e-3
    assert {*of_both, *(f"traced {name}" for name in of_both), *of_trace} <= set(names)


def test_bfloat16_is_within_its_bounds():
    mesh, model = tpmlp.make_mesh(stage=2), tpmlp.MLP((7, 10, 10, 5), activation="tanh")
    strategy = tpmlp.Strategy(microbatches=2, compute_dtype="bfloat16")
    assert tpmlp.verify(model, mesh, kind="float32", strategy=strategy).ok


@dataclass(frozen=True)
class Planted:
    """A fault, by its name in MUTANTS or as (file, old, new), and where it has to be found."""

    mutant: str | tuple[str, str, str]
    tensor: str
    layer: int
    phase: Any
    devices: Any = "all"


# Layers 1, 2 on devices 0, 1 and layers 3, 4 on devices 2, 3; one slot a stage.
WIDTHS = (7, 10, 10, 10, 5)
WEIGHT = "dW = dense.backward_weight(g_all, h, run, **axes)"
MOVED_H = "return self._moved(z, by, self.stages.slots_per_chunk)"
MOVED_G = "return self._moved(g, by, 0)"
PLANTED = {
    "a layer's weights on one device": Planted(
        (
            "pipeline/chunk.py",
            WEIGHT,
            f"{WEIGHT} * (1 + 0.01 * (lax.axis_index('x') * int(l == 2)).astype(g.dtype))",
        ),
        "traced dW_3",
        3,
        "backward",
        (3,),
    ),
    "a message forward": Planted(
        ("pipeline/on_stage.py", MOVED_H, f"{MOVED_H} * 1.01"), "h_3", 2, "forward"
    ),
    "a message back": Planted(
        ("pipeline/on_stage.py", MOVED_G, f"{MOVED_G} * 1.01"), "g_2", 3, "backward"
    ),
    "the order of the step": Planted(
        "g sent before its W where the two are one", "dW_2", 2, "backward"
    ),
    "sums of the step": Planted("ends summed over the stages but one", "dW_1", 1, "backward"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_is_found_where_it_is(name):
    fault = PLANTED[name]
    edit = fault.mutant
    if isinstance(edit, str):
        edit = MUTANTS[edit].file, MUTANTS[edit].old, MUTANTS[edit].new
    model, mesh = tpmlp.MLP(WIDTHS, activation="sigmoid"), tpmlp.make_mesh(stage=2, x=2)
    strategy = tpmlp.Strategy(microbatches=2)
    with planted(*edit):
        report = tpmlp.verify(model, mesh, kind="float32", strategy=strategy)
    wanted = Fault(tensor=fault.tensor, layer=fault.layer, phase=fault.phase, devices=fault.devices)
    assert report.verdict == "bug"
    # The class is the edited package's own.
    assert str(report.fault) == str(wanted)


def test_microbatches_without_stages_are_refused_as_nothing_runs_in_them():
    strategy = tpmlp.Strategy(microbatches=2)
    with pytest.raises(ValueError, match=r"without stages.*microbatches=2\. Use microbatches=1"):
        tpmlp.verify(tpmlp.MLP(WIDTHS), tpmlp.make_mesh(x=2), strategy=strategy)
