"""What a training step of a graph moves, told in the order in which tpmlp.graph.engine runs.

Pure arithmetic, as tpmlp.kernels.cost, whose rows these are; layers are vertices here. The suite
compares them with the collectives of the compiled program.

The engine computes every vertex by itself, and XLA once what is equal. So vertices that are alike,
of one kind and one set of parameters and reading the same, count once in a forward pass; and what
the backward pass makes of one g that a sum hands to several vertices counts once, where it does not
wait for different things. More is equal only where a graph computes the same twice to no end, as
two alike vertices to which a sum hands one g: there XLA may move less than is told here.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tpmlp.graph import kinds
from tpmlp.graph.engine import (
    is_rebuilt,
    kept_names,
    reads,
    recomputed_nodes,
    trained_nodes,
)
from tpmlp.graph.placement import GATHER, TURN, WHOLE, GraphPlacement, Node
from tpmlp.kernels.cost import Collective, Kind, Phase, Types, loss_collectives
from tpmlp.layout import padded
from tpmlp.losses import Loss
from tpmlp.predict import step_types
from tpmlp.regularizers import ElementwisePenalty

# Parameters that a vertex multiplies with in its backward pass, and when r is built again.
USED_BACKWARD = {
    kinds.Dense: {"W"},
    kinds.Scale: {"scale"},
    kinds.RMSNorm: {"scale"},
    kinds.LayerNorm: {"scale"},
}
# Rows of one number a token that cross the devices: forward, and backward.
SUMS: dict[type, tuple[tuple[int, ...], tuple[int, ...]]] = {
    kinds.RMSNorm: ((1,), (1,)),
    kinds.LayerNorm: ((1, 1), (2,)),
    kinds.Softmax: ((1, 1), (1,)),
}


def step_collectives(
    placement: GraphPlacement,
    *,
    batch_size: int,
    dtype: str = "float32",
    loss: Loss | None = None,
    penalty: ElementwisePenalty | None = None,
) -> list[Collective]:
    """Return the collectives of one training step, in order.

    Args:
        placement: the graph on its mesh, with its strategy.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its collectives out.
        penalty: an elementwise R(W), or None.
    """
    told = _Told(placement, batch_size, step_types(placement, dtype))
    told.run(placement.program, "forward")
    if loss is not None:
        told.objective(loss, penalty)
    told.backward()
    return told.rows


@dataclass
class _Told:
    """The collectives so far.

    Attributes:
        placement: the graph on its mesh.
        batch_size: samples of one step.
        types: bytes of an element.
        rows: the collectives.
    """

    placement: GraphPlacement
    batch_size: int
    types: Types
    rows: list[Collective] = field(default_factory=list)

    @cached_property
    def alike(self) -> dict[str, str]:
        """For each node the first one that gives the same r: XLA computes it once."""
        first: dict[Any, str] = {}
        alike: dict[str, str] = {}
        for node in self.placement.program:
            owner = node.owner if node.owner in self.placement.graph.arrays else None
            same = node.kind, owner, tuple(alike[name] for name in node.inputs)
            if isinstance(node.kind, kinds.Source | kinds.Dropout):
                alike[node.name] = node.name
            elif isinstance(node.kind, kinds.ActivityL1):
                alike[node.name] = alike[node.inputs[0]]  # r is what it reads
            else:
                alike[node.name] = first.setdefault(same, node.name)
        return alike

    @property
    def batch(self) -> int:
        """Samples of one microbatch on one device."""
        parts = self.placement.sizes["data"] * self.placement.strategy.microbatches
        return padded(self.batch_size, self.placement.row_blocks) // parts

    def size(self, node: Node, roles: str) -> int:
        """Return the devices on the axes of roles."""
        return math.prod(self.placement.sizes[node.axes[role]] for role in roles)

    def summed(self, item_bytes: int) -> int:
        """Return the bytes of an element as it is summed: XLA's CPU compiler widens bfloat16."""
        return 4 if self.placement.platform == "cpu" and item_bytes == 2 else item_bytes

    def add(
        self,
        phase: Phase,
        node: Node,
        tensor: str,
        kind: Kind,
        roles: str,
        elements: int,
        item_bytes: int,
        times: int | None = None,
    ) -> None:
        """Add a collective over the axes of roles, if there is one."""
        axes = tuple(node.axes[role] for role in roles)
        axes = tuple(axis for axis in axes if self.placement.sizes[axis] > 1)
        if axes and elements:
            num_devices = math.prod(self.placement.sizes[axis] for axis in axes)
            if kind == "ppermute":
                # An exchange between two: what a device holds goes, and as much comes.
                num_devices, elements = 2, 2 * elements
            self.rows.append(
                Collective(
                    phase=phase,
                    layer=0,
                    tensor=f"{node.name}: {tensor}",
                    kind=kind,
                    axes=axes,
                    num_devices=num_devices,
                    elements=elements,
                    item_bytes=item_bytes,
                    times=self.types.microbatches if times is None else times,
                )
            )

    def columns(self, node: Node) -> int:
        """Return the columns of r on a device: samples, or their tokens."""
        return self.batch * node.shape.positions

    def whole(self, node: Node) -> int:
        """Return the elements of r, over all devices that split its features."""
        return node.padded_width * self.columns(node)

    def run(self, nodes: Iterable[Node], phase: Phase) -> None:
        """Tell nodes forward, what is equal once."""
        told: set[Any] = set()
        for node in nodes:
            if self.alike[node.name] not in told:
                self.forward(node, phase)
            # The sums of a norm are those of what it reads, whatever its own parameters.
            sums = type(node.kind), *(self.alike[name] for name in node.inputs)
            for num_rows in SUMS.get(sums[0], ((), ()))[0] if sums not in told else ():
                self.sums(node, phase, num_rows)
            told |= {self.alike[node.name], sums}

    def forward(self, node: Node, phase: Phase) -> None:
        """Tell a node's forward pass, without its sums."""
        types = self.types
        if isinstance(node.kind, kinds.Source):
            return
        self.gather_params(node, phase, set(self.placement.graph.arrays.get(node.owner, {})))
        if node.kind in (GATHER, WHOLE):
            self.gather(node, phase)
        elif node.kind is TURN:
            share = self.whole(node) // self.size(node, "sg")
            self.add(phase, node, "r", "ppermute", "sg", share, types.total)
        elif isinstance(node.kind, kinds.Dense):
            part = self.whole(node) // self.size(node, "g")
            self.add(phase, node, "r", "reduce_scatter", "s", part, types.scatter)
        elif isinstance(node.kind, kinds.Embedding):
            part = self.whole(node) // self.size(node, "s")
            item_bytes = self.summed(types.compute)
            self.add(phase, node, "r", "reduce_scatter", "g", part, item_bytes)

    def gather(self, node: Node, phase: Phase) -> None:
        """Tell the gather of what vertices read."""
        roles = "g" if node.kind is GATHER else "sg"
        gathered = self.whole(node) // (self.size(node, "s") if node.kind is GATHER else 1)
        self.add(phase, node, "r", "all_gather", roles, gathered, self.types.compute)

    def sums(self, node: Node, phase: Phase, num_rows: int) -> None:
        """Tell an all-reduce of rows of one number a token."""
        elements = num_rows * self.columns(node)
        item_bytes = self.summed(self.types.total)
        self.add(phase, node, "sums", "all_reduce", "sg", elements, item_bytes)

    def gather_params(self, node: Node, phase: Phase, names: set[str]) -> None:
        """Tell the gathers of parameters that data splits, at one use."""
        if not self.types.splits_data:
            return
        for name in self.placement.graph.arrays.get(node.owner, {}):
            if name in names:
                item_bytes = self.types.compute if name == "W" else self.types.param
                elements = self.local(node.owner, name)
                self.add(phase, node, name, "all_gather", "d", elements, item_bytes)

    def local(self, owner: str, name: str) -> int:
        """Return the elements of a parameter on a device, as it is used."""
        shape = self.placement.padded_shape(self.placement.graph.arrays[owner][name])
        return math.prod(shape) // self.size(self.placement.nodes[owner], "sg")

    def objective(self, loss: Loss, penalty: ElementwisePenalty | None) -> None:
        """Tell the loss, R, and what vertices add."""
        placement, adds = self.placement, False
        names = {name for mine in placement.graph.arrays.values() for name in mine}
        for node in placement.program:
            if isinstance(node.kind, kinds.ActivityL1):
                adds = True
                self.add("loss", node, "sum |r|", "all_reduce", "sg", 1, self.types.total)
        self.rows += loss_collectives(
            num_outputs=placement.outputs.padded_width,
            gathers_outputs=loss.targets == "any",
            gathers_targets=False,
            num_reduced=loss.num_reduced,
            num_sums=3 if adds else 2,
            mean=loss.reduction == "mean",
            batch=self.batch * placement.outputs.positions,
            penalty=penalty is not None and bool(names if penalty.biases else names & {"W"}),
            num_arrays=0,
            types=self.types,
            sizes=placement.sizes,
        )

    def backward(self) -> None:
        """Tell the walk back, and what is built again on the way."""
        placement = self.placement
        trained, kept = trained_nodes(placement), kept_names(placement)
        gradients, gathered = _Gradients(placement), set()
        rebuilt: set[str] = set()
        segment = None
        for node in reversed(placement.program):
            if node.segment is not None and node.segment != segment and node.name in trained:
                self.recompute(node.segment, kept)
            segment = node.segment
            g = gradients.step(node)
            if node.name in trained:
                goes_on = bool(trained.intersection(node.inputs))
                if goes_on:
                    used = USED_BACKWARD.get(type(node.kind), set())
                    self.gather_params(node, "backward", used)
                # Of a g that a sum hands to several vertices they gather, or turn, one and all.
                same = (g, *(node.axes[role] for role in "gs"), node.kind is TURN)
                if same not in gathered or node.kind in (GATHER, WHOLE):
                    self.back(node, goes_on=goes_on)
                if moves_g(node):
                    gathered.add(same)
                for name in reads(node):
                    self.rebuild(name, kept, rebuilt)
            rebuilt.discard(node.name)
            for owner, name in gradients.complete(node):
                self.sum_params(owner, name)

    def recompute(self, segment: tuple[str, int], kept: frozenset[str]) -> None:
        """Tell the nodes of a segment forward again, and what they read of others."""
        nodes = recomputed_nodes(self.placement, segment)
        rebuilt: set[str] = set()
        for name in sorted({name for node in nodes for name in node.inputs}):
            if name not in {node.name for node in nodes}:
                self.rebuild(name, kept, rebuilt)
        self.run(nodes, "backward")

    def back(self, node: Node, *, goes_on: bool) -> None:
        """Tell a node's own backward pass; `goes_on` is whether an input's gradient is wanted."""
        types = self.types
        if isinstance(node.kind, kinds.Dense):
            part = self.whole(node) // self.size(node, "g")
            self.add("backward", node, "g", "all_gather", "s", part, types.compute)
        elif isinstance(node.kind, kinds.Embedding):
            part = self.whole(node) // self.size(node, "s")
            self.add("backward", node, "g", "all_gather", "g", part, types.compute)
        elif node.kind in (GATHER, WHOLE) and goes_on:
            roles = "g" if node.kind is GATHER else "sg"
            part = self.whole(node) // (self.size(node, "s") if node.kind is GATHER else 1)
            self.add("backward", node, "g", "reduce_scatter", roles, part, types.scatter)
        elif node.kind is TURN and goes_on:
            share = self.whole(node) // self.size(node, "sg")
            self.add("backward", node, "g", "ppermute", "sg", share, types.total)
        elif goes_on:
            for num_rows in SUMS.get(type(node.kind), ((), ()))[1]:
                self.sums(node, "backward", num_rows)

    def rebuild(self, name: str, kept: frozenset[str], rebuilt: set[str]) -> None:
        """Tell what is needed to have r of a node again."""
        node = self.placement.nodes[name]
        built = isinstance(node.kind, kinds.Source) or name in rebuilt
        if built or not is_rebuilt(node, self.placement) or name in kept:
            return
        rebuilt.add(name)
        for read in node.inputs:
            self.rebuild(read, kept, rebuilt)
        if node.kind in (GATHER, WHOLE):
            self.gather(node, "backward")
        self.gather_params(node, "backward", set(self.placement.graph.arrays.get(node.owner, {})))

    def sum_params(self, owner: str, name: str) -> None:
        """Tell the sum over data of the gradient of a parameter."""
        node, splits = self.placement.nodes[owner], self.types.splits_data
        kind: Kind = "reduce_scatter" if splits else "all_reduce"
        times = self.types.microbatches if splits else 1
        elements, item_bytes = self.local(owner, name), self.types.reduce
        self.add("backward", node, f"d{name}", kind, "d", elements, item_bytes, times)


class _Gradients:
    """The gradients of a walk back by names: those of one name are equal, and one array to XLA.

    A g is named by where it was made, or by the first node that had it wait for gradients of
    parameters (_Walk.in_turn).
    """

    def __init__(self, placement: GraphPlacement) -> None:
        self.placement = placement
        self.users = Counter(node.owner for node in placement.program)
        self.parts: dict[str, list[Any]] = {}
        self.turns: dict[Any, Any] = {}
        self.later: list[tuple[Node, str, Any]] = []
        self.uses: dict[tuple[str, str], list[Any]] = {}
        self.summed: set[Any] = set()
        # Barriers keep the sums apart where there are any (tpmlp.xla.hold); and what microbatches
        # add up, to be summed at the end, does not look equal.
        at_once = placement.splits_data or placement.strategy.microbatches == 1
        self.joins = placement.platform == "cpu" and at_once

    def step(self, node: Node) -> Any:
        """Return the name of the g of a node, and hand on those of its inputs."""
        parts = self.parts.pop(node.name, [])
        g = parts[0] if len(parts) == 1 else node.name
        if node.kind not in (GATHER, WHOLE):
            g = self.turns.setdefault(g, (node.name, "in turn") if self.summed else g)
        for i, name in enumerate(node.inputs):
            part = g if passes_on(node) else (node.name, i)
            self.parts.setdefault(name, []).append(part)
        arrays = self.placement.graph.arrays.get(node.owner, {})
        self.later += [(node, name, g) for name in arrays]
        return g

    def complete(self, node: Node) -> list[tuple[str, str]]:
        """Return the owners and names of the gradients that are complete with a node, and new."""
        waiting, self.later = self.later, []
        new = []
        for of, name, g in waiting:
            source = self.placement.nodes[of.inputs[0]]
            waits = isinstance(of.kind, kinds.Dense) and name == "W"
            at = source if waits and source.kind in (GATHER, WHOLE) else of
            if at is not node:
                self.later.append((of, name, g))
                continue
            is_sum = name in ("b", "shift") and not isinstance(of.kind, kinds.Positions)
            uses = self.uses.setdefault((of.owner, name), [])
            uses.append(g if is_sum else (g, name, at.name))
            if len(uses) == self.users[of.owner]:
                if tuple(uses) not in self.summed or not self.joins:
                    new.append((of.owner, name))
                self.summed.add(tuple(uses))
        return new


def passes_on(node: Node) -> bool:
    """Return whether the gradient of what a node reads is its own."""
    return isinstance(node.kind, kinds.Sum | kinds.Shift | kinds.Positions)


def moves_g(node: Node) -> bool:
    """Return whether a node's backward pass moves its g as it is."""
    return node.kind is TURN or isinstance(node.kind, kinds.Dense | kinds.Embedding)
