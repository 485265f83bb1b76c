"""The instructions that a call runs, each with how often.

The walk starts at the entry computation and follows every call: fusions, the two computations of a
while loop (as often as the loop runs), the branches of a conditional, wrapped asynchronous ones.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from tpmlp.inspection.hlo.counts import Count, times
from tpmlp.inspection.hlo.text import Instruction, Module

_CALLED = re.compile(
    r", (?:calls|true_computation|false_computation)=%?([\w.\-]+)"
    r"|, (?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """An instruction where it runs.

    Attributes:
        computation: name of the computation that it is a line of.
        instruction: what runs.
        count: executions in one call; None where the program does not tell.
        note: the condition under which `count` holds; empty when there is none.
        caller: the step that calls the computation; None for the first.
    """

    computation: str
    instruction: Instruction
    count: Count = 1
    note: str = ""
    caller: Optional["Step"] = None


def run(module: Module) -> Iterator[Step]:
    """Yield every instruction of a call, those of called computations after the one that calls."""
    for line in module.computations[module.entry].values():
        yield from expand(module, Step(computation=module.entry, instruction=line))


def expand(module: Module, step: Step) -> Iterator[Step]:
    """Yield a step and all that it calls."""
    yield step
    if step.instruction.opcode.endswith(("-update", "-done")):
        return  # They name the computation that their start has called.
    for name, trips, condition in _calls(module, step):
        for line in module.computations[name].values():
            inner = Step(
                computation=name,
                instruction=line,
                count=times(step.count, trips),
                note="; ".join(filter(None, (step.note, condition))),
                caller=step,
            )
            yield from expand(module, inner)


def _calls(module: Module, step: Step) -> Iterator[tuple[str, Count, str]]:
    """Yield (computation, times it runs per execution, condition) for what a step calls."""
    line = step.instruction
    called = [name for match in _CALLED.finditer(line.attributes) for name in _names(match)]
    if line.opcode == "while":
        trips = _trip_count(module, step.computation, line)
        note = "" if trips is not None else f"trip count of {line.name} unknown"
        yield line.attribute("body"), trips, note
        yield line.attribute("condition"), None if trips is None else trips + 1, note
    elif line.opcode == "conditional":
        for branch, name in enumerate(called):
            yield name, 1, f"if branch {branch} of {len(called)} is taken"
    elif line.opcode == "call":
        yield line.attribute("to_apply"), 1, ""
    else:  # What others apply, a reduction say, is a function of single entries.
        yield from ((name, 1, "") for name in called)


def _names(match: re.Match[str]) -> list[str]:
    return [name.strip().lstrip("%") for name in (match[1] or match[2]).split(",")]


def _trip_count(module: Module, caller: str, loop: Instruction) -> Count:
    """Return how often a while loop runs, or None where that depends on data.

    CPU and CUDA programs carry the number. TPU programs do not, and there a counter that is
    compared with a constant tells: from `start` in steps of `step` while it is less than `limit`.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = loop.attribute("condition")
    test = module.root(condition)
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    counter, bound = (_origin(module, condition, name) for name in test.operands)
    if counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(counter.attribute("index"))
    limit = _constant(bound)
    start = _constant(_tuple_entry(module, caller, loop.operands[0], index))
    step = _step(module, loop.attribute("body"), index)
    if limit is None or start is None or step is None or step < 1:
        return None
    return max(0, -(-(limit - start) // step))


def _origin(module: Module, computation: str, name: str) -> Instruction | None:
    """Return the instruction that `name` is a copy of."""
    lines = module.computations[computation]
    line = lines.get(name)
    while line is not None and line.opcode in ("copy", "bitcast"):
        line = lines.get(line.operands[0])
    return line


def _tuple_entry(module: Module, computation: str, name: str, index: int) -> Instruction | None:
    line = _origin(module, computation, name)
    if line is None or line.opcode != "tuple":
        return None
    return _origin(module, computation, line.operands[index])


def _constant(line: Instruction | None) -> int | None:
    if line is None or line.opcode != "constant" or not re.match(r"-?\d+$", line.operands[0]):
        return None
    return int(line.operands[0])


def _step(module: Module, body: str, index: int) -> int | None:
    """Return the constant that a loop's body adds to entry `index` of its state."""
    update = _tuple_entry(module, body, module.root(body).name, index)
    if update is None or update.opcode != "add":
        return None
    terms = [_origin(module, body, name) for name in update.operands]
    counters = [t for t in terms if t is not None and t.opcode == "get-tuple-element"]
    steps = [step for step in map(_constant, terms) if step is not None]
    if len(counters) != 1 or len(steps) != 1 or counters[0].attribute("index") != str(index):
        return None
    return steps[0]
