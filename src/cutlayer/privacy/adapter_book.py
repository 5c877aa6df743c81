"""The adapters of one data set that DP-SGD made, each written down before it is given out.

    {"kind": "head", "format": 1, "chain": ...}
    {"kind": "adapter", "noise_multiplier": 1.2, "sample_rate": 0.01, "steps": 300, "chain": ...}

Whoever has several adapters of the same data learns more than one of them tells. So all that were
made of a data set are composed, and a limit on the sum can be set.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cutlayer.errors import BudgetExhausted, ConfigError, DataError, StorageError
from cutlayer.privacy.accountant import Epsilon, epsilon_of_adapters
from cutlayer.privacy.lines import append, chained, locked, sync_folder, taken_up

__all__ = ["AdapterBook"]

FORMAT = 1


class AdapterBook:
    """The book of one data set; one process at a time."""

    def __init__(self, path: Path) -> None:
        """Begin a book, or go on with the one that stands there.

        Raises:
            DataError: If a line was changed, taken out or put in.
            StorageError: If it cannot be written, or another process has it open.
        """
        self._path = path
        self._chain = ""
        self._runs: list[tuple[float, float, int]] = []
        self._file = locked(path)
        try:
            for line in taken_up(self._file):
                self._replay(line)
            if not self._chain:
                self._append({"kind": "head", "format": FORMAT})
                sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Count the adapters."""
        return len(self._runs)

    def close(self) -> None:
        """Let another process have it."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def total(self, delta: float, more: Sequence[tuple[float, float, int]] = ()) -> Epsilon:
        """Return what all adapters come to, with more that are planned.

        Raises:
            ConfigError: If delta or a number makes no sense.
        """
        return epsilon_of_adapters([*self._runs, *more], delta)

    def refuse_beyond(self, limit: float, delta: float, planned: tuple[float, float, int]) -> None:
        """Refuse a run whose adapter would bring all of them above a limit.

        Raises:
            ConfigError: If the limit makes no sense.
            BudgetExhausted: If it would.
        """
        if not (math.isfinite(limit) and limit > 0):
            raise ConfigError(f"total_epsilon = {limit!r} must be a number above 0")
        would = self.total(delta, [planned]).pld
        if would > limit:
            raise BudgetExhausted(
                f"with this run the {len(self) + 1} adapters of this data would come to epsilon "
                f"{would:.2f} at delta {delta:g} and total_epsilon is {limit:g}: nothing was "
                "trained; ask for a smaller target_epsilon, or have a person raise the total"
            )

    def book(self, noise_multiplier: float, sample_rate: float, steps: int, name: str) -> None:
        """Write down an adapter that is about to be given out.

        Raises:
            StorageError: If it could not be written. Nothing may be given out.
        """
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        run = (noise_multiplier, sample_rate, steps)
        numbers = dict(zip(("noise_multiplier", "sample_rate", "steps"), run, strict=True))
        self._append({"kind": "adapter", "name": name, "when": when, **numbers})
        self._runs.append(run)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._chain = append(self._file, self._chain, [line])
        except OSError as error:
            raise StorageError(
                f"'{self._path}' could not be written ({error.strerror}), so no adapter was given "
                "out: free space and train again"
            ) from error

    def _replay(self, line: dict[str, Any]) -> None:
        try:
            chain = line.pop("chain")
            head = line["kind"] == "head"
            if chained(self._chain, line) != chain or head != (not self._chain):
                raise ValueError
            if head and line["format"] != FORMAT:
                raise ValueError
            if not head:
                numbers = (float(line["noise_multiplier"]), float(line["sample_rate"]))
                self._runs.append((*numbers, int(line["steps"])))
            self._chain = chain
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"'{self._path}' was altered or damaged: what adapters of this data were given out "
                "is unknown; restore the file from a backup"
            ) from error
