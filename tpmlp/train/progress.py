"""Progress for people: a bar in a terminal or a notebook, a few plain lines elsewhere."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tpmlp.extras import require

# A run prints at most about this many plain lines, and not more than one in this time.
MAX_LINES = 20
MIN_LINE_INTERVAL_S = 1.0

ACCURACIES = ("accuracy", "validation_accuracy")


class Progress(Protocol):
    """What the loop tells."""

    def update(
        self, step: int, num_samples: int, elapsed_s: float, numbers: dict[str, float]
    ) -> None:
        """Show that a step is done.

        Args:
            step: counted from 1.
            num_samples: samples seen so far.
            elapsed_s: seconds since the first step began.
            numbers: the newest ones, by name.
        """
        ...

    def say(self, message: str) -> None:
        """Show a sentence."""
        ...


@contextmanager
def open_progress(shown: bool, num_steps: int) -> Iterator[Progress]:
    """Give the Progress that suits standard output."""
    if not shown:
        yield _Silence()
        return
    console = require("rich.console", extra="train", user="progress=True").Console()
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines(num_steps)
        return
    shown_bar = _Bar(console, num_steps)
    with shown_bar.live:
        yield shown_bar


class _Silence:
    def update(
        self, step: int, num_samples: int, elapsed_s: float, numbers: dict[str, float]
    ) -> None:
        """Show nothing."""

    def say(self, message: str) -> None:
        """Show nothing."""


class _Lines:
    """Lines at even distances in steps, not too close in time; the last step has one."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.printed_at, self.printed_s = 0, -math.inf

    def update(
        self, step: int, num_samples: int, elapsed_s: float, numbers: dict[str, float]
    ) -> None:
        """Print a line if one is due."""
        due = (step - self.printed_at) * MAX_LINES >= self.num_steps
        if step < self.num_steps and (not due or elapsed_s - self.printed_s < MIN_LINE_INTERVAL_S):
            return
        self.printed_at, self.printed_s = step, elapsed_s
        left_s = elapsed_s / step * (self.num_steps - step)
        count = f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}"
        status = format_status(num_samples / elapsed_s, numbers)
        self.say(f"{count}  {status}  {_clock(left_s)} left")

    def say(self, message: str) -> None:
        """Print the sentence."""
        print(message, flush=True)


class _Bar:
    """A bar of rich, and under it the numbers, which a narrow terminal may wrap."""

    def __init__(self, console: Any, num_steps: int) -> None:
        live = require("rich.live", extra="train", user="progress=True")
        self.group = require("rich.console", extra="train", user="progress=True").Group
        self.text = require("rich.text", extra="train", user="progress=True").Text
        self.bar = _bar(console)
        self.task = self.bar.add_task("training", total=num_steps)
        self.live = live.Live(self.bar, console=console)

    def update(
        self, step: int, num_samples: int, elapsed_s: float, numbers: dict[str, float]
    ) -> None:
        """Move the bar and show the numbers."""
        self.bar.update(self.task, completed=step)
        status = self.text(format_status(num_samples / elapsed_s, numbers))
        self.live.update(self.group(self.bar, status))

    def say(self, message: str) -> None:
        """Print the sentence above the bar."""
        self.live.console.print(message, highlight=False, markup=False)


def format_status(samples_per_s: float, numbers: dict[str, float]) -> str:
    """Return the numbers of a step as one line.

    Examples:
        >>> format_status(12345.6, {"loss": 0.12345, "accuracy": 0.5})
        'loss 0.1235  accuracy 0.500  12,346 samples/s'
    """
    shown = [
        f"{name.replace('_', ' ')} {value:{'.3f' if name in ACCURACIES else '.4g'}}"
        for name, value in numbers.items()
    ]
    return "  ".join([*shown, f"{samples_per_s:,.0f} samples/s"])


def _bar(console: Any) -> Any:
    rich = require("rich.progress", extra="train", user="progress=True")
    return rich.Progress(
        rich.BarColumn(bar_width=None),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("left"),
        console=console,
        expand=True,
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
