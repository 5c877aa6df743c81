"""What a server keeps of its tenants: adapters and optimizer states, as safetensors files.

    <root>/<tenant>/<run>/step-<n>/adapter.safetensors, optimizer.safetensors, state.json

A state is written aside, synced and renamed, so that a half-written one never has a final name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cutlayer.errors import Refused, StorageError
from cutlayer.server.names import is_plain_name

__all__ = ["State", "Store"]

_KEPT_STATES = 2


@dataclass(frozen=True)
class State:
    """One tenant's run at one step."""

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors, which is nearly all that it takes on the disk."""
        return sum(t.nbytes for part in (self.adapter, self.optimizer) for t in part.values())


@dataclass(frozen=True)
class Store:
    """A folder of states."""

    root: Path

    def save(self, tenant: str, run: str, state: State) -> None:
        """Write a state and drop all but the two that were saved last under this name.

        Raises:
            StorageError: If the disk is full or cannot be written; older states stay.
        """
        home = self._home(tenant, run)
        final = home / f"step-{state.step}"
        aside = home / f".step-{state.step}.part"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True, mode=0o700)
            save_file(dict(state.adapter), aside / "adapter.safetensors")
            save_file(dict(state.optimizer), aside / "optimizer.safetensors")
            (aside / "state.json").write_text(json.dumps(dict(state.settings)))
            for file in aside.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise StorageError(
                f"the server could not save step {state.step} of run '{run}' ({reason}): its "
                "operator must free space; what was saved before is untouched"
            ) from error
        for folder in _by_age(home)[:-_KEPT_STATES]:
            shutil.rmtree(folder, ignore_errors=True)

    def load(self, tenant: str, run: str, step: int | None = None) -> State:
        """Read the state of one step, or the one that was saved last.

        Raises:
            Refused: If there is none.
        """
        steps = self.steps(tenant, run)
        newest = _by_age(self._home(tenant, run))[-1:]
        wanted = step if step is not None else next(map(_step_of, newest), None)
        if wanted not in steps:
            held = f"it holds steps {', '.join(map(str, steps))}" if steps else "it holds none"
            raise Refused(
                f"the server has no state of run '{run}' at step {wanted}: {held}; start the run "
                "anew or resume at a step that both sides hold"
            )
        folder = self._home(tenant, run) / f"step-{wanted}"
        return State(
            step=int(wanted or 0),
            adapter=load_file(folder / "adapter.safetensors"),
            optimizer=load_file(folder / "optimizer.safetensors"),
            settings=json.loads((folder / "state.json").read_text()),
        )

    def steps(self, tenant: str, run: str) -> list[int]:
        """Return the steps held of a run, ascending."""
        return sorted(map(_step_of, self._home(tenant, run).glob("step-*")))

    def _home(self, tenant: str, run: str) -> Path:
        if not (is_plain_name(tenant) and is_plain_name(run)):
            raise Refused(
                f"run name '{run}' is not plain: use letters, digits, '.', '_' and '-', at most 64"
            )
        return self.root / tenant / run


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _by_age(home: Path) -> list[Path]:
    # Not by step: a new run under an old name begins at step 0 again.
    return sorted(home.glob("step-*"), key=lambda folder: folder.stat().st_mtime_ns)
