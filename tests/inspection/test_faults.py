"""verify names the place of a fault, every time, and never cries wolf.

Faults are those of tests/test_mutants.py that change a number of verify's step, and some that are
on one device alone. A failure means that a user is sent to the wrong place, or that a wrong number
passes for rounding.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import tpmlp
from tests.cases import Sizes, mesh_of
from tests.planted import planted
from tests.test_mutants import MUTANTS, REFUSALS
from tpmlp.inspection.verify import Fault, Report

WIDTHS = (17, 12, 20, 10)
SQUARE = (12, 12, 12, 12, 12)
EVERYWHERE: Any = "all"


@dataclass(frozen=True)
class Planted:
    """A fault and where it has to be found.

    Attributes:
        mutant: a name in MUTANTS, or (file, old, new).
        tensor: the first that is wrong.
        layer: whose pass computes it.
        phase: of the step.
        sizes: of the mesh.
        strategy: fields of it.
        widths: of the model.
        devices: where it is wrong.
    """

    mutant: str | tuple[str, str, str]
    tensor: str
    layer: int
    phase: Any
    sizes: Sizes = (2, 3, 1)
    strategy: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = WIDTHS
    devices: Any = EVERYWHERE


FORWARD = "kernels/dense.py", "z + b[:, None]"
SLOPE = "jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)"
LEAK = "padded columns leaking"
# What one of the passes alone reads.
FORWARD_INPUT = "h = layer_input(before, l, run, chain)"
FORWARD_GATHER = "h_all = layer.gather_input(h, run, **axes)"
BACKWARD_INPUT = "layer.gather_input(layer_input(before, l, run, chain), run, **axes)"
BACKWARD_SLOPE = "g, slope = gradient_and_slope(dh, before"


def in_layer(l: int, text: str) -> tuple[str, str, str]:
    """Return the fault that an expression of the recursion is 1 % too large in layer l."""
    return "kernels/backprop.py", text, f"{text} * (1.01 if l == {l} else 1.0)"


PLANTED = [
    Planted("a dropped sum in dh", "g_2", 3, "backward", (1, 2, 2)),
    Planted("a doubled reduction", "loss", 3, "loss"),
    Planted("a bias added on every device", "z_1", 1, "forward", strategy={"layout": "row"}),
    Planted("a wrong scatter dim", "z_1", 1, "forward", strategy={"layout": "row"}),
    Planted("a stale sigma'", "sigma_prime_2", 2, "backward"),
    Planted(LEAK, "h_3", 2, "forward", (1, 3, 1), devices=(2,)),
    Planted("a transposed W", "g_3", 4, "backward", (2, 1, 1), widths=SQUARE),
    Planted("a mean over the padded batch", "loss", 3, "loss", (4, 1, 1)),
    Planted("a softmax over padded logits", "loss", 3, "loss", (1, 8, 1)),
    Planted("weights left out of g", "g_3", 3, "loss"),
    Planted("a ring that skips its last hop", "z_1", 1, "forward", (1, 3, 1), {"overlap": "ring"}),
    Planted("a ring the wrong way round", "z_1", 1, "forward", (1, 3, 1), {"overlap": "ring"}),
    Planted(
        "split gradients that are not summed", "dW_3", 3, "backward", (8, 1, 1),
        {"shard_weights": True},
    ),
    Planted(
        "layers computed again by those before them", "dW_4", 4, "backward", (2, 2, 1),
        {"keep": "recompute", "keep_every": 2}, SQUARE,
    ),
    Planted(
        "blocks gathered from the wrong axis", "h_2", 1, "forward", (2, 2, 2), devices=(1, 2, 5, 6)
    ),
    Planted(
        (*FORWARD, f'{FORWARD[1]} + 1e-3 * (jax.lax.axis_index("x") == 1).astype(z.dtype)'),
        "z_1", 1, "forward", (1, 3, 1), devices=(1,),
    ),
    Planted(
        (
            *FORWARD,
            f'({FORWARD[1]}) * (1 + 0.01 * (jax.lax.axis_index("data") == 1).astype(z.dtype))',
        ),
        "z_1", 1, "forward", (2, 2, 1), devices=(2, 3),
    ),
    Planted(
        (
            "kernels/dense.py",
            'return einsum("O/g B/d, I/s B/d -> O/g I/s +d", g, h, dtype=run.total, **axes)',
            'dW = einsum("O/g B/d, I/s B/d -> O/g I/s +d", g, h, dtype=run.total, **axes)\n'
            '    return dW.at[0, 0].multiply('
            '1 + 1e-3 * (jax.lax.axis_index("x") == 2).astype(dW.dtype))',
        ),
        "dW_3", 3, "backward", (1, 3, 1), devices=(2,),
    ),
    Planted(
        ("activations.py", f"return {SLOPE}", f"return {SLOPE} + 1e-5"),
        "sigma_prime_2", 2, "backward",
    ),
    Planted(in_layer(2, FORWARD_INPUT), "h_2", 1, "forward"),
    Planted(in_layer(3, FORWARD_INPUT), "h_3", 2, "forward", strategy={"keep": "gathered"}),
    Planted(in_layer(2, FORWARD_GATHER), "z_2", 2, "forward"),
    Planted(in_layer(3, BACKWARD_INPUT), "dW_3", 3, "backward"),
    Planted(in_layer(3, BACKWARD_SLOPE), "sigma_prime_2", 2, "backward"),
    Planted(
        ("kernels/backprop.py", "dh * slope_of(z)", "dh * slope_of(z) * 1.01"), "g_2", 3, "backward"
    ),
]  # fmt: skip

# What verify's step has none of: R, microbatches, a weight of 0, smoothing, split weights that are
# moved too often, traffic and order (which are for the audit to find), draws, the audit itself,
# norms and gradients of single samples, curvature; sums whose order is no fault but to a hash;
# graphs and stages, whose faults tests/inspection/test_graph_verify.py and
# tests/pipeline/test_verify.py plant.

NOT_IN_THE_STEP = {
    "an out-neighbour left out",
    "shared parameters with the gradient of one user",
    "an array that is not turned",
    "padding counted in a mean over features",
    "an order that accelerators are not given",
    "smoothing over padded logits",
    "R's gradient once a data shard",
    "a NaN at a sample of weight 0",
    "weights drawn at padded shapes",
    "a second gather merged with the first",
    "a barrier over arrays that differ over other axes",
    "hops in twice the bytes",
    "split weights gathered once and kept",
    "only the last microbatch",
    "each microbatch divided by its own weight",
    "products before a start counted as meanwhile",
    "norms of samples times their weights",
    "biases left out of the norms of samples",
    "one factor for the batch, that of its longest gradient",
    "copies of a gradient counted in its norm",
    "a tangent dropped where bits move",
    "R's Hessian forgotten",
    "the loss's Hessian without the weights of samples",
    "a sum over devices that starts at another",
    "a product of one term joined to the sum of two",
    "a loop over one block that is taken apart",
    "products of whatever a device holds",
    "updates of whatever a device holds",
    "random bits of all dropouts drawn first thing",
    "a stage that sends g the wrong way",
    "g sent before its W where the two are one",
    "a buffer with a slot too few",
    "a message that is not turned",
    "gradients of empty slots",
    "ends summed over the stages but one",
    "z computed again by the layer after",
    "g not turned at the bend of a v",
    "a ring of two that moves for one way only",
}
# These are refused while the step is traced: there is no report.
REFUSED = {name for name, mutant in MUTANTS.items() if mutant.refused} - NOT_IN_THE_STEP


def name_of(value: Any) -> str:
    return f"{value.mutant if isinstance(value.mutant, str) else value.tensor}-{value.devices}"


def verified(widths: tuple[int, ...], sizes: Sizes, **strategy: Any) -> Report:
    model, chosen = tpmlp.MLP(widths, activation="sigmoid"), tpmlp.Strategy(**strategy)
    return tpmlp.verify(model, mesh_of(sizes), kind="float32", strategy=chosen)


@pytest.mark.parametrize("fault", PLANTED, ids=name_of)
def test_a_fault_is_found_where_it_is(fault):
    mutant = fault.mutant
    if isinstance(mutant, str):
        mutant = MUTANTS[mutant].file, MUTANTS[mutant].old, MUTANTS[mutant].new
    with planted(*mutant):
        report = verified(fault.widths, fault.sizes, **fault.strategy)
    wanted = Fault(tensor=fault.tensor, layer=fault.layer, phase=fault.phase, devices=fault.devices)
    assert report.verdict == "bug"
    # The class is the edited package's own.
    assert str(report.fault) == str(wanted)
    assert str(report).endswith(f"bug: {wanted}")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_fault_that_is_refused_statically_gives_no_report(name):
    mutant = MUTANTS[name]
    edit = mutant.file, mutant.old, mutant.new
    with planted(*edit), pytest.raises(ValueError, match=r"shard_map|signature") as raised:
        verified(WIDTHS, (2, 2, 1))
    # On another mesh the other check may come first.
    said = f"{type(raised.value).__module__}.{type(raised.value).__name__}: {raised.value}"
    assert any(refusal in said for refusal in REFUSALS)


def test_every_mutant_is_planted_or_said_not_to_be_in_the_step():
    named = {fault.mutant for fault in PLANTED if isinstance(fault.mutant, str)}
    assert set(MUTANTS) <= named | NOT_IN_THE_STEP | REFUSED


CLEAN = [
    ((2, 3, 1), {}, "cross_entropy"),
    ((2, 2, 2), {"keep": "gathered"}, "mse"),
    ((1, 8, 1), {"compute_dtype": "bfloat16"}, "cross_entropy"),
    ((1, 3, 1), {"overlap": "ring"}, "logistic"),
    ((8, 1, 1), {"shard_weights": True, "reduce_dtype": "bfloat16"}, "cross_entropy"),
]
# tests/every_clean_run.py has 1000 runs in all.
RUNS_EACH = 20


@pytest.mark.parametrize(("sizes", "fields", "loss"), CLEAN)
def test_a_clean_run_is_never_called_a_bug(sizes, fields, loss):
    assert_never_a_bug(sizes, fields, loss, RUNS_EACH)


def assert_never_a_bug(sizes: Sizes, fields: dict[str, Any], loss: str, num_runs: int) -> None:
    model, mesh = tpmlp.MLP(WIDTHS, activation="tanh"), mesh_of(sizes)
    strategy = tpmlp.Strategy(**fields)
    worst = []
    for seed in range(num_runs):
        report = tpmlp.verify(model, mesh, kind="float32", strategy=strategy, loss=loss, seed=seed)
        assert report.verdict == "rounding", report
        worst.append(report.worst.error)
    # A bound that is far away would find nothing.
    assert max(worst) > 0.05


def test_padding_that_is_not_zero_is_a_bug():
    with planted(MUTANTS[LEAK].file, MUTANTS[LEAK].old, MUTANTS[LEAK].new):
        report = verified(WIDTHS, (1, 3, 1))
    logical = {check.tensor: check.error for check in report.checks}
    assert np.isinf(logical["h_3"]) or logical["h_3"] > 1e3
