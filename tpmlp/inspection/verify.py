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
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpmlp import reference
from tpmlp.checks import check_count
from tpmlp.inspection.bounds import Operation, Phase, Roundoff, operations, unit_roundoff
from tpmlp.inspection.trace import Name, Trace, trace
from tpmlp.kernels.execution import Execution, execution
from tpmlp.losses import Loss, get_loss
from tpmlp.model import MLP
from tpmlp.models import check_is_chain
from tpmlp.parameters import from_numpy, to_numpy
from tpmlp.placement import Placement
from tpmlp.strategy import Strategy
from tpmlp.table import text_table

Kind = Literal["float64", "integers", "float32"]
KINDS: tuple[Kind, ...] = ("float64", "integers", "float32")

# The mission's bound for models up to 16 layers: 1e-12 is 4500 units of roundoff.
FLOAT64_TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One tensor compared.

    Attributes:
        tensor: for example "g_2".
        error: the largest difference, in the unit that `bound` has.
        bound: what it may be at most.
        end_to_end: max |a - b| / max |b| against the reference.
    """

    tensor: str
    error: float
    bound: float
    end_to_end: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """The first operation that rounding cannot explain.

    Attributes:
        tensor: what it computes, for example "g_2".
        layer: l, 1-based, whose forward or backward pass it belongs to.
        phase: "forward", "loss" or "backward".
        devices: where it is wrong: ids of devices, or "all" of those that hold a part of it.
    """

    tensor: str
    layer: int
    phase: Phase
    devices: tuple[int, ...] | Literal["all"]

    def __str__(self) -> str:
        ids = "all devices" if self.devices == "all" else f"device {_listed(self.devices)}"
        return f"{self.tensor}, {self.phase} pass of layer {self.layer}, on {ids}"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Report:
    """What `verify` found.

    Attributes:
        kind: "float64", "integers" or "float32".
        mesh: devices on each axis.
        words: the role of each layer.
        checks: one for each tensor.
        fault: the first operation that rounding cannot explain, or None.
    """

    kind: Kind
    mesh: dict[str, int]
    words: tuple[str, ...]
    checks: tuple[Check, ...]
    fault: Fault | None

    @property
    def ok(self) -> bool:
        """Whether every tensor is within its bound, and every operation."""
        return self.fault is None and all(check.ok for check in self.checks)

    @property
    def verdict(self) -> Literal["rounding", "bug"]:
        """What the differences are."""
        return "rounding" if self.ok else "bug"

    @property
    def worst(self) -> Check:
        """The check with the largest error relative to its bound."""
        return max(self.checks, key=_severity)

    def __str__(self) -> str:
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items())
        unit = {
            "float64": "max|a-b| / max|b|",
            "integers": "max|a-b|",
            "float32": "error / bound of the operation",
        }[self.kind]
        rows = [
            (
                c.tensor,
                *(f"{e:.1e}" for e in (c.error, c.bound, c.end_to_end)),
                "ok" if c.ok else "WRONG",
            )
            for c in self.checks
        ]
        headers = ["tensor", "error", "bound", "end to end", "verdict"]
        title = f"{self.kind} on {axes}, layers {' '.join(self.words)}; error is {unit}"
        where = "" if self.fault is None else f": {self.fault}"
        return f"{title}\n{text_table(headers, rows)}\n{self.verdict}{where}"

    __repr__ = __str__


def verify(
    model: MLP,
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
        model: the MLP; for "integers" its activation is replaced by relu.
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
        ValueError: an unknown kind; "float64" without jax_enable_x64; a loss without a reference.

    Examples:
        >>> import tpmlp
        >>> mlp = tpmlp.MLP((17, 12, 10), activation="sigmoid")
        >>> report = verify(mlp, tpmlp.make_mesh(x=4, y=2), kind="integers")
        >>> report.ok, len(report.checks)
        (True, 12)
    """
    check_is_chain(model, "verify")
    kind = _check_arguments(kind, batch_size, strategy)
    placement = model.place(mesh, strategy)
    if kind == "integers":
        model, loss = replace(model, activation="relu"), "output"
    meant = get_loss(loss)
    data = _Data.draw(model, meant, kind=kind, batch_size=batch_size, seed=seed)
    if kind == "integers":
        _check_exact(model, meant, data, execution(placement, data.x.dtype))
    run, pairs = _run(model, mesh, strategy, meant, data)
    found = [(op, op.by_device()) for op in _operations(model, placement, run, data, meant)]
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
        words=placement.words,
        checks=tuple(
            Check(tensor=name, error=float(error), bound=bound, end_to_end=_relative(*pairs[name]))
            for name, error in errors.items()
        ),
        fault=next(filter(None, starmap(_fault, found)), None),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Data:
    """Made-up parameters and samples, at logical widths."""

    arrays: list[tuple[np.ndarray, np.ndarray | None]]
    x: np.ndarray
    y: Any
    weight: np.ndarray

    @classmethod
    def draw(cls, model: MLP, loss: Loss, *, kind: Kind, batch_size: int, seed: int) -> "_Data":
        rng = np.random.default_rng(seed)
        dtype = np.float64 if kind == "float64" else np.float32

        def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
            if kind == "integers":
                return rng.integers(-2, 3, shape).astype(dtype)
            return (rng.normal(size=shape) * scale).astype(dtype)

        arrays = [
            (draw(d_out, d_in, scale=d_in**-0.5), draw(d_out) if model.bias else None)
            for d_out, d_in in model.layer_shapes
        ]
        x, d_out = draw(batch_size, model.widths[0]), model.widths[-1]
        y = {
            "labels": rng.integers(0, d_out, batch_size),
            "values": rng.integers(0, 2, (batch_size, d_out)).astype(dtype),
        }.get(loss.targets or "none")
        weights = (
            rng.integers(1, 4, batch_size)
            if kind == "integers"
            else rng.uniform(0.5, 2.0, batch_size)
        )
        return cls(arrays=arrays, x=x, y=y, weight=weights.astype(dtype))


def _check_arguments(kind: Any, batch_size: Any, strategy: Strategy | None) -> Kind:
    check_count("batch_size", batch_size, "Use 30.")
    if strategy is not None and strategy.microbatches > 1:
        raise ValueError(
            "strategy must run the batch at once to be verified, as every array of it is compared: "
            f"got microbatches={strategy.microbatches}. Use microbatches=1."
        )
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


def _run(
    model: MLP, mesh: Mesh, strategy: Strategy | None, loss: Loss, data: _Data
) -> tuple[Trace, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Run the step and the reference; return the trace, and all tensors side by side."""
    params = from_numpy(model, data.arrays, mesh, strategy=strategy)
    given: dict[str, Any] = {"weight": data.weight, "loss": loss}
    with jax.default_matmul_precision("highest"):
        run = trace(model, params, data.x, data.y, mesh=mesh, strategy=strategy, **given)
    oracle = reference.trace(data.arrays, data.x, data.y, activation=model.activation, **given)
    return run, _pairs(model, run, oracle)


def _pairs(
    model: MLP, run: Trace, oracle: reference.Trace
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return every tensor of the run beside the reference's, in the order they are computed."""
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(name: Name, l: int) -> None:
        pairs[f"{name}_{l}"] = run.logical(name, l), getattr(oracle, name)[l]

    num_layers = model.num_layers
    for l in range(1, num_layers + 1):
        add("h", l)
        add("z", l)
        if l < num_layers:
            add("sigma_prime", l)
    pairs["loss"] = np.asarray(run.loss), np.asarray(oracle.loss)
    for l, (dW, db) in reversed(list(enumerate(to_numpy(model, run.grads), 1))):
        add("g", l)
        pairs[f"dW_{l}"] = dW, oracle.dW[l]
        if db is not None:
            pairs[f"db_{l}"] = db, np.asarray(oracle.db[l])
    return pairs


def _check_exact(model: MLP, loss: Loss, data: _Data, run: Execution) -> None:
    """Refuse integers whose sums could be too large for the narrowest type, and be rounded.

    With every number replaced by its size, each partial sum of the step, in any order, is at most
    the result: the reference of that says how large sums can get.
    """
    sizes = [(np.abs(W), None if b is None else np.abs(b)) for W, b in data.arrays]
    largest = reference.trace(
        sizes, np.abs(data.x), weight=data.weight, activation="relu", loss=loss
    )
    arrays = [*largest.z.values(), *largest.g.values(), *largest.dW.values()]
    most = max(largest.loss, *(array.max() for array in arrays))
    narrowest = max((run.compute, run.total, run.reduce), key=unit_roundoff)
    bits = jnp.finfo(narrowest).nmant + 1
    if most > 2**bits:
        raise ValueError(
            f"kind='integers' must have sums below 2^{bits}, which {narrowest} holds exactly: got "
            f"widths={model.widths}, batch_size={len(data.x)}, sums up to {most:.1e}. Use a "
            "narrower or shallower model, a smaller batch, or kind='float32'."
        )


def _operations(
    model: MLP, placement: Placement, run: Trace, data: _Data, loss: Loss
) -> Iterator[Operation]:
    types = execution(placement, data.x.dtype)
    return operations(
        data.arrays,
        run,
        data.y,
        activation=model.activation,
        loss=loss.reference,
        weight=data.weight.astype(np.float64),
        roundoff=Roundoff(
            compute=unit_roundoff(types.compute),
            total=unit_roundoff(types.total),
            reduce=unit_roundoff(types.reduce),
            num_devices=max(placement.num_blocks, placement.sizes["data"]),
        ),
    )


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


def _listed(devices: tuple[int, ...]) -> str:
    return ", ".join(map(str, devices))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return max |a - b| / max |b|; the plain difference where b is 0."""
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))


def _severity(check: Check) -> float:
    if np.isnan(check.error):
        return np.inf
    return check.error / check.bound if check.bound else check.error
