"""Callbacks: what fit calls after each record, callback(record, params) -> bool or None.

True stops the run. params are the live parameters of that step: the next step reuses their
memory, so a callback that keeps them must copy them.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tpmlp.model import Params

Record = dict[str, Any]
Callback = Callable[[Record, Params], bool | None]


class EarlyStopping:
    """Stop when a number of the record has not improved for a while.

    Attributes:
        monitor: a key of the record. One that ends in "accuracy" improves by rising, any other
            by falling. Records without it are passed over.
        patience: how many records with it may go by without an improvement.
        min_delta: what counts as an improvement: more than this.
        restore_best: whether fit returns the parameters of the best record; they are copied, so
            they need the parameters' memory once more.
        best: the best value so far, None before the first.
        best_step: its step.
        best_params: its parameters, with restore_best.

    Examples:
        >>> stop = EarlyStopping(patience=1)
        >>> [stop({"step": k, "validation_loss": v}, ()) for k, v in enumerate((3, 1, 2, 4))]
        [False, False, False, True]
        >>> stop.best, stop.best_step
        (1, 1)
    """

    def __init__(
        self,
        monitor: str = "validation_loss",
        *,
        patience: int,
        min_delta: float = 0.0,
        restore_best: bool = False,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise ValueError(f"patience must be an integer, at least 0: got patience={patience!r}.")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be at least 0 and finite: got min_delta={min_delta}.")
        self.monitor, self.patience = monitor, patience
        self.min_delta, self.restore_best = min_delta, restore_best
        self.start()

    def start(self) -> None:
        """Forget what was seen; fit calls it before the first step."""
        self.best: float | None = None
        self.best_step: int | None = None
        self.best_params: Params | None = None
        self._without_improvement = 0

    def __call__(self, record: Record, params: Params) -> bool:
        """Return whether to stop."""
        if self.monitor not in record:
            self._check_monitor(record)
            return False
        if not self._improves(record[self.monitor]):
            self._without_improvement += 1
            return self._without_improvement > self.patience
        self.best, self.best_step = record[self.monitor], record["step"]
        self._without_improvement = 0
        if self.restore_best:
            self.best_params = jax.tree.map(jnp.copy, params)
        return False

    def __repr__(self) -> str:
        return f"EarlyStopping(monitor={self.monitor!r}, patience={self.patience})"

    def _improves(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        rise = value - self.best
        return (rise if self.monitor.endswith("accuracy") else -rise) > self.min_delta

    def _check_monitor(self, record: Record) -> None:
        """Refuse a monitor that this record would have if any had it."""
        validated = "validation_loss" in record
        if validated or not self.monitor.startswith("validation_"):
            raise ValueError(
                f"monitor must be a key of the records: got monitor={self.monitor!r}, records with "
                f"{tuple(record)}. A loss without right and wrong has no accuracy."
            )


class JSONLines:
    """Write each record to a file as one line of JSON, as it comes.

    The file is begun anew when a run starts. A number that is not finite is written as null, for
    JSON has no other word for it.

    Attributes:
        path: the file; its folder is made if need be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def start(self) -> None:
        """Begin the file; fit calls it before the first step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")

    def __call__(self, record: Record, params: Params) -> None:
        """Append the record; closing the file flushes it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _or_null(v) for k, v in record.items()}) + "\n")

    def __repr__(self) -> str:
        return f"JSONLines({str(self.path)!r})"


def check_callbacks(callbacks: Any, *, validated: bool) -> tuple[Callback, ...]:
    """Return the callbacks as a tuple.

    Raises:
        ValueError: one cannot be called; or it waits for a validation that does not take place.
    """
    if callable(callbacks):
        raise ValueError(f"callbacks must be a sequence: got {callbacks!r}. Write [{callbacks!r}].")
    for callback in callbacks:
        if not callable(callback):
            raise ValueError(
                "callbacks must be functions of (record, params): got "
                f"{callback!r}. Use for example tpmlp.JSONLines(path)."
            )
        monitor = callback.monitor if isinstance(callback, EarlyStopping) else ""
        if monitor.startswith("validation_") and not validated:
            raise ValueError(
                f"monitor must be a key of the records: got monitor={monitor!r}, validation=None. "
                "Pass validation=(x, y), or monitor='loss'."
            )
    return tuple(callbacks)


def start(callbacks: tuple[Callback, ...]) -> None:
    """Tell the callbacks that can be told that a run starts."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping | JSONLines):
            callback.start()


def best_params(callbacks: tuple[Callback, ...], params: Params) -> Params:
    """Return the parameters of the best record where a callback kept them, else params."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.best_params is not None:
            return callback.best_params
    return params


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
