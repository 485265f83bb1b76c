"""The arrays of a graph's training step on one device, written or not, and the buffers they need.

What is elementwise is not written: whoever reads it computes it from what it is made of, and so
holds that. It is written where a product or a collective reads it. Scalars, vectors of parameters
and rows of one number a token are not told, but for the rows that norms keep.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field

from tpmlp.graph.engine import reads, trained_nodes
from tpmlp.graph.placement import GATHER, WHOLE, GraphPlacement, Node
from tpmlp.kernels.cost import Types
from tpmlp.kernels.memory import Buffer, Tape
from tpmlp.layout import padded


@dataclass(slots=True, eq=False)
class Array:
    """An array on one device.

    Attributes:
        name: the node's, or what it is.
        elements: how many.
        sources: the buffers that it is computed from; itself where it is written as it is made.
        buffer: where it is written; None until something needs it to be.
        moved: what was gathered of it, by the axes.
    """

    name: str
    elements: int
    sources: tuple[Buffer, ...]
    buffer: Buffer | None = None
    moved: dict[tuple[str, ...], Buffer] = field(default_factory=dict)


class Arrays(ABC):
    """The arrays of a step so far; tpmlp.graph.memory says in which order they are made.

    Attributes:
        tape: the operations.
        on_cpu: whether XLA's CPU compiler runs them.
        operand: bytes of an element as products read it.
        values: r by node: of all in the forward pass, then of those that are kept.
        rows: what norms keep beside r.
        rebuilt: r built again in the backward pass.
        readers: how often r of a node is read, in the pass that is told.
        trained: the nodes whose gradient is wanted.
        later: nodes whose dW waits, and their gathered g.
        dW: gradients of matrices so far, by owner.
        users: nodes that have not given their part of a gradient, by owner.
    """

    def __init__(self, placement: GraphPlacement, batch_size: int, types: Types) -> None:
        self.placement, self.types = placement, types
        parts = placement.sizes["data"] * types.microbatches
        self.batch = padded(batch_size, placement.row_blocks) // parts
        self.tape = Tape()
        self.on_cpu = placement.platform == "cpu"
        # Where sums are bfloat16 too, XLA's CPU compiler multiplies in float32.
        self.is_wide = self.on_cpu and types.total == 2
        self.operand = 4 if self.is_wide else types.compute
        self.values: dict[str, Array] = {}
        self.rows: dict[str, tuple[Buffer, ...]] = {}
        self.rebuilt: dict[str, Array] = {}
        self.readers: Counter[str] = Counter()
        self.trained = trained_nodes(placement)
        self.later: list[tuple[Node, Buffer]] = []
        self.dW: dict[str, Buffer] = {}
        self.users = Counter(node.owner for node in placement.program)

    @abstractmethod
    def forward(self, node: Node, inputs: list[Array]) -> Array:
        """Tell a node's forward pass."""

    def size(self, node: Node, roles: str) -> int:
        """Return the devices on the axes of roles."""
        return math.prod(self.placement.sizes[node.axes[role]] for role in roles)

    def columns(self, node: Node) -> int:
        """Return the columns of r on a device: samples, or their tokens."""
        return self.batch * node.shape.positions

    def whole(self, node: Node) -> int:
        """Return the elements of r, over all devices that split its features."""
        return 0 if node.shape.width is None else node.padded_width * self.columns(node)

    def elements(self, node: Node) -> int:
        """Return the elements of r on a device."""
        split = "sg" if not is_whole(node) else "s" if node.kind is GATHER else ""
        return self.whole(node) // self.size(node, split)

    def words(self, owner: str) -> int:
        """Return the elements of a vertex's matrix on a device, as it is multiplied."""
        W = self.placement.graph.arrays[owner].get("W")
        if W is None:
            return 0
        whole = math.prod(self.placement.padded_shape(W))
        return whole // self.size(self.placement.nodes[owner], "sg")

    def held_words(self, owner: str) -> int:
        """Return the elements of a vertex's matrix that stay on a device."""
        data = self.placement.sizes["data"] if self.types.splits_data else 1
        return self.words(owner) // data

    def inputs(self, node: Node) -> list[Node]:
        """Return the nodes that a node reads."""
        return [self.placement.nodes[name] for name in node.inputs]

    def make(self, name: str, elements: int, item_bytes: int, *reads: Buffer | None) -> Buffer:
        """Tell an operation that writes an array."""
        return self.tape.make(name, elements * item_bytes, *reads)

    def computed(self, node: Node, *arrays: Array) -> Array:
        """Return an array like r of a node that its readers compute from others."""
        return Array(node.name, self.elements(node), sources_of(*arrays))

    def written(self, node: Node, buffer: Buffer) -> Array:
        """Return r of a node as it was made."""
        return Array(node.name, self.elements(node), (buffer,), buffer)

    def rounded(self, node: Node, buffer: Buffer) -> Array:
        """Return r of a node in the type in which it is kept."""
        types, elements = self.types, self.elements(node)
        if node.name != self.placement.graph.output and buffer.bytes != elements * types.compute:
            buffer = self.make(f"{node.name} rounded", elements, types.compute, buffer)
        return self.written(node, buffer)

    def settled(self, node: Node, *arrays: Array) -> Array:
        """Return a sum of gradients of a node, which is written."""
        elements = self.elements(node)
        total = self.make(f"g of {node.name}", elements, self.types.total, *sources_of(*arrays))
        return Array(f"g of {node.name}", elements, (total,), total)

    def write(self, array: Array, item_bytes: int) -> Buffer:
        """Return an array as a product or a collective reads it."""
        if array.buffer is None or array.buffer.bytes != array.elements * item_bytes:
            sources = array.sources if array.buffer is None else (array.buffer,)
            array.buffer = self.make(array.name, array.elements, item_bytes, *sources)
        return array.buffer

    def gathered(self, array: Array, node: Node, roles: str, elements: int) -> Buffer:
        """Return an array gathered over the axes of roles, once for all that gather it so."""
        axes = tuple(node.axes[role] for role in roles)
        if self.size(node, roles) == 1:
            return self.write(array, self.operand)
        if axes not in array.moved:
            part = self.write(array, self.types.compute)
            moved = self.make(f"{array.name} gathered", elements, self.types.compute, part)
            array.moved[axes] = self.numbers(array.name, elements, moved)
        return array.moved[axes]

    def numbers(self, name: str, elements: int, bits: Buffer) -> Buffer:
        """Return what was gathered; bfloat16 moves as bits, of which the numbers are a copy."""
        if not self.on_cpu or self.types.compute != 2:
            return bits
        return self.make(f"{name} numbers", elements, self.operand, bits)

    def summed(self, name: str, share: int, devices: int, *reads: Buffer) -> Buffer:
        """Tell a product whose result is summed over devices and split among them."""
        if devices == 1:
            return self.make(name, share, 4 if self.is_wide else self.types.total, *reads)
        part = self.make(f"{name} part", share * devices, self.types.reduce, *reads)
        return self.make(name, share, self.types.reduce, part)

    def weight(self, owner: str, ready: Buffer | None, *, converts: bool = True) -> list[Buffer]:
        """Tell what a matrix is copied to before it is multiplied; nothing as it is."""
        types, words = self.types, self.words(owner)
        if types.splits_data and self.placement.sizes["data"] > 1:
            part = self.make("W part", self.held_words(owner), types.compute, ready)
            return [self.numbers("W", words, self.make("W whole", words, types.compute, part))]
        if converts and self.operand != types.param:
            return [self.make("W converted", words, self.operand, ready)]
        return []

    def add(self, owner: str, *reads: Buffer) -> None:
        """Tell the gradient of a matrix, and its sum over data when it is complete."""
        types, data = self.types, self.placement.sizes["data"]
        self.users[owner] -= 1
        stays = data == 1 and types.microbatches == 1
        if self.is_wide:
            reads = (self.make("dW wide", self.words(owner), 4, *reads),)
        dW = self.make("dW", self.words(owner), types.param if stays else types.total, *reads)
        if owner in self.dW:
            # Added to the first, where that is.
            dW = self.dW[owner]
            self.tape.read(dW)
        dW.is_result = stays
        if not self.users[owner] and data > 1 and (types.microbatches == 1 or types.splits_data):
            item_bytes = types.param if types.microbatches == 1 else types.total
            dW = self.make("dW summed", self.held_words(owner), item_bytes, dW)
            dW.is_result = types.microbatches == 1
        self.dW[owner] = dW

    def value(self, node: Node) -> Array:
        """Return r of a node in the backward pass, kept or built again."""
        if node.name in self.values:
            kept = self.values[node.name]
            # Told to wait, which is elementwise; but what is whole is as it was.
            return kept if is_whole(node) else Array(kept.name, kept.elements, kept.sources)
        if node.name not in self.rebuilt:
            inputs = [self.value(source) for source in self.inputs(node)]
            self.rebuilt[node.name] = self.forward(node, inputs)
        return self.rebuilt[node.name]

    def read(self, node: Node) -> list[Array]:
        """Return what the backward pass of a node reads."""
        return [self.value(self.placement.nodes[name]) for name in reads(node)]


def is_whole(node: Node) -> bool:
    """Return whether a node gathers."""
    return node.kind in (GATHER, WHOLE)


def sources_of(*arrays: Array) -> tuple[Buffer, ...]:
    """Return the buffers that arrays are computed from, each once."""
    return tuple(dict.fromkeys(buffer for array in arrays for buffer in array.sources))
