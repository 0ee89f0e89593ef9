"""Ctrl-C between optimiser steps, not within one."""

__all__ = ["Interruptions"]

import signal
import threading
from types import FrameType
from typing import Any


class Interruptions:
    """Holds the first SIGINT back until `check`, so that a checkpoint never catches half a step.

    A second SIGINT acts at once. Outside the main thread, where signals do not arrive, it does nothing.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        self._put_back()

    def check(self) -> None:
        """Raises the interruption that was held back, if there was one.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed since the last call.
        """
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt
