"""Cost: what a training step takes on every device, for a mesh that need not exist.

Bytes are those of tpmlp.predict, tpmlp.pipeline and so of `MLP.summary`, which the suite compares
with compiled programs; seconds are those of tpmlp.planner.timing. A step, as `fit` compiles it with
its update, holds parameters, gradients, optimiser states, the batch, and temporaries: at its height
all of them, as parameters and states are updated where they are.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.batch import batch_shardings, padded_shapes
from tpmlp.checks import check_count, check_dtype
from tpmlp.kernels.cost import Collective, total_bytes
from tpmlp.losses import Loss, get_loss
from tpmlp.mesh import AXES, describe_mesh
from tpmlp.model import MLP
from tpmlp.pipeline.cost import stage_collectives
from tpmlp.pipeline.memory import step_bytes
from tpmlp.pipeline.placement import PipelinePlacement, place_stages
from tpmlp.pipeline.staged import staged_specs
from tpmlp.pipeline.stages import Stages
from tpmlp.pipeline.summary import param_words, summarize_pipeline
from tpmlp.placement import check_described, place_chain
from tpmlp.planner.hardware import get_hardware
from tpmlp.planner.timing import StepTime, chain_collectives, step_time
from tpmlp.predict import step_temp_bytes
from tpmlp.strategy import Strategy
from tpmlp.table import format_bytes, text_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What a device receives in a step in all collectives of one kind over the same axes.

    Attributes:
        axes: mesh axes.
        kind: of collective; messages between stages are "ppermute".
        bytes: received.
    """

    axes: tuple[str, ...]
    kind: str
    bytes: int | float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """What one device holds in a step.

    Attributes:
        param_bytes: parameters, padding included.
        gradient_bytes: as many.
        optimizer_bytes: states of the optimiser.
        batch_bytes: samples, targets and weights.
        temp_bytes: activations that are kept, and all else that lives within the step.
    """

    param_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    temp_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Cost:
    """What a training step takes; prints as tables.

    Attributes:
        mesh: devices on each axis, as make_mesh takes them.
        strategy: the strategy.
        time: seconds, and FLOPs of a device.
        memory: bytes on a device.
        traffic: what a device receives, by axes and kind; of the stage that receives most.
    """

    mesh: Mapping[str, int]
    strategy: Strategy
    time: StepTime
    memory: StepMemory
    traffic: tuple[Traffic, ...]

    def __str__(self) -> str:
        time, memory = self.time, self.memory
        seconds = {
            "products": time.products_s,
            "collectives": time.collectives_s,
            "bubble": time.bubble_s,
            "step, one after another": time.step_s,
            "step, overlapped": time.overlapped_s,
        }
        held = {name.removesuffix("_bytes"): getattr(memory, name) for name in memory.__slots__}
        held["peak"] = memory.peak_bytes
        moved = [("*".join(t.axes), t.kind, format_bytes(t.bytes)) for t in self.traffic]
        parts = [
            text_table(["time", "seconds"], [(n, f"{s:.4g}") for n, s in seconds.items()]),
            text_table(["memory", "on a device"], [(n, format_bytes(b)) for n, b in held.items()]),
            text_table(["over", "collective", "a device receives"], moved),
        ]
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.items())
        return "\n\n".join([f"on {axes}", *parts[: 3 if moved else 2]])

    __repr__ = __str__


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is trained on what: all that a plan does not choose.

    Attributes:
        model: an MLP.
        batch_size: samples of one step.
        hardware: a Hardware, or the name of a chip.
        dtype: of the parameters.
        loss: the loss.
        optimizer_bytes: of the optimiser's states, for each parameter: 0 for plain SGD, 4 for
            momentum in float32, 8 for Adam in float32.

    Raises:
        ValueError: a model that is no MLP, a batch size that is no positive integer, an unknown
            chip, dtype or loss, a user's loss, whose targets have no known shape, or
            optimizer_bytes below 0.
    """

    model: MLP
    batch_size: int
    hardware: Any
    dtype: Any = "float32"
    loss: Any = "mse"
    optimizer_bytes: float = 8

    def __post_init__(self) -> None:
        if not isinstance(self.model, MLP):
            raise ValueError(
                f"model must be an MLP to be planned for: got a {type(self.model).__name__}. Of a "
                "Graph, model.summary says what a step moves and holds on a mesh that is there."
            )
        batch_size = check_count("batch_size", self.batch_size, "Give the samples of one step.")
        checked = {
            "batch_size": batch_size,
            "hardware": get_hardware(self.hardware),
            "dtype": check_dtype("dtype", self.dtype),
            "loss": get_loss(self.loss),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        number = isinstance(self.optimizer_bytes, int | float)
        if not number or not 0 <= self.optimizer_bytes < float("inf"):
            raise ValueError(
                "optimizer_bytes must be a number of at least 0: got optimizer_bytes="
                f"{self.optimizer_bytes!r}. Use the bytes of its states for each parameter, 8 for "
                "Adam in float32."
            )
        self.hardware.peak_flops_per_s(self.dtype)

    def place(self, mesh: Mapping[str, int], strategy: Strategy) -> Any:
        """Return where the layers are on devices that need not be there.

        Raises:
            ValueError: the mesh or the model cannot have the strategy.
        """
        described = describe_mesh(platform=self.hardware.platform, **mesh)
        strategy = check_described(strategy, described)
        if described.shape["stage"] > 1:
            return place_stages(self.model.widths, self.model.bias, described, strategy)
        return place_chain(self.model.widths, described, strategy)

    def time(self, placement: Any) -> StepTime:
        """Return how long a step takes."""
        return step_time(
            placement,
            self.hardware,
            bias=self.model.bias,
            batch_size=self.batch_size,
            dtype=self.dtype,
            loss=self.loss,
        )

    def held(self, placement: Any) -> StepMemory:
        """Return what a device holds whatever the step does: all but temporaries."""
        stages = placement.stages if isinstance(placement, PipelinePlacement) else None
        words = _param_words(self.model, stages, placement.num_blocks)
        param_bytes = words * jnp.dtype(self.dtype).itemsize
        return StepMemory(
            param_bytes=param_bytes,
            gradient_bytes=param_bytes,
            optimizer_bytes=round(words * self.optimizer_bytes),
            batch_bytes=batch_bytes(placement, self.loss, self.batch_size, self.dtype),
            temp_bytes=0,
        )

    def memory(self, placement: Any) -> StepMemory:
        """Return what a device holds."""
        return replace(self.held(placement), temp_bytes=self.temp_bytes(placement))

    def temp_bytes(self, placement: Any) -> int:
        """Return the temporaries of a step.

        Raises:
            ValueError: they are not predicted, of rings and of reduction="invariant".
        """
        given: Any = {"batch_size": self.batch_size, "dtype": self.dtype}
        if isinstance(placement, PipelinePlacement):
            return step_bytes(placement, **given).total
        found = step_temp_bytes(placement, bias=self.model.bias, **given)
        if found is None:
            raise ValueError(
                "strategy must be one whose memory is predicted: got overlap="
                f"{placement.strategy.overlap!r}, reduction={placement.strategy.reduction!r}. Use "
                "overlap='none' and reduction='fast'."
            )
        return found

    def traffic(self, placement: Any) -> tuple[Traffic, ...]:
        """Return what a device receives, by axes and kind."""
        given: Any = {"batch_size": self.batch_size, "dtype": self.dtype, "loss": self.loss}
        if not isinstance(placement, PipelinePlacement):
            counted = chain_collectives(placement, bias=self.model.bias, **given)
            return _by_kind(replace(row, times=row.times * count) for row, count in counted)
        stages = range(placement.sizes["stage"])
        busiest = max(
            ([*stage_collectives(placement, stage, **given)] for stage in stages), key=total_bytes
        )
        messages = summarize_pipeline(placement, self.model.specs(placement), **given).messages
        moved = Traffic(axes=("stage",), kind="ppermute", bytes=messages.moved)
        return (*_by_kind(busiest), moved)

    def cost(self, mesh: Mapping[str, int], strategy: Strategy | None = None) -> Cost:
        """Return what a training step takes.

        Args:
            mesh: devices on each axis, as make_mesh takes them; those left out are 1.
            strategy: Strategy() by default.

        Raises:
            ValueError: an unknown axis, or one that is no positive integer; a strategy that the
                mesh or the model cannot have, or whose memory is not predicted.

        Examples:
            >>> problem = Problem(model=MLP((64, 256, 10)), batch_size=128, hardware="h100")
            >>> cost = problem.cost({"x": 8})
            >>> cost.memory.param_bytes
            10376
            >>> [(t.axes, t.kind) for t in cost.traffic][:2]
            [(('x',), 'all_gather'), (('x',), 'all_reduce')]
        """
        sizes = _check_sizes(mesh)
        placement = self.place(sizes, Strategy() if strategy is None else strategy)
        return Cost(
            mesh=sizes,
            strategy=placement.strategy,
            time=self.time(placement),
            memory=self.memory(placement),
            traffic=self.traffic(placement),
        )


def batch_bytes(placement: Any, loss: Loss, batch_size: int, dtype: str) -> int:
    """Return the bytes of the batch on one device: samples, targets and weights."""
    shapes = padded_shapes(placement, loss, batch_size)
    shardings = batch_shardings(placement, loss)
    labels = {"labels": jnp.dtype(jnp.int32).itemsize}
    item_bytes = jnp.dtype(dtype).itemsize
    of_targets = labels.get(str(loss.targets), item_bytes)
    total = 0
    for array, sharding, each in zip(
        shapes, shardings, (item_bytes, of_targets, item_bytes), strict=True
    ):
        pairs = zip(jax.tree.leaves(array), jax.tree.leaves(sharding), strict=True)
        total += sum(prod(split.shard_shape(leaf.shape)) * each for leaf, split in pairs)
    return total


@lru_cache(maxsize=1024)
def _param_words(model: MLP, stages: Stages | None, num_blocks: int) -> int:
    """Return how many numbers of the parameters are on one device."""
    specs = model.parameters if stages is None else staged_specs(model.parameters, stages)
    return param_words(specs, num_blocks)


def _by_kind(rows: Iterable[Collective]) -> tuple[Traffic, ...]:
    """Return the bytes of collectives by axes and kind, exact before the last rounding."""
    alike: dict[Any, list[Collective]] = defaultdict(list)
    for row in rows:
        alike[row.axes, row.kind].append(row)
    return tuple(
        Traffic(axes=axes, kind=kind, bytes=total_bytes(found))
        for (axes, kind), found in sorted(alike.items())
    )


def _check_sizes(mesh: Mapping[str, int]) -> dict[str, int]:
    """Return the devices on every axis, or refuse other axes and what is no positive integer."""
    if not isinstance(mesh, Mapping) or not set(mesh) <= set(AXES):
        raise ValueError(
            f"mesh must be devices on some of the axes {AXES}: got mesh={mesh!r}. Use for example "
            "{'data': 2, 'x': 4}."
        )
    return {
        axis: check_count(f"mesh axis {axis}", mesh.get(axis, 1), "Leave an axis out for 1.")
        for axis in AXES
    }
