"""The collectives of a program, and the products that run while each is under way.

A collective that does not block is written in three ways:

    all-gather-start ... all-gather-done            CUDA; permutes on TPU
    async-start ... async-update ... async-done     each calls a computation that holds it
    fusion ... fusion ... fusion                    TPU v5e: the first holds AsyncCollectiveStart,
                                                    the last AsyncCollectiveDone; the collective is
                                                    repeated in all three, under one chain_id

What the schedule puts between its start and its done is what may run meanwhile.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tpmlp.inspection.hlo.counts import Count
from tpmlp.inspection.hlo.execution import Step, expand, run
from tpmlp.inspection.hlo.groups import Groups, parse_groups
from tpmlp.inspection.hlo.products import Product, products_among
from tpmlp.inspection.hlo.text import Array, Instruction, Module, Shape, flat, parse_shape

Kind: TypeAlias = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ppermute"]

_KINDS: dict[str, Kind] = {
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "all-to-all": "all_to_all",
    "collective-permute": "ppermute",
}
_UNCOUNTED = ("collective-broadcast", "ragged-all-to-all", "send", "recv")
_FUSED_START, _FUSED_DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveInstruction:
    """One collective of the program.

    Attributes:
        kind: which collective.
        groups: devices that communicate with each other; for ppermute the (source, target) pairs.
        payload_bytes: what one device holds of the whole array: the operand, or for all_gather
            the result.
        dtype: of what moves, "+" between several.
        asynchronous: whether other work can run between its start and its end.
        overlaps: products that the schedule puts there, counted per execution.
        count: executions in one call; None where the program does not tell.
        note: the condition under which `count` holds; empty when there is none.
    """

    kind: Kind
    groups: Groups
    payload_bytes: int
    dtype: str
    asynchronous: bool
    overlaps: tuple[Product, ...]
    count: Count
    note: str


def collectives(module: Module) -> tuple[CollectiveInstruction, ...]:
    """Return every collective of a program, in program order, calls followed where they occur.

    Raises:
        ValueError: the program communicates in a way that has no kind here.
    """
    return tuple(_collectives(module))


def _collectives(module: Module) -> Iterator[CollectiveInstruction]:
    for step in run(module):
        line = step.instruction
        opcode = line.opcode.removesuffix("-start")
        if opcode in _KINDS and not _is_continuation(module, step):
            yield _collective(module, step)
        elif opcode in _UNCOUNTED and "is_host_transfer=true" not in line.attributes:
            raise ValueError(
                f"function must communicate by {', '.join(_KINDS.values())} only: got "
                f"{line.opcode} in {line.name}. Audit the rest without it."
            )


def _collective(module: Module, step: Step) -> CollectiveInstruction:
    line, start = step.instruction, _start(step)
    started = line.opcode.endswith("-start")
    kind = _KINDS[line.opcode.removesuffix("-start")]
    groups = _groups(line, module.num_devices)
    arrays = _payload(kind, parse_shape(line.shape), started)
    num_bytes = sum(array.num_bytes for array in arrays)
    if kind == "reduce_scatter" and not started:
        num_bytes *= len(groups[0])
    return CollectiveInstruction(
        kind=kind,
        groups=groups,
        payload_bytes=num_bytes,
        dtype="+".join(dict.fromkeys(array.dtype for array in arrays)),
        asynchronous=start is not None,
        overlaps=products_among(module, _meanwhile(module, start)) if start else (),
        count=step.count,
        note=step.note,
    )


def _groups(instruction: Instruction, num_devices: int) -> Groups:
    found = re.search(r", (?:replica_groups|source_target_pairs)=(.*)", instruction.attributes)
    return parse_groups(found[1] if found else "{}", num_devices)


def _payload(kind: Kind, shape: Shape, started: bool) -> tuple[Array, ...]:
    """Return the arrays that `payload_bytes` counts.

    A start returns (operand, result, ...), or ((operands), (results), ...) when it stands for
    several; an all-reduce's own start returns its results alone.
    """
    if not started or isinstance(shape, Array):
        return flat(shape)
    if kind == "all_reduce":
        return flat(shape if isinstance(shape[0], Array) else shape[0])
    return flat(shape[0] if kind in ("reduce_scatter", "all_to_all") else shape[1])


def _start(step: Step) -> Step | None:
    """Return the step that starts a collective; None if the program waits for it there."""
    if step.instruction.opcode.endswith("-start"):
        start = step
    elif step.caller and (step.caller.instruction.opcode == "async-start" or _is_fused(step)):
        start = step.caller
    else:
        return None
    # CUDA programs keep the -start form for those that were made to run at once.
    synchronous = '"is_sync":true' in start.instruction.attributes + step.instruction.attributes
    return None if synchronous else start


def _meanwhile(module: Module, start: Step) -> Iterator[Step]:
    """Yield what runs after a start and before its done, per execution of the start."""
    lines = module.computations[start.computation].values()
    held = {start.instruction.name}
    for line in itertools.dropwhile(lambda line: line is not start.instruction, lines):
        if _ends(module, line, start.instruction, held):
            return
        if line is not start.instruction:
            yield from expand(module, Step(computation=start.computation, instruction=line))
        if line.opcode == "async-update" and line.operands[0] in held:
            held.add(line.name)


def _ends(module: Module, line: Instruction, start: Instruction, held: set[str]) -> bool:
    """Return whether a line is the done of a start whose state has the names in `held`."""
    if chain := _fused_chain(module, start, _FUSED_START):
        return _fused_chain(module, line, _FUSED_DONE) == chain
    return line.opcode.endswith("-done") and line.operands[0] in held


def _fused_chain(module: Module, fusion: Instruction, target: str) -> str:
    """Return the chain_id of the collective that a fusion starts or ends; empty if it does not."""
    if fusion.opcode != "fusion":
        return ""
    lines = module.computations[fusion.attribute("calls")].values()
    if not any(line.target == target for line in lines):
        return ""
    return next(filter(None, map(_chain, lines)), "")


def _chain(line: Instruction) -> str:
    found = re.search(r'chain_id="(\d+)"', line.attributes)
    return found[1] if found else ""


def _is_fused(step: Step) -> bool:
    return _chain(step.instruction) != ""


def _is_continuation(module: Module, step: Step) -> bool:
    """Return whether a fused collective was started by an earlier fusion."""
    lines = module.computations[step.computation].values()
    return _is_fused(step) and all(line.target != _FUSED_START for line in lines)
