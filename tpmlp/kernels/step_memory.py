"""The buffers of a training step, told in the order in which tpmlp.kernels.backprop runs.

Each line is one operation as the compiler makes them: what is elementwise is one with what reads
it, and a value that waits for g waits for what g is computed from. Only arrays of a batch or of a
weight are told; scalars and sums over the batch are too small to matter.
"""

from dataclasses import dataclass, field

from tpmlp.kernels.backprop import is_kept
from tpmlp.kernels.cost import LayerShape, Types
from tpmlp.kernels.memory import Buffer, Tape
from tpmlp.strategy import Strategy


@dataclass(slots=True)
class StepTape:
    """A training step on one device.

    Attributes:
        shapes: the layers.
        types: bytes of an element.
        strategy: what is kept.
        writes_transpose: whether W^T is written out before it is multiplied.
        moves_bits: whether what is gathered moves as integers.
        tape: the operations so far.
    """

    shapes: list[LayerShape]
    types: Types
    strategy: Strategy
    writes_transpose: bool
    moves_bits: bool
    tape: Tape = field(default_factory=Tape)

    @property
    def widened(self) -> bool:
        """Whether sums over devices move in a wider type than the strategy's, on CPUs."""
        return self.types.hop < self.types.reduce

    def run(self) -> Tape:
        """Tell forward, loss and backward, of one microbatch where there are several."""
        totals = [] if self.types.microbatches == 1 else self.totals()
        z, gathered, before = [], [], None
        for l in range(1, len(self.shapes) + 1):
            before, h_all = self.forward(l, before)
            z.append(before)
            gathered.append(h_all)
        kept: list[Buffer | None] = [
            z_l if is_kept(l, len(z), self.strategy) else None for l, z_l in enumerate(z[:-1], 1)
        ]
        self.backward(kept, gathered, self.loss(z[-1]))
        if not all(total.is_result for total in totals):
            for shape in self.shapes:
                # XLA sums all of them over data at once.
                self.tape.make("dW summed", shape.W * self.types.param, *totals, result=True)
        return self.tape

    def totals(self) -> list[Buffer]:
        """Tell the gradients that every microbatch adds to; they become results if they can."""
        types, shapes = self.types, self.shapes
        stay = (types.splits_data or shapes[0].size("d") == 1) and types.accumulate == types.param
        return [
            self.tape.make("sum of dW", self.dW_words(shape) * types.accumulate, result=stay)
            for shape in shapes
        ]

    def forward(self, l: int, before: Buffer | None) -> tuple[Buffer, Buffer]:
        """Tell layer l; return z_l and the gathered input."""
        shape, make, types = self.shapes[l - 1], self.tape.make, self.types
        h = make(f"h_{l}", shape.input * types.compute, before)
        h_all = self.gathered(f"h_{l} whole", l, h, shape.h, shape.size("g"))
        W = self.weight(shape, h_all)
        z = self.product(f"z_{l}", shape.z, shape.output, shape.size("s"), h_all, W)
        kept_bytes = types.compute if l < len(self.shapes) else types.param
        is_sum = shape.size("s") > 1
        if is_sum and self.widened:
            # The sum is kept in its own type, and the bias added where z is used.
            z = make(f"z_{l} rounded", shape.output * min(kept_bytes, types.hop), z)
        elif kept_bytes != (types.reduce if is_sum else types.total):
            z = make(f"z_{l} kept", shape.output * kept_bytes, z)
        return z, h_all

    def loss(self, z: Buffer) -> tuple[Buffer, ...]:
        """Tell the loss; return what g_{L+1} is computed from."""
        last = self.shapes[-1]
        return (self.tape.make("loss", last.output * self.types.param, z),)

    def backward(
        self, z: list[Buffer | None], gathered: list[Buffer], sources: tuple[Buffer, ...]
    ) -> None:
        """Tell the recursion; `sources` is what g of the layer is computed from."""
        for l in range(len(self.shapes), 0, -1):
            shape, types = self.shapes[l - 1], self.types
            if l > 1 and z[l - 2] is None:
                self.recompute(z, l, sources)
            g = self.tape.make(f"g_{l}", shape.output * types.total, *sources)
            g_all = self.gathered(f"g_{l} whole", l, self.cast(l, g), shape.z, shape.size("s"))
            db = self.tape.make(f"db_{l}", 0, g)
            before = z[l - 2] if l > 1 else None
            kept = self.strategy.keep == "gathered" and shape.size("g") > 1
            part = self.dW_part(shape, g_all, gathered[l - 1]) if kept else None
            W = self.transposed(shape, g, g_all) if l > 1 else None
            dW = self.dW(shape, part) if part else None
            dh = self.dh(shape, W, g_all) if l > 1 else None
            if dW is None:
                h = self.tape.make(f"h_{l}", shape.input * types.compute, before, dh or db)
                h_all = self.gathered(f"h_{l} whole", l, h, shape.h, shape.size("g"))
                dW = self.dW(shape, self.dW_part(shape, g_all, h_all))
            sources = tuple(buffer for buffer in (dh, before, dW) if buffer is not None)

    def recompute(self, z: list[Buffer | None], l: int, sources: tuple[Buffer, ...]) -> None:
        """Tell the layers that are computed again before layer l."""
        first = next((s for s in range(l - 2, 0, -1) if z[s - 1] is not None), 0)
        before = z[first - 1] if first else None
        for k in range(first + 1, l):
            self.tape.time += 1
            self.tape.read(before, *sources)
            before, _ = self.forward(k, before)
            z[k - 1] = before

    def transposed(self, shape: LayerShape, g: Buffer, g_all: Buffer) -> Buffer | None:
        """Tell what W is copied to before it is multiplied with g."""
        W = self.weight(shape, g, converts=not self.writes_transpose)
        if not self.writes_transpose:
            return W
        return self.tape.make("W transposed", shape.W * self.types.compute, g_all, W)

    def dh(self, shape: LayerShape, W: Buffer | None, g_all: Buffer) -> Buffer:
        """Tell dh = W^T g."""
        return self.product("dh", shape.h, shape.input, shape.size("g"), W, g_all)

    def dW_part(self, shape: LayerShape, g_all: Buffer, h_all: Buffer) -> Buffer:
        """Tell dW = g h^T, a result where no sum over data follows."""
        alone = shape.size("d") == 1 and self.types.microbatches == 1
        item_bytes = self.types.param if alone else self.types.total
        return self.tape.make("dW", shape.W * item_bytes, g_all, h_all, result=alone)

    def dW(self, shape: LayerShape, part: Buffer) -> Buffer:
        """Tell the sum of dW over data."""
        data, types = shape.size("d"), self.types
        if data == 1:
            return part
        if types.microbatches == 1:
            return self.tape.make(
                "dW summed", self.dW_words(shape) * types.param, part, result=True
            )
        if not types.splits_data:
            return part
        return self.tape.make("dW summed", self.dW_words(shape) * types.total, part)

    def dW_words(self, shape: LayerShape) -> int:
        """Return the elements of dW that stay on a device."""
        return shape.W // shape.size("d") if self.types.splits_data else shape.W

    def product(
        self, name: str, whole: int, share: int, devices: int, *operands: Buffer | None
    ) -> Buffer:
        """Tell a product whose result is summed over devices and split among them."""
        types = self.types
        if devices == 1:
            return self.tape.make(name, whole * types.total, *operands)
        part = self.tape.make(f"{name} part", whole * types.reduce, *operands)
        return self.tape.make(name, share * types.reduce, part)

    def gathered(self, name: str, l: int, part: Buffer, whole: int, devices: int) -> Buffer:
        """Tell a gather over devices.

        Where bfloat16 moves as bits, the numbers are a copy of the bits; in layer 1, whose input
        was float32, the compiler multiplies in float32.
        """
        if devices == 1:
            return part
        compute = self.types.compute
        gathered = self.tape.make(name, whole * compute, part)
        if not self.moves_bits:
            return gathered
        return self.tape.make(f"{name} numbers", whole * (compute if l > 1 else 4), gathered)

    def weight(self, shape: LayerShape, ready: Buffer, *, converts: bool = True) -> Buffer | None:
        """Tell what W is copied to when a layer begins; None where it is multiplied as it is."""
        types, make = self.types, self.tape.make
        if types.splits_data:
            part = make("W part", shape.W // shape.size("d") * types.compute, ready)
            return make("W whole", shape.W * types.compute, part)
        if converts and types.compute != types.param:
            wide = self.moves_bits and shape.layer == 1
            return make("W converted", shape.W * (4 if wide else types.compute), ready)
        return None

    def cast(self, l: int, g: Buffer) -> Buffer:
        """Tell the conversion of g to the type of products; rounded only, where they are wide."""
        types = self.types
        if types.compute == types.total:
            return g
        shape = self.shapes[l - 1]
        wide = self.moves_bits and l == 1 and shape.size("s") == 1
        return self.tape.make("g converted", shape.output * (4 if wide else types.compute), g)
