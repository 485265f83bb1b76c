"""Which stage has which layers: a chain of dense layers cut into virtual stages, as even as can be.

    layers    1 | 2 3 | 4 5 6 | ...           virtual stage 0 begins with the first layer,
                                               the last one ends with layer L+1

The first and the last layer have widths of their own. Those between are *interior*: of one width,
so that the k-th of each stage can be one array [stages, d, d], split over the stages. A chunk has
as many such *slots* as the largest virtual stage has interior layers; where one has fewer, the
slots at its end are empty, zeros that nothing reads.

Of a graph whose blocks repeat, all blocks are interior: what comes before them and after is no
block.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from tpmlp.pipeline.route import Route


@dataclass(frozen=True, kw_only=True)
class Slots(ABC):
    """Where each of what repeats is: interior layers, or blocks; slots count from 0.

    Attributes:
        route: how chunks lie on the stages.
    """

    route: Route

    @property
    @abstractmethod
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """What each virtual stage has."""

    @property
    @abstractmethod
    def interior(self) -> tuple[tuple[int, ...], ...]:
        """The interior layers of each virtual stage."""

    @cached_property
    def slots_per_chunk(self) -> int:
        """How many interior layers the largest virtual stage has."""
        return max(map(len, self.interior))

    @property
    def num_slots(self) -> int:
        """How many arrays the interior layers are in."""
        return self.slots_per_chunk * self.route.num_chunks

    def count(self, stage: int, chunk: int) -> int:
        """Return how many slots of a chunk are filled."""
        return len(self.interior[self.route.virtual_stage(stage, chunk)])

    def layer_in(self, slot: int, stage: int) -> int | None:
        """Return the layer in a slot; None where it is empty."""
        chunk, place = divmod(slot, self.slots_per_chunk)
        layers = self.interior[self.route.virtual_stage(stage, chunk)]
        return layers[place] if place < len(layers) else None

    @cached_property
    def where(self) -> dict[int, tuple[int, int]]:
        """The (slot, stage) of each interior layer."""
        p = self.route.num_stages
        found = {
            self.layer_in(slot, stage): (slot, stage)
            for slot in range(self.num_slots)
            for stage in range(p)
        }
        return {l: place for l, place in sorted(found.items(), key=str) if l is not None}


@dataclass(frozen=True, kw_only=True)
class Stages(Slots):
    """The layers of each stage; layers count from 1, slots from 0.

    Attributes:
        num_layers: the number of W_l.

    Raises:
        ValueError: fewer layers than virtual stages.

    Examples:
        >>> stages = Stages(num_layers=9, route=Route(num_stages=2, num_chunks=2))
        >>> stages.pieces, stages.slots_per_chunk
        (((1, 2, 3), (4, 5), (6, 7), (8, 9)), 2)
        >>> [[stages.layer_in(slot, stage) for slot in range(4)] for stage in range(2)]
        [[2, 3, 6, 7], [4, 5, 8, None]]
    """

    num_layers: int

    def __post_init__(self) -> None:
        p, v = self.route.num_stages, self.route.num_chunks
        if self.num_layers < p * v:
            raise ValueError(
                f"model must have at least one layer for each chunk of each stage: got "
                f"num_layers={self.num_layers}, stage={p}, chunks={v}. Use fewer stages or chunks, "
                f"or {p * v} layers or more."
            )

    @property
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each virtual stage."""
        return _spread(range(1, self.num_layers + 1), self.route.num_virtual_stages)

    @property
    def interior(self) -> tuple[tuple[int, ...], ...]:
        """The interior layers of each virtual stage."""
        return tuple(tuple(l for l in piece if 1 < l < self.num_layers) for piece in self.pieces)

    def stage_of(self, layer: int) -> int:
        """Return the stage that has a layer."""
        return self._place(layer)[0]

    def chunk_of(self, layer: int) -> int:
        """Return which of its stage's chunks has a layer."""
        return self._place(layer)[1]

    def in_chain(self, layer: int) -> int:
        """Return which layer of its stage's chain a layer is.

        1 for the first, k + 1 for slot k of a chunk, counted from 1, K + 2 for the last.
        """
        if layer in (1, self.num_layers):
            return 1 if layer == 1 else self.slots_per_chunk + 2
        slot, _ = self.where[layer]
        return slot % self.slots_per_chunk + 2

    def _place(self, layer: int) -> tuple[int, int]:
        virtual = next(i for i, piece in enumerate(self.pieces) if layer in piece)
        return self.route.place(virtual)


@dataclass(frozen=True, kw_only=True)
class BlockStages(Slots):
    """The blocks of each stage, counted from 0.

    Attributes:
        num_blocks: how often the block is there.

    Raises:
        ValueError: fewer blocks than virtual stages.

    Examples:
        >>> stages = BlockStages(num_blocks=5, route=Route(num_stages=2, num_chunks=2))
        >>> [[stages.layer_in(slot, stage) for slot in range(4)] for stage in range(2)]
        [[0, 1, 3, None], [2, None, 4, None]]
    """

    num_blocks: int

    def __post_init__(self) -> None:
        p, v = self.route.num_stages, self.route.num_chunks
        if self.num_blocks < p * v:
            raise ValueError(
                f"Repeat must have at least one block for each chunk of each stage: got "
                f"times={self.num_blocks}, stage={p}, chunks={v}. Use fewer stages or chunks, or "
                f"times={p * v} or more."
            )

    @property
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """The blocks of each virtual stage."""
        return _spread(range(self.num_blocks), self.route.num_virtual_stages)

    @property
    def interior(self) -> tuple[tuple[int, ...], ...]:
        """All blocks are interior."""
        return self.pieces


@lru_cache(maxsize=256)
def _spread(layers: range, num_pieces: int) -> tuple[tuple[int, ...], ...]:
    """Cut layers into pieces as even as can be, the longer ones first."""
    each, more = divmod(len(layers), num_pieces)
    ends = [0]
    for i in range(num_pieces):
        ends.append(ends[-1] + each + (i < more))
    return tuple(tuple(layers[start:end]) for start, end in pairwise(ends))
