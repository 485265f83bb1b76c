"""How to use a mesh: a frozen, validated description that goes into every public function."""

from dataclasses import dataclass

WORDS = ("column", "row")
LAYOUTS = (*WORDS, "alternate", "auto")


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

    Raises:
        ValueError: an unknown layout.

    Examples:
        >>> Strategy(layout=("row", "column")).layout
        ('row', 'column')
    """

    layout: str | tuple[str, ...] = "auto"

    def __post_init__(self) -> None:
        layout = tuple(self.layout) if isinstance(self.layout, list) else self.layout
        object.__setattr__(self, "layout", layout)
        known = layout in LAYOUTS if isinstance(layout, str) else _is_words(layout)
        if not known:
            raise ValueError(
                f"layout must be one of {LAYOUTS} or a tuple with one of {WORDS} a layer: "
                f"got layout={layout!r}. Use for example layout='auto'."
            )


def _is_words(layout: object) -> bool:
    return isinstance(layout, tuple) and len(layout) > 0 and all(w in WORDS for w in layout)
