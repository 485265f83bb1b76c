"""A table of tasks as text: a row a stage, a word a tick, and one line of flags before them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from tpmlp.pipeline.route import Kind, Task
from tpmlp.pipeline.validity import Ticks

IDLE = "."
# "F3" is F of microbatch 3, "F3.1" that of its chunk 1.
WORD = re.compile(r"[A-Z](\d+)(?:\.(\d+))?")
KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
LABEL = re.compile(r"\s*stage\s+\d+\s*\|")
# How the first line's flags are read; what prints as itself is read back as itself.
FLAGS = {
    "name": str,
    "order": str,
    "splits_backward": {"True": True, "False": False}.__getitem__,
    "peak": int,
}


def write_table(flags: Mapping[str, Any], ticks: Ticks) -> str:
    """Return the text that read_table reads; flags that are None are left out."""
    columns = zip(*ticks, strict=True)
    rows = [[IDLE if task is None else str(task) for task in column] for column in columns]
    widths = [max(map(len, words)) for words in zip(*rows, strict=True)]
    lines = [" ".join(f"{name}={value}" for name, value in flags.items() if value is not None)]
    for stage, row in enumerate(rows):
        words = [word.ljust(width) for word, width in zip(row, widths, strict=True)]
        lines.append(f"stage {stage:>{len(str(len(rows) - 1))}} | {' '.join(words)}".rstrip())
    return "\n".join(lines)


def check_flags(flags: Mapping[str, Any]) -> None:
    """Refuse flags that a table does not have."""
    if unknown := [name for name in flags if name not in FLAGS]:
        raise ValueError(
            f"flags must be of {tuple(FLAGS)}: got {unknown[0]}={flags[unknown[0]]!r}. Leave it "
            "out."
        )


def read_table(text: str) -> tuple[dict[str, Any], Ticks]:
    r"""Return the flags of a text, none without a first line of them, and its table.

    Raises:
        ValueError: an unknown flag, a word that is no task, or rows of different lengths.

    Examples:
        >>> flags, ticks = read_table("name=mine peak=2\nF0 B0 W0")
        >>> flags, [str(task) for (task,) in ticks]
        ({'name': 'mine', 'peak': 2}, ['F0', 'B0', 'W0'])
    """
    if not isinstance(text, str):
        raise ValueError(f"a table must be text: got {text!r}. Use for example 'F0 B0 W0'.")
    lines = [line for line in text.splitlines() if line.strip()]
    flags = _read_flags(lines.pop(0)) if lines and "=" in lines[0] else {}
    rows = [_read_row(line, stage) for stage, line in enumerate(lines)]
    _check_lengths(rows)
    return flags, tuple(zip(*rows, strict=True))


def _read_flags(line: str) -> dict[str, Any]:
    flags = {}
    for word in line.split():
        name, _, value = word.partition("=")
        try:
            flags[name] = FLAGS[name](value)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"the first line must hold flags like those of {tuple(FLAGS)}: got {word!r}. Use "
                "for example name=mine order=loop splits_backward=True peak=4."
            ) from error
    return flags


def _read_row(line: str, stage: int) -> list[Task | None]:
    label = LABEL.match(line)
    words = line[label.end() if label else 0 :].split()
    return [_read_word(word, stage, tick) for tick, word in enumerate(words)]


def _read_word(word: str, stage: int, tick: int) -> Task | None:
    if word == IDLE:
        return None
    parts, kind = WORD.fullmatch(word), KINDS.get(word[0])
    if parts is None or kind is None:
        raise ValueError(
            f"a table must be made of words like F0, B12, W3.1 and {IDLE!r}: got {word!r} of stage "
            f"{stage} at tick {tick}. Use {IDLE!r} for an idle slot."
        )
    return Task(kind, int(parts[1]), int(parts[2] or 0))


def _check_lengths(rows: Sequence[Sequence[Task | None]]) -> None:
    """Refuse a text without rows, and rows that do not end at the same tick."""
    lengths = [len(row) for row in rows]
    if not any(lengths):
        raise ValueError(
            "a table must have a row a stage: got no words. Use for example 'F0 B0 W0'."
        )
    for stage, length in enumerate(lengths):
        if length != lengths[0]:
            raise ValueError(
                f"rows must have a word for each tick: got {length} for stage {stage}, "
                f"{lengths[0]} for stage 0. Fill up with {IDLE!r}."
            )
