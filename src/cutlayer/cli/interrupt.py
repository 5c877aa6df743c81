"""Ctrl-C ends a run after the step in hand, saved on both sides."""

from __future__ import annotations

import signal
import sys
from typing import Any

from transformers import TrainerCallback

__all__ = ["Interrupt"]


class Interrupt(TrainerCallback):
    """Save and stop after this step when a signal comes; a second one stops at once.

    Attributes:
        came: Whether a signal came.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Listen."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._heard)

    def on_train_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Listen no more."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _heard(self, number: int, _frame: Any) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> Any:
        """Have the step saved, and end."""
        if self.came:
            control.should_save = control.should_training_stop = True
        return control
