"""How to use a mesh: a frozen, validated description that goes into every public function."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from tpmlp.checks import check_count, check_dtype
from tpmlp.pipeline.generators import SCHEDULES
from tpmlp.pipeline.schedule import Schedule

WORDS = ("column", "row")
LAYOUTS = (*WORDS, "alternate", "auto")

Keep = Literal["shard", "gathered", "recompute"]
Overlap = Literal["none", "ring", "bidirectional_ring"]
Reduction = Literal["fast", "invariant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How a model uses a mesh.

    Attributes:
        layout: which of the two tensor axes each layer gathers its input over; it scatters its
            output over the other. "column": every layer is split by outputs (all-gather forward,
            reduce-scatter backward). "row": by inputs (reduce-scatter forward, all-gather
            backward). "alternate": column, row, column, ... "auto": the choice that moves the
            fewest words. Or one word, "column" or "row", for each layer. With x and y both
            larger than 1 the layers must alternate.
        keep: what the forward pass keeps of each layer for the backward pass. "shard": z_l, split
            d/M, the least of one array a layer. "gathered": the gathered h_l too, which saves the
            backward pass one collective a layer. "recompute": z_l of every keep_every-th layer,
            the others computed again. None is kept in the host's memory ("offload" is refused):
            on TPUs XLA copies each array out only just before it wants it back, so that the
            device's memory is as full as before; on GPUs it drops the copies.
        keep_every: the period of "recompute"; the square root of the number of layers, rounded,
            by default. On a mesh with stages it counts from the first layer of a chunk, and that
            one alone is kept by default: whatever else is computed again is there at once.
        compute_dtype: "bfloat16", "float32" or "float64", the type of products, of gathers and of
            the z_l that are kept; the parameters' by default. Parameters and gradients keep their
            own type; sums have it too, or the compute type where that is wider; microbatches are
            added up in float32 or wider.
        reduce_dtype: the type in which sums over devices move; the parameters' by default, or
            compute_dtype where that is wider.
        overlap: "none": collectives are XLA's. "ring": gathers and scatters are rings of ppermute
            with a part of the product at every hop, so that hops and products can overlap.
            "bidirectional_ring": the same with half of the hops each way round. Where no tensor
            axis is larger than 1 there is nothing to overlap, and it changes nothing.
        reduction: "fast": sums in the order that suits the mesh. "invariant": losses, activations,
            gradients and trained parameters have the same bits on every mesh whose axes are 1, 2,
            4 or 8: one way to cut and one order to add, for all of them. Sums are at least
            float32. It costs time and padding (widths to multiples of 64, batches to multiples
            of 8); it is for CPU devices, and equal bits need the same jaxlib and kind of processor.
        shard_weights: whether parameters, gradients and optimiser states are split over the data
            axis as well, and gathered where they are used (ZeRO-3).
        microbatches: parts of the batch that run one after another, gradients added up. Activations
            take that much less memory in a training step; what only looks (evaluate, predict,
            apply, trace) runs the batch at once. On a mesh with stages they fill the pipeline.
        schedule: what the stages of a mesh do when: "1f1b", "gpipe", "interleaved", "zb-h1",
            "zb-h2", "zb-v", or a Schedule of your own. Without stages it changes nothing.
        chunks: pieces of layers on each stage, for schedule="interleaved"; 1 for the others.

    Raises:
        ValueError: an unknown choice, or one that needs another.

    Examples:
        >>> Strategy(layout=("row", "column")).layout
        ('row', 'column')
        >>> Strategy(compute_dtype="bfloat16", keep="recompute", keep_every=4).compute_dtype
        'bfloat16'
    """

    layout: str | tuple[str, ...] = "auto"
    keep: Keep = "shard"
    keep_every: int | None = None
    compute_dtype: str | None = None
    reduce_dtype: str | None = None
    overlap: Overlap = "none"
    reduction: Reduction = "fast"
    shard_weights: bool = False
    microbatches: int = 1
    schedule: str | Schedule = "1f1b"
    chunks: int = 1

    def __post_init__(self) -> None:
        layout = tuple(self.layout) if isinstance(self.layout, list) else self.layout
        object.__setattr__(self, "layout", layout)
        known = layout in LAYOUTS if isinstance(layout, str) else _is_words(layout)
        if not known:
            raise ValueError(
                f"layout must be one of {LAYOUTS} or a tuple with one of {WORDS} a layer: "
                f"got layout={layout!r}. Use for example layout='auto'."
            )
        if self.keep == "offload":
            raise ValueError(
                "keep must leave arrays on the devices: got keep='offload', which would free no "
                "memory there, as XLA's TPU compiler copies each array out only just before it "
                "wants it back, its GPU compiler drops the copies, and a CPU's memory is the "
                "host's. Use keep='recompute', which keeps the fewest arrays."
            )
        _check_choice("keep", self.keep, get_args(Keep))
        _check_choice("overlap", self.overlap, get_args(Overlap))
        _check_choice("reduction", self.reduction, get_args(Reduction))
        for name in ("compute_dtype", "reduce_dtype"):
            if (dtype := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_dtype(name, dtype))
        if not isinstance(self.shard_weights, bool):
            raise ValueError(
                f"shard_weights must be True or False: got shard_weights={self.shard_weights!r}. "
                "Use True to split parameters over the data axis."
            )
        microbatches = check_count("microbatches", self.microbatches, "Use 1 to run all at once.")
        object.__setattr__(self, "microbatches", microbatches)
        object.__setattr__(self, "chunks", check_count("chunks", self.chunks, "Use 1."))
        if not isinstance(self.schedule, Schedule) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {SCHEDULES} or a Schedule: got schedule="
                f"{self.schedule!r}. Use schedule='1f1b'."
            )
        if self.keep_every is not None:
            object.__setattr__(self, "keep_every", check_count("keep_every", self.keep_every))
        if self.keep_every is not None and self.keep != "recompute":
            raise ValueError(
                f"keep_every must be left out unless keep='recompute': got keep={self.keep!r}, "
                f"keep_every={self.keep_every}. Use keep='recompute', or drop keep_every."
            )
        if self.reduction == "invariant":
            self._check_invariant()

    def _check_invariant(self) -> None:
        """Refuse what would add or round in an order that depends on the mesh."""
        orders = {
            "overlap": ("none", "a ring adds in the order of its hops"),
            "reduce_dtype": (None, "a sum would be rounded as often as it crosses devices"),
            "shard_weights": (False, "a part of a weight would be another block on each mesh"),
            "microbatches": (1, "a sum over microbatches stands between two over samples"),
        }
        for name, (needed, why) in orders.items():
            if (value := getattr(self, name)) != needed:
                raise ValueError(
                    f"{name} must be {needed!r} with reduction='invariant', because {why}: got "
                    f"{name}={value!r}. Leave {name} out, or use reduction='fast'."
                )


def _is_words(layout: object) -> bool:
    return isinstance(layout, tuple) and len(layout) > 0 and all(w in WORDS for w in layout)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {choices}: got {name}={value!r}. Use {name}={choices[0]!r}."
        )
