"""Where a microbatch goes, and which task waits for which.

The layers are cut into *virtual stages* 0 .. p*v - 1, v chunks on each of p stages. A microbatch
goes through all of them forward, and back again. Chunks are placed in one of two ways:

    loop   stage  0 1 2 3      v   stage  0 1 2 3
    chunk 0       0 1 2 3          0      0 1 2 3
    chunk 1       4 5 6 7          1      7 6 5 4

A loop goes round the ring of stages, always the same way. A "v" turns at the last stage, without
a message, and comes back, so that stage 0 has the first and the last of the layers.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Kind = Literal["F", "B", "W"]
Order = Literal["loop", "v"]


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage does in one slot; all counts are 0-based.

    Attributes:
        kind: "F": the forward pass of a chunk's layers. "B": the recursion, the gradient with
            respect to the chunk's input. "W": the gradients of the chunk's weights.
        microbatch: which.
        chunk: which of the stage's chunks.

    Raises:
        ValueError: an unknown kind, or a count below 0.

    Examples:
        >>> print(Task("F", 3), Task("W", 0, chunk=1))
        F3 W0.1
    """

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind must be one of {get_args(Kind)}: got kind={self.kind!r}. Use 'F' for the "
                "forward pass, 'B' for the gradient of the input, 'W' for those of the weights."
            )
        check_at_least(0, microbatch=self.microbatch, chunk=self.chunk)

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


# A task and the stage that runs it.
Place = tuple[int, Task]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """The way of every microbatch.

    Attributes:
        num_stages: p.
        num_chunks: v, on each stage.
        order: how chunks lie on the stages; see the module.
        splits_backward: whether a gradient leaves after B, or only after the W that follows. Where
            B and W are one piece of work, as autodiff makes them, it is the latter.
    """

    num_stages: int
    num_chunks: int = 1
    order: Order = "loop"
    splits_backward: bool = True

    @property
    def num_virtual_stages(self) -> int:
        """How many pieces the layers are cut into."""
        return self.num_stages * self.num_chunks

    def virtual_stage(self, stage: int, chunk: int) -> int:
        """Return which piece of the layers a chunk is.

        Examples:
            >>> loop = Route(num_stages=4, num_chunks=2)
            >>> v = Route(num_stages=4, num_chunks=2, order="v")
            >>> loop.virtual_stage(1, 1), v.virtual_stage(1, 1)
            (5, 6)
        """
        return chunk * self.num_stages + self._turned(stage, chunk)

    def place(self, virtual_stage: int) -> tuple[int, int]:
        """Return the stage and the chunk of a piece: virtual_stage's inverse."""
        chunk, along = divmod(virtual_stage, self.num_stages)
        return self._turned(along, chunk), chunk

    def _turned(self, stage: int, chunk: int) -> int:
        back = self.order == "v" and chunk % 2 == 1
        return self.num_stages - 1 - stage if back else stage

    def awaits(self, stage: int, task: Task) -> Place | None:
        """Return the task whose result must have come, a message; None where none must.

        F of virtual stage 0 reads the data, B of the last one the loss: they wait for nobody.
        """
        at, last = self.virtual_stage(stage, task.chunk), self.num_virtual_stages - 1
        if task.kind == "F" and at > 0:
            sender, chunk = self.place(at - 1)
            return sender, Task("F", task.microbatch, chunk)
        if task.kind == "B" and at < last:
            sender, chunk = self.place(at + 1)
            return sender, Task("B" if self.splits_backward else "W", task.microbatch, chunk)
        return None

    def needs(self, stage: int, task: Task) -> list[Place]:
        """Return everything that must have ended before a task starts: F before B before W."""
        message = self.awaits(stage, task)
        places = [] if message is None else [message]
        if task.kind == "F":
            return places
        earlier = Task("F" if task.kind == "B" else "B", task.microbatch, task.chunk)
        return [(stage, earlier), *places]

    def ring(self, sender: int, receiver: int, kind: Kind) -> int:
        """Return which way round a message goes: 1 to the stage after, -1 before, 0 nowhere.

        Of two stages each is after the other; a loop still takes h one way and g the other.
        """
        if sender == receiver:
            return 0
        if self.order == "v":
            return receiver - sender
        return 1 if kind == "F" else -1


# Like those of tpmlp.checks, which imports JAX: looking at a schedule must not.
def check_at_least(least: int, **counts: Any) -> None:
    """Refuse what is no integer, or too small, by its name."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(
                f"{name} must be an integer, at least {least}: got {name}={value!r}. "
                f"Use for example {name}={max(least, 4)}."
            )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {choices}: got {name}={value!r}. Use {name}={choices[0]!r}."
        )
