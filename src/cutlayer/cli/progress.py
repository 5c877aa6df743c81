"""Live progress of a run: loss, tokens per second, bytes, time waiting for the link, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["LiveProgress", "human_bytes"]


def human_bytes(count: float) -> str:
    """Return a byte count as a person reads it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


class LiveProgress(TrainerCallback):
    """A bar on a terminal; a line at each log otherwise."""

    def __init__(self, connection: Any) -> None:
        self._traffic = connection.traffic
        self._bar: Progress | None = None
        self._task: Any = None
        self._started_s = 0.0
        self._last: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Start the clock and the bar."""
        self._started_s = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=state.max_steps)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=self._line(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_kw: Any) -> None:
        """Remember the newest figures, and print a line where there is no bar."""
        self._last.update(logs or {})
        if self._bar is None and logs and "loss" in logs:
            done = state.global_step
            left_s = (time.monotonic() - self._started_s) / max(done, 1) * (state.max_steps - done)
            print(
                f"step {done}/{state.max_steps}  {self._line(state)}  eta {left_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, state: Any) -> str:
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        traffic = self._traffic
        # TRL counts tokens itself; transformers' own trainer has no such figure.
        tokens = self._last.get("num_tokens")
        link_s = max(traffic.waited_s - traffic.trunk_s - traffic.queued_s, 0.0)
        parts = [
            f"loss {float(self._last['loss']):.4f}" if "loss" in self._last else "loss -",
            f"{float(tokens) / elapsed_s:.0f} tok/s" if tokens else "",
            f"up {human_bytes(traffic.sent_bytes)}",
            f"down {human_bytes(traffic.received_bytes)}",
            f"waiting {traffic.waited_s / elapsed_s:.0%} (link {link_s / elapsed_s:.0%})",
        ]
        return "  ".join(part for part in parts if part)
