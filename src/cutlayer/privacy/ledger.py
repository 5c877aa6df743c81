"""What was released, written down before it leaves.

    {"kind": "head", "epsilon": 8.0, "delta": 1e-05, "salt": ..., "chain": ...}
    {"kind": "release", "mechanism": "ldp_sequence", "records": [...], "digest": ..., "chain": ...}
    {"kind": "raise", "epsilon": 12.0, "by": "A. Keller", "when": ..., "chain": ...}

One line of JSON each, only ever appended, on the disk before `book` returns. Every line's `chain`
is the SHA-256 of the chain before it and of itself. After a crash a last line that is torn is
dropped: `book` had not returned, so nothing had left. No accountant runs while booking: a budget is
a sum of 1 / noise_multiplier^2 a record, and that is computed once (see `budget_of`).
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cutlayer.errors import BudgetExhausted, ConfigError, DataError, StorageError
from cutlayer.privacy.accountant import analytic_epsilon, budget_of, check_target
from cutlayer.privacy.lines import append, chained, locked, sync_folder, taken_up, whole_lines
from cutlayer.privacy.release import Release

__all__ = ["Ledger"]

FORMAT = 1
_ROUNDING = 1e-9  # relative; a budget may be met exactly
_FIELDS = tuple(f.name for f in dataclasses.fields(Release))

Spent = collections.Counter[Release]
"""Kinds of release (without records), and how often."""


class Ledger:
    """The releases of one data set, over all runs that use it; one process at a time.

    Attributes:
        epsilon: The budget of each record, `None` if releases are only counted.
        delta: Its delta.
        path: The file.
    """

    def __init__(
        self,
        path: Path,
        *,
        epsilon: float | None,
        delta: float | None,
        records: int | None = None,
        raised_by: str = "",
    ) -> None:
        """Begin a ledger, or go on with the one that stands there.

        Args:
            path: The file.
            epsilon: What each record may spend; `None` counts without a limit.
            delta: Delta, below 1 / records; `None` only without a limit.
            records: How many records the data set has, if known.
            raised_by: Who decided that `epsilon` is more than what was recorded.

        Raises:
            ConfigError: If the budget makes no sense, or is not the one that was recorded.
            DataError: If a line was changed, taken out or put in.
            StorageError: If the file cannot be written, or another process has it open.
        """
        if delta is not None:
            check_target(epsilon, delta, records=records, where="the ledger")
        elif epsilon is not None:
            raise ConfigError(f"the ledger has epsilon = {epsilon:g} and no delta: name one")
        self._begin(path, epsilon, delta)
        self._file = locked(path)
        try:
            self._take_up(raised_by)
        except BaseException:
            os.close(self._file)
            raise

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Return what a ledger's file says, to be asked only, even while a run has it open.

        Raises:
            DataError: If it is not there, or a line was changed, taken out or put in.
        """
        read = cls.__new__(cls)
        read._begin(path, None, None)
        read._broken = True  # nothing can be booked
        try:
            read._replay_all(whole_lines(path.read_bytes())[1])
        except OSError as error:
            raise DataError(f"the ledger '{path}' cannot be read ({error.strerror})") from error
        return read

    def _begin(self, path: Path, epsilon: float | None, delta: float | None) -> None:
        self.epsilon, self.delta = epsilon, delta
        self.path, self._file = path, -1
        self._chain = ""
        self._salt = b""
        self._everyone: Spent = collections.Counter()
        self._of_record: dict[str, Spent] = {}
        self._most_spent = ""
        self._sends: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self._broken = False

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have it."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    # ------------------------------------------------------------------ booking

    def book(self, releases: Release | Sequence[Release], digest: str, request: str = "") -> bool:
        """Write down what is about to leave; what leaves before this returns is not accounted for.

        Args:
            releases: All of what one message releases: it is booked as a whole or not at all.
            digest: A digest of the very bytes that leave.
            request: A key of the message that a retry repeats. A retry with the same key and bytes
                tells the server nothing new and is not booked again; without a key all is booked.

        Returns:
            Whether it was booked; `False` for such a retry.

        Raises:
            BudgetExhausted: If it would bring a record above epsilon. Nothing was booked.
            ConfigError: If there is a budget and the mechanism has no epsilon.
            StorageError: If it could not be written. Nothing may be sent.
        """
        several = [releases] if isinstance(releases, Release) else list(releases)
        send = (request, digest, len(several))
        if not several or (request and self._sends[send] >= len(several)):
            return False
        if self.epsilon is not None:
            assert self.delta is not None
            self._refuse_beyond(several, self.epsilon, self.delta)
        self._append(
            [
                {"kind": "release", **dataclasses.asdict(release), **_part(number, send)}
                for number, release in enumerate(several)
            ]
        )
        for release in several:
            self._count(release, send)
        return True

    def raise_budget(self, epsilon: float, by: str) -> None:
        """Record that a person lets each record spend more.

        Raises:
            ConfigError: If it is no raise, or nobody stands for it.
            StorageError: If it could not be written.
        """
        if self.epsilon is None or not epsilon > self.epsilon:
            raise ConfigError(
                f"epsilon = {epsilon!r} is no raise of the ledger's budget of {self.epsilon}: name "
                "a larger one"
            )
        if not by.strip():
            raise ConfigError("a raised budget is a person's decision: name who decided")
        assert self.delta is not None
        check_target(epsilon, self.delta, where="the ledger")
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append([{"kind": "raise", "epsilon": epsilon, "by": by, "when": when}])
        self.epsilon = epsilon

    # ------------------------------------------------------------------ asking

    def record_of(self, ids: Iterable[int]) -> str:
        """Return the id of a record of these tokens (padding left out), secret to this ledger."""
        text = ",".join(map(str, ids)).encode()
        return hashlib.blake2b(text, key=self._salt, digest_size=16).hexdigest()

    def remaining(self, release: Release, record: str | None = None) -> int | None:
        """Return how often such a release still fits, of one record or of the most spent one.

        `None` if there is no limit.
        """
        if self.epsilon is None or self.delta is None:
            return None
        left = budget_of(self.epsilon, self.delta) * (1 + _ROUNDING) - self._cost_of(record)
        return max(0, int(left * release.noise_multiplier**2))

    def releases_of(self, record: str | None = None) -> list[Release]:
        """Return all releases of a record, or of the most spent one, for the guarantee block."""
        spent = self._everyone + self._own(record)
        return [kind for kind, count in spent.items() for _ in range(count)]

    def _cost_of(self, record: str | None) -> float:
        return _cost(self._everyone) + _cost(self._own(record))

    def _own(self, record: str | None) -> Spent:
        name = self._most_spent if record is None else record
        return self._of_record.get(name, collections.Counter())

    # ------------------------------------------------------------------ the inside

    def _refuse_beyond(self, releases: Sequence[Release], epsilon: float, delta: float) -> None:
        extra: dict[str | None, Spent] = collections.defaultdict(collections.Counter)
        for release in releases:
            if not release.formal or release.noise_multiplier <= 0:
                raise ConfigError(
                    f"the ledger has a budget of epsilon {epsilon:g}, and '{release.mechanism}' "
                    "has no epsilon: leave the budget out, or use a formal mechanism"
                )
            for record, times in _touched(release):
                extra[record][release.of()] += times
        everyone = _cost(extra.pop(None, collections.Counter()))
        limit = budget_of(epsilon, delta) * (1 + _ROUNDING)
        worst = self._cost_of(None) + everyone if everyone else 0.0
        for record, spent in extra.items():
            worst = max(worst, self._cost_of(record) + everyone + _cost(spent))
        if worst > limit:
            would = analytic_epsilon(worst**0.5, delta)
            raise BudgetExhausted(
                f"this release would bring epsilon to {would:.2f} at delta {delta:g} and the "
                f"budget is {epsilon:g}: nothing was sent; end the run here, or have a person "
                "raise the budget and resume"
            )

    def _count(self, release: Release, send: tuple[str, str, int]) -> None:
        self._sends[send] += 1
        for record, times in _touched(release):
            if record is None:
                self._everyone[release.of()] += times
                continue
            own = self._of_record.setdefault(record, collections.Counter())
            own[release.of()] += times
            most = self._own(None)
            if (_cost(own), own.total()) > (_cost(most), most.total()):
                self._most_spent = record

    def _take_up(self, raised_by: str) -> None:
        lines = taken_up(self._file)
        if not lines:
            self._salt = os.urandom(16)
            budget = {"epsilon": self.epsilon, "delta": self.delta}
            head = {"kind": "head", "format": FORMAT, **budget, "salt": self._salt.hex()}
            self._append([head])
            sync_folder(self.path.parent)
            return
        epsilon, delta = self.epsilon, self.delta
        self._replay_all(lines)
        if delta != self.delta or (epsilon != self.epsilon and not raised_by):
            raise ConfigError(
                f"epsilon = {epsilon} and delta = {delta} are not the ledger's {self.epsilon} and "
                f"{self.delta} in '{self.path}': use those, or have a person raise epsilon"
            )
        if epsilon is not None and epsilon != self.epsilon:
            self.raise_budget(epsilon, raised_by)

    def _replay_all(self, lines: Sequence[dict[str, Any]]) -> None:
        for number, line in enumerate(lines):
            try:
                self._replay(line, first=number == 0)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"'{self.path}' was altered or damaged at line {number + 1}: what was spent "
                    "is unknown; restore the file from a backup"
                ) from error

    def _replay(self, line: dict[str, Any], *, first: bool) -> None:
        chain = line.pop("chain")
        kind = line["kind"]
        if chained(self._chain, line) != chain or (kind == "head") != first:
            raise ValueError
        self._chain = chain
        if kind == "head":
            self._salt = bytes.fromhex(line["salt"])
            self.epsilon, self.delta = line["epsilon"], line["delta"]
            if line["format"] != FORMAT:
                raise ValueError
        elif kind == "raise":
            self.epsilon = float(line["epsilon"])
        elif kind == "release":
            fields = {name: line[name] for name in _FIELDS}
            release = Release(**{**fields, "records": tuple(fields["records"])})
            self._count(release, (line["request"], line["digest"], line["parts"]))
        else:
            raise ValueError

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        if self._broken:
            raise StorageError(
                f"'{self.path}' could not be written before: nothing is sent; free space and "
                "start again"
            )
        try:
            chain = append(self._file, self._chain, lines)
        except OSError as error:
            self._broken = True
            raise StorageError(
                f"'{self.path}' could not be written ({error.strerror}), so nothing was sent: "
                "free space"
            ) from error
        self._chain = chain


def _touched(release: Release) -> list[tuple[str | None, int]]:
    """Return whom a release touches, and how many releases it counts as.

    A record that is in one sum k times moves it k times as far, which costs k^2.
    """
    if not release.records:
        return [(None, 1)]
    return [(record, k * k) for record, k in collections.Counter(release.records).items()]


def _cost(spent: Spent) -> float:
    return sum(
        count / kind.noise_multiplier**2
        for kind, count in spent.items()
        if kind.formal and kind.noise_multiplier > 0
    )


def _part(number: int, send: tuple[str, str, int]) -> dict[str, Any]:
    request, digest, parts = send
    return {"request": request, "digest": digest, "part": number, "parts": parts}
