"""Ctrl-C, turned into a question that the loop asks between steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed since.

    The first press is only remembered, so that the step ends in order and its result can be
    used. The second raises KeyboardInterrupt where the program stands. Python delivers signals to
    the main thread alone; in another thread nothing is changed and the answer stays False.
    """
    pressed = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main else None

    def remember(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    # None is a handler that was not set from Python, and cannot be put back from Python either.
    if before is None:
        yield pressed.is_set
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
