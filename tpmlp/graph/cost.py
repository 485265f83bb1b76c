"""What a training step of a graph moves, told in the order in which tpmlp.graph.engine runs.

Pure arithmetic, as tpmlp.kernels.cost, whose rows these are; layers are vertices here. The suite
compares them with the collectives of the compiled program.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
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
    penalty: bool = False,
) -> list[Collective]:
    """Return the collectives of one training step, in order.

    Args:
        placement: the graph on its mesh, with its strategy.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its collectives out.
        penalty: whether there is an elementwise R(W).
    """
    told = _Told(placement, batch_size, step_types(placement, dtype))
    for node in placement.program:
        told.forward(node, "forward")
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

    def forward(self, node: Node, phase: Phase) -> None:
        """Tell a node's forward pass."""
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
        for num_rows in SUMS.get(type(node.kind), ((), ()))[0]:
            self.sums(node, phase, num_rows)

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

    def objective(self, loss: Loss, penalty: bool) -> None:
        """Tell the loss, R, and what vertices add."""
        placement, adds = self.placement, False
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
            penalty=penalty,
            num_arrays=0,
            types=self.types,
            sizes=placement.sizes,
        )

    def backward(self) -> None:
        """Tell the walk back, and what is built again on the way."""
        placement = self.placement
        trained, kept = trained_nodes(placement), kept_names(placement)
        users = Counter(n.owner for n in placement.program if n.owner in placement.graph.arrays)
        rebuilt: set[str] = set()
        parts: dict[str, list[Any]] = {placement.graph.output: ["loss"]}
        gathered: set[Any] = set()
        segment = None
        for node in reversed(placement.program):
            if node.segment is not None and node.segment != segment:
                self.recompute(node.segment, kept)
            segment = node.segment
            g = parts[node.name][0] if len(parts.get(node.name, ())) == 1 else node.name
            for i, name in enumerate(node.inputs):
                parts.setdefault(name, []).append(g if passes_on(node) else (node.name, i))
            if node.name in trained:
                self.gather_params(node, "backward", USED_BACKWARD.get(type(node.kind), set()))
                # Of a g that a sum hands to several vertices they gather, or turn, one and all.
                same = (g, *(node.axes[role] for role in "gs"), node.kind is TURN)
                if same not in gathered or node.kind in (GATHER, WHOLE):
                    self.back(node, goes_on=bool(trained.intersection(node.inputs)))
                if moves_g(node):
                    gathered.add(same)
                for name in reads(node):
                    self.rebuild(name, kept, rebuilt)
            rebuilt.discard(node.name)
            if node.owner in users:
                users[node.owner] -= 1
                if not users[node.owner]:
                    self.sum_params(node.owner)

    def recompute(self, segment: tuple[str, int], kept: frozenset[str]) -> None:
        """Tell the nodes of a segment forward again, and what they read of others."""
        nodes = recomputed_nodes(self.placement, segment)
        rebuilt: set[str] = set()
        for name in sorted({name for node in nodes for name in node.inputs}):
            if name not in {node.name for node in nodes}:
                self.rebuild(name, kept, rebuilt)
        for node in nodes:
            self.forward(node, "backward")

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

    def sum_params(self, owner: str) -> None:
        """Tell the sums over data of a vertex's gradients."""
        node, splits = self.placement.nodes[owner], self.types.splits_data
        kind: Kind = "reduce_scatter" if splits else "all_reduce"
        for name in self.placement.graph.arrays[owner]:
            self.add(
                "backward",
                node,
                f"d{name}",
                kind,
                "d",
                self.local(owner, name),
                self.types.reduce,
                times=self.types.microbatches if splits else 1,
            )


def passes_on(node: Node) -> bool:
    """Return whether the gradient of what a node reads is its own."""
    return isinstance(node.kind, kinds.Sum | kinds.Shift | kinds.Positions)


def moves_g(node: Node) -> bool:
    """Return whether a node's backward pass moves its g as it is."""
    return node.kind is TURN or isinstance(node.kind, kinds.Dense | kinds.Embedding)
