"""Which optimisers fit can run, found by trying them.

On a mesh where no width is padded, every optax transformation gives what it gives on one device.
Padding changes those that look at an array's shape: a mean over its entries, a scale from its
sides, noise drawn in its shape, a rule for large arrays. Names would be a poor guide, since
users write their own; so the transformation itself is run on small arrays, once plain and once
padded, and the updates are compared. What differs is taken apart to say which part it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpmlp.extras import require
from tpmlp.models import Model
from tpmlp.train.optimizer import MaskedOptimizer, ShardedOptimizer, shape_trees

# Widths up to this one are probed as they are. Larger ones are replaced by others above it, 16
# apart and in the same order, so that a matrix that was tall stays tall.
LARGEST_EXACT_WIDTH = 128
WIDTH_STEP = 16

# Gradients of many sizes, so that a clip or a floor acts in some step whatever its threshold.
GRADIENT_EXPONENTS = (0, 3, -3, 1, 6, -1, -6, 0)

# Relative, in the 2-norm of one array's update. One padding row changes a mean over at most 400
# of them by 2e-3, its root by 1e-3, and the ratio of two sides, where each gets one, by 1e-4.
# Norms are summed in another order when zeros stand between the numbers; in float64 that is
# 1e-14, and leaves room for optimisers that subtract almost equal numbers.
TOLERANCE = 2e-5

# The probe runs a few small steps: compiling well would take longer than it saves.
QUICKLY = {"xla_backend_optimization_level": 0}

# What of every dim of every array the probe gives to an optimiser.
ALL = slice(None)
EVERY_SECOND = (slice(0, None, 2), slice(1, None, 2))

# What a transformation raises when it is not given what it needs, or not by itself.
REFUSALS = (TypeError, ValueError, AttributeError, KeyError, IndexError)

# Transformations that users know by the name of the optimiser they are in.
KNOWN_IN = {
    "scale_by_factored_rms": "adafactor",
    "scale_by_muon": "contrib.muon",
    "scale_by_shape": "contrib.muon",
}


def make_optimizer(
    optimizer: Any, *, model: Model, placement: Any, dtype: Any, device: Any = None
) -> ShardedOptimizer:
    """Return the optimiser for a model on a mesh, or refuse it.

    Args:
        optimizer: an optax.GradientTransformation.
        model: the model.
        placement: where its parameters are.
        dtype: of the parameters.
        device: where to try it; one of the mesh by default, which must be here then.

    Raises:
        ValueError: it is no transformation; it needs what fit cannot give; or padding would
            change what it does. Names the transformations at fault.
    """
    optax = require("optax", extra="train", user="tpmlp.fit")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            "optimizer must be an optax.GradientTransformation: got "
            f"{type(optimizer).__name__}. Use for example optax.adam(1e-3), called; of "
            "optax.MultiSteps its gradient_transformation()."
        )
    setting = _Setting(*shape_trees(model, placement, jnp.dtype(dtype)))
    _check_arguments(optimizer, setting)
    is_staged = placement.sizes["stage"] > 1
    if setting.is_padded or placement.is_invariant or is_staged:
        here = placement.mesh.local_devices[0] if device is None else device
        with jax.default_device(here), jax.enable_x64(True):
            if placement.is_invariant or is_staged:
                _check_elementwise(optimizer, setting, STACKED if is_staged else IN_BLOCKS)
            else:
                _check_padding(optimizer, setting, model, placement)
    return ShardedOptimizer(model, placement, setting.optimizer(optimizer))


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the parameters are, as trees of ShapeDtypeStructs.

    Attributes:
        logical: without padding.
        padded: as they are on the mesh.
    """

    logical: Any
    padded: Any

    @property
    def is_padded(self) -> bool:
        """Whether any array is."""
        return self.logical != self.padded

    @property
    def dtype(self) -> Any:
        """The type of the parameters."""
        return jax.tree.leaves(self.logical)[0].dtype

    def optimizer(self, tx: Any) -> MaskedOptimizer:
        """Return tx for these parameters."""
        return MaskedOptimizer(tx, self.padded, self.logical)

    def plain(self) -> "_Setting":
        """Return the setting without padding."""
        return _Setting(self.logical, self.logical)

    def even(self) -> "_Setting":
        """Return the setting with widths made even, and no padding."""
        even = jax.tree.map(lambda a: _shaped([n + n % 2 for n in a.shape], a.dtype), self.logical)
        return _Setting(even, even)

    def small(self) -> "_Setting":
        """Return the setting with large widths made smaller, and the same padding."""
        sizes = {n for a in jax.tree.leaves(self.logical) for n in a.shape}
        large = sorted(n for n in sizes if n > LARGEST_EXACT_WIDTH)
        smaller = {w: LARGEST_EXACT_WIDTH + WIDTH_STEP * i for i, w in enumerate(large, 1)}

        def logical(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return _shaped([smaller.get(n, n) for n in a.shape], "float64")

        def padded(a: jax.ShapeDtypeStruct, whole: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            pairs = zip(a.shape, whole.shape, strict=True)
            return _shaped([smaller.get(n, n) + m - n for n, m in pairs], "float64")

        return _Setting(
            jax.tree.map(logical, self.logical), jax.tree.map(padded, self.logical, self.padded)
        )


def _shaped(shape: list[Any], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _check_arguments(tx: Any, setting: _Setting) -> None:
    try:
        _run_abstractly(tx, setting)
    except REFUSALS as error:
        names = culprits(tx, lambda member: _is_refused(member, setting))
        raise ValueError(
            "optimizer must need no more than gradients, parameters and value=, the objective: "
            f"got {', '.join(names)}, which says: {str(error).splitlines()[0]} Use for example "
            "optax.adam(1e-3)."
        ) from error


def _is_refused(tx: Any, setting: _Setting) -> bool:
    try:
        _run_abstractly(tx, setting)
    except REFUSALS:
        return True
    return False


def _run_abstractly(tx: Any, setting: _Setting) -> None:
    optimizer = setting.optimizer(tx)
    params = optimizer.padded
    state = jax.eval_shape(optimizer.init, params)
    value = jax.ShapeDtypeStruct((), setting.dtype)
    jax.eval_shape(optimizer.update, params, state, params, value)


def _check_padding(tx: Any, setting: _Setting, model: Model, placement: Any) -> None:
    if _is_reproduced(tx, setting):
        return
    names = culprits(tx, lambda member: _differs(member, setting))
    shape = dict(placement.mesh.shape)
    blocks = placement.num_blocks
    spec = next(p for p in jax.tree.leaves(model.parameters) if p.shape != p.padded(blocks))
    raise ValueError(
        "optimizer must not depend on the shapes of arrays where widths are padded: got "
        f"{', '.join(names)}, {spec.name} of shape {spec.shape} padded to {spec.padded(blocks)} on "
        f"the mesh {shape}. Use an elementwise optimizer such as optax.adam(1e-3), or widths that "
        f"{'data*' * placement.splits_data}x*y={placement.num_blocks} divides."
    )


# Why an optimiser must be elementwise, and the way out.
IN_BLOCKS = (
    "with reduction='invariant', which updates one block of the parameters after another",
    "reduction='fast'",
)
STACKED = ("on a mesh with stages, where layers of all stages are one array", "stage=1")


def _check_elementwise(tx: Any, setting: _Setting, why: tuple[str, str]) -> None:
    """Refuse what looks at more than one element: in blocks it would do something else."""
    if _is_elementwise(tx, setting):
        return
    names = culprits(
        tx, lambda part: not _is_refused(part, setting) and not _is_elementwise(part, setting)
    )
    raise ValueError(
        f"optimizer must be elementwise {why[0]}: got {', '.join(names)}. Use for example "
        f"optax.adam(1e-3) or optax.sgd(0.1, momentum=0.9), or {why[1]}."
    )


def _is_elementwise(tx: Any, setting: _Setting) -> bool:
    """Whether every second row and column, without the others, is updated as it is with them."""
    small = setting.small().even()
    silent = False
    whole, *parts = (_updates(tx, small, rows) for rows in (ALL, *EVERY_SECOND))
    for together, *apart in zip(whole, *parts, strict=True):
        for rows, updates in zip(EVERY_SECOND, apart, strict=True):
            if not _agree(together[:, *(rows,) * (together.ndim - 1)], updates):
                return False
        silent = silent or not together.any()
    judged_by_parts = silent or _waits(tx)
    return not judged_by_parts or all(
        _is_refused(part, setting) or _is_elementwise(part, setting) for part in members(tx)
    )


def _differs(member: Any, setting: _Setting) -> bool:
    """Whether a part of a transformation, by itself, is changed by padding."""
    return not _is_refused(member, setting) and not _is_reproduced(member, setting)


def _is_reproduced(tx: Any, setting: _Setting) -> bool:
    """Whether padding changes nothing; what may act later is judged by its parts."""
    small = setting.small()
    settings = (setting, setting.plain(), small, small.plain())
    if len({_form(tx, s) for s in settings}) > 1:
        return False
    silent = False
    for plain, padded in zip(_updates(tx, small.plain()), _updates(tx, small), strict=True):
        if not _agree(plain, padded):
            return False
        silent = silent or not plain.any()
    judged_by_parts = silent or _waits(tx)
    return not judged_by_parts or all(not _differs(part, setting) for part in members(tx))


def _waits(tx: Any) -> bool:
    """Whether a part acts on a condition, which the few steps of the probe may not meet."""
    named = getattr(tx.update, "__qualname__", "").startswith("conditionally_")
    return named or any(map(_waits, members(tx)))


def _form(tx: Any, setting: _Setting) -> Any:
    """Return the structure of the state and the ranks of its arrays."""
    optimizer = setting.optimizer(tx)
    leaves, structure = jax.tree.flatten(jax.eval_shape(optimizer.init, optimizer.padded))
    return structure, tuple(leaf.ndim for leaf in leaves)


def _updates(tx: Any, setting: _Setting, rows: slice = ALL) -> list[np.ndarray]:
    """Return the updates of every parameter at logical widths, steps along the first dim.

    Args:
        tx: the transformation.
        setting: the widths.
        rows: what of every dim of every array it is given.
    """
    optimizer = setting.optimizer(tx)
    rng = np.random.default_rng(0)

    def draw() -> Any:
        return jax.tree.map(
            lambda whole, part: _fill(rng.normal(size=part.shape), whole)[(rows,) * whole.ndim],
            optimizer.padded,
            optimizer.logical,
        )

    init, update = (
        jax.jit(method, compiler_options=QUICKLY) for method in (optimizer.init, optimizer.update)
    )
    params, value, steps = draw(), np.ones((), setting.dtype), []
    state = init(params)
    for exponent in GRADIENT_EXPONENTS:
        grads = jax.tree.map(lambda g, e=exponent: g * g.dtype.type(10.0**e), draw())
        updates, state = update(grads, state, params, value)
        params = jax.tree.map(np.add, params, jax.device_get(updates))
        steps.append(jax.device_get(updates))
    cut = [tuple(map(slice, leaf.shape)) for leaf in jax.tree.leaves(optimizer.logical)]
    by_param = zip(*map(jax.tree.leaves, steps), strict=True)
    return [
        np.stack([u[part] for u in updates]) for updates, part in zip(by_param, cut, strict=True)
    ]


def _fill(numbers: np.ndarray, whole: jax.ShapeDtypeStruct) -> np.ndarray:
    padding = [(0, n - m) for m, n in zip(numbers.shape, whole.shape, strict=True)]
    return np.pad(numbers, padding).astype(whole.dtype)


def _agree(plain: np.ndarray, padded: np.ndarray) -> bool:
    """Whether the updates of one parameter are equal in every step, up to rounding."""
    finite = np.isfinite(plain)
    if not np.array_equal(finite, np.isfinite(padded)):
        return False
    wanted, got = (np.where(finite, u, 0).astype(np.float64) for u in (plain, padded))
    steps = (-1, plain[0].size)
    error = np.linalg.norm((got - wanted).reshape(steps), axis=1)
    return bool((error <= TOLERANCE * np.linalg.norm(wanted.reshape(steps), axis=1)).all())


def culprits(tx: Any, fails: Callable[[Any], bool]) -> list[str]:
    """Return the names of the innermost parts of a transformation that fail by themselves.

    Examples:
        >>> import optax
        >>> tx = optax.chain(optax.centralize(), optax.adam(1e-3))
        >>> culprits(tx, lambda member: "centralize" in describe(member))
        ['centralize']
    """
    inside = [name for m in members(tx) if fails(m) for name in culprits(m, fails)]
    return list(dict.fromkeys(inside)) or [describe(tx)]


def describe(tx: Any) -> str:
    """Name a transformation: by the function that made it, and by its parts if it is a chain."""
    inside = list(dict.fromkeys(describe(member) for member in members(tx)))
    name = getattr(tx.update, "__qualname__", type(tx.update).__name__).split(".")[0]
    if name == "with_extra_args_support" and inside:
        return inside[0]
    if inside:
        return f"{name}({', '.join(inside)})"
    return f"{name} (in optax.{KNOWN_IN[name]})" if name in KNOWN_IN else name


def members(tx: Any) -> list[Any]:
    """Return the transformations that a transformation was made of.

    optax hides them in the closures of init and update: as transformations, or, in a chain, as
    a tuple of init functions and one of update functions.
    """
    optax = require("optax", extra="train", user="tpmlp.fit")

    def is_transformation(value: Any) -> bool:
        return isinstance(value, optax.GradientTransformation)

    held = [list(_held(tx.init)), list(_held(tx.update))]
    found = jax.tree.leaves(held, is_leaf=is_transformation)
    pairs = [v for v in found if is_transformation(v)]
    for inits in filter(_is_functions, held[0]):
        for updates in filter(_is_functions, held[1]):
            if len(inits) == len(updates):
                pairs += map(optax.GradientTransformationExtraArgs, inits, updates)
    return list({id(pair.update): pair for pair in pairs}.values())


def _is_functions(value: Any) -> bool:
    return type(value) is tuple and len(value) > 0 and all(map(callable, value))


def _held(function: Any) -> Iterator[Any]:
    """Yield what a function closes over, and the attributes of the object it is bound to."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that was never set
            continue
    yield from getattr(getattr(function, "__self__", None), "__dict__", {}).values()
