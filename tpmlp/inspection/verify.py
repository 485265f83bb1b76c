"""Verify: is this model, on this mesh, the reference? Three ways to ask.

"float64"   every h, z, sigma', g, dW, db and the loss against the unsharded reference:
            max |a - b| <= 1e-12 max |b|.
"integers"  parameters and samples are small integers, sigma is relu and the loss is the output:
            every sum is exact, so order cannot matter, and sharded = reference bit for bit.
"float32"   each operation recomputed in float64 from the run's own inputs, against a bound that
            has one sum in it (tpmlp.inspection.bounds); end-to-end differences are reported, not
            judged. bfloat16 products and sums have wider bounds.

Whichever way is asked, the operations are recomputed too, and the first one that rounding cannot
explain is named: its tensor, layer and phase, and the devices on which it is wrong.

On a mesh with stages h, z, sigma' and g are those of a trace, which has no schedule, and there are
two of the loss and of every dW and db: the trace's own, "traced dW_3", and those of a step with
the strategy's schedule and microbatches, "dW_3" (tpmlp.inspection.compare_chain). The step shows
none of its inside: as an operation it is bounded by how far rounding may put it from the trace
(tpmlp.inspection.conditioning).
"""

from itertools import starmap
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tpmlp.checks import check_count
from tpmlp.graph.graph import Graph
from tpmlp.inspection.bounds import Operation
from tpmlp.inspection.compare_chain import compare_chain
from tpmlp.inspection.compare_graph import compare_graph
from tpmlp.inspection.compared import Numbers
from tpmlp.inspection.report import KINDS, Check, Fault, Kind, Report
from tpmlp.models import Model, check_model
from tpmlp.strategy import Strategy

# The mission's bound for models up to 16 layers: 1e-12 is 4500 units of roundoff.
FLOAT64_TOLERANCE = 1e-12


def verify(
    model: Model,
    mesh: Mesh,
    *,
    strategy: Strategy | None = None,
    loss: Any = "cross_entropy",
    kind: Kind | None = None,
    batch_size: int = 30,
    seed: int = 0,
) -> Report:
    """Run one step on made-up data and compare every tensor with the reference.

    Args:
        model: the MLP or the Graph; for "integers" activations are replaced by relu, and a Graph
            must be of vertices whose sums are exact.
        mesh: the mesh.
        strategy: Strategy() by default.
        loss: the loss; for "integers" it is replaced by output.
        kind: "float64" (needs jax_enable_x64), "integers" or "float32"; by default float64 where
            64-bit types are enabled, else float32.
        batch_size: samples.
        seed: of parameters and samples.

    Returns:
        A Report; print it, or ask `.ok`.

    Raises:
        ValueError: an unknown kind; "float64" without jax_enable_x64; a loss without a reference;
            microbatches on a mesh without stages;
            of a Graph a vertex that rounds for "integers", or whose function has operations with
            unknown rounding for "float32".

    Examples:
        >>> import tpmlp
        >>> mlp = tpmlp.MLP((17, 12, 10), activation="sigmoid")
        >>> report = verify(mlp, tpmlp.make_mesh(x=4, y=2), kind="integers")
        >>> report.ok, len(report.checks)
        (True, 12)
    """
    check_model(model)
    kind = _check_arguments(kind, batch_size, strategy)
    numbers = Numbers(np.random.default_rng(seed), kind)
    given: Any = {"loss": loss, "numbers": numbers, "batch_size": batch_size}
    if isinstance(model, Graph):
        words, pairs, operations = compare_graph(model, mesh, strategy, **given)
    else:
        words, pairs, operations = compare_chain(model, mesh, strategy, **given)
    found = [(operation, operation.by_device()) for operation in operations]
    if kind == "float32":
        errors, bound = {op.tensor: max(worst.values()) for op, worst in found}, 1.0
    elif kind == "integers":
        errors, bound = {name: np.abs(a - b).max() for name, (a, b) in pairs.items()}, 0.0
    else:
        errors = {name: _relative(a, b) for name, (a, b) in pairs.items()}
        bound = FLOAT64_TOLERANCE
    return Report(
        kind=kind,
        mesh=dict(mesh.shape),
        words=words,
        checks=tuple(
            Check(tensor=name, error=float(error), bound=bound, end_to_end=_relative(*pairs[name]))
            for name, error in errors.items()
        ),
        fault=next(filter(None, starmap(_fault, found)), None),
    )


def _check_arguments(kind: Any, batch_size: Any, strategy: Strategy | None) -> Kind:
    check_count("batch_size", batch_size, "Use 30.")
    x64 = jax.config.read("jax_enable_x64")
    kind = kind or ("float64" if x64 else "float32")
    if kind not in KINDS:
        raise ValueError(
            f"kind must be one of {KINDS}: got kind={kind!r}. Leave it out for the default."
        )
    if kind == "float64" and not x64:
        raise ValueError(
            "kind='float64' must have 64-bit types: got jax_enable_x64=False. Call "
            "jax.config.update('jax_enable_x64', True) first, or use kind='float32'."
        )
    strategy = strategy or Strategy()
    chosen = strategy.compute_dtype, strategy.reduce_dtype
    if kind == "float64" and not set(chosen) <= {None, "float64"}:
        raise ValueError(
            "kind='float64' must have all of the step in float64: got compute_dtype="
            f"{chosen[0]!r}, reduce_dtype={chosen[1]!r}. Use kind='float32', which bounds every "
            "operation in the types that it has, or leave both out."
        )
    return kind


def _fault(operation: Operation, errors: dict[int, float]) -> Fault | None:
    wrong = tuple(device for device, error in errors.items() if not error <= 1)
    if not wrong:
        return None
    return Fault(
        tensor=operation.tensor,
        layer=operation.layer,
        phase=operation.phase,
        devices="all" if len(wrong) == len(errors) else wrong,
    )


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return max |a - b| / max |b|; the plain difference where b is 0."""
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))
