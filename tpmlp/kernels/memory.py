"""How much memory a program needs: buffers with lifetimes, packed as XLA packs them.

A program is told as a list of operations (`Tape`): each makes buffers and reads others, and a
buffer lives from the operation that makes it to the last that reads it. A result of the program
has memory of its own, and a temporary that is dead before the result is made may lie in it. The
others are packed into one block of memory, large ones first, each at the smallest gap that is free
for as long as it lives.

References: XLA's buffer assignment, HeapSimulator::GlobalDecreasingSizeBestFitHeap.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Buffer:
    """An array of the program on one device.

    Attributes:
        name: what it is, in the notation of the mathematics.
        bytes: its size.
        made: index of the operation that makes it.
        last: index of the last operation that reads it.
        is_result: whether it is a result of the program.
    """

    name: str
    bytes: int
    made: int
    last: int
    is_result: bool = False

    def meets(self, other: "Buffer") -> bool:
        """Return whether there is a time at which both are alive."""
        return self.made <= other.last and other.made <= self.last


@dataclass(slots=True)
class Tape:
    """A program's operations, in the order they run, told one after another.

    Attributes:
        buffers: all that were made.
        time: index of the newest operation.
    """

    buffers: list[Buffer] = field(default_factory=list)
    time: int = 0

    def make(
        self, name: str, num_bytes: int, *reads: Buffer | None, result: bool = False
    ) -> Buffer:
        """Run an operation that reads buffers (None is an argument) and makes one."""
        self.time += 1
        self.read(*reads)
        self.buffers.append(Buffer(name, num_bytes, self.time, self.time, result))
        return self.buffers[-1]

    def read(self, *buffers: Buffer | None) -> None:
        """Let the newest operation read buffers."""
        for buffer in buffers:
            if buffer is not None:
                buffer.last = self.time

    def temp_bytes(self) -> int:
        """Return the size of the block that holds all temporaries which lie in no result."""
        results = [buffer for buffer in self.buffers if buffer.is_result]
        for result in results:
            result.last = self.time + 1
        inside: dict[int, list[Buffer]] = {id(result): [result] for result in results}
        left = []
        temporaries = [buffer for buffer in self.buffers if not buffer.is_result]
        for buffer in sorted(temporaries, key=_largest_first):
            for result in reversed(results):
                tenants = inside[id(result)]
                if buffer.bytes <= result.bytes and not any(map(buffer.meets, tenants)):
                    tenants.append(buffer)
                    break
            else:
                left.append(buffer)
        return packed_bytes(left)


def packed_bytes(buffers: Iterable[Buffer]) -> int:
    """Return the size of a block that holds buffers, in the better of the two orders XLA tries."""
    buffers = list(buffers)
    return min(_packed_bytes(sorted(buffers, key=key)) for key in (_largest_first, _longest_first))


def _largest_first(buffer: Buffer) -> tuple[int, int]:
    return -buffer.bytes, buffer.made


def _longest_first(buffer: Buffer) -> tuple[int, int, int]:
    return buffer.made - buffer.last, -buffer.bytes, buffer.made


def _packed_bytes(buffers: list[Buffer]) -> int:
    """Pack buffers in this order, each at the smallest gap that is free for as long as it lives."""
    alive: dict[int, list[tuple[int, int]]] = defaultdict(list)
    made: dict[int, list[tuple[int, int]]] = defaultdict(list)
    height = 0
    for buffer in buffers:
        # It meets what is alive when it is made, and what is made while it lives.
        later = range(buffer.made + 1, buffer.last + 1)
        taken = sorted([*alive[buffer.made], *(place for t in later for place in made[t])])
        start = _best_gap(buffer.bytes, taken)
        place = start, start + buffer.bytes
        made[buffer.made].append(place)
        for t in range(buffer.made, buffer.last + 1):
            alive[t].append(place)
        height = max(height, place[1])
    return height


def _best_gap(num_bytes: int, taken: list[tuple[int, int]]) -> int:
    """Return where the smallest gap between taken intervals starts that has room."""
    end, best, best_size = 0, None, None
    for start, stop in taken:
        gap = start - end
        if gap >= num_bytes and (best_size is None or gap <= best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return end if best is None else best
