"""What a server keeps of its tenants: adapters and optimizer states, as safetensors files.

    <root>/<tenant>/<run>/step-<n>~<k>/adapter.safetensors, optimizer.safetensors, state.json
    <root>/<tenant>/<run>/mark-<n>/…    where a session stood after its request n, and
                                        statics.safetensors if its codecs have learnt

A state is written aside, synced and renamed, so that a half-written one never has a final name. A
step that is saved again gets the next k, and the older one is dropped when that stands: at no
moment is there none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cutlayer.errors import Refused, StorageError
from cutlayer.server.names import is_plain_name

__all__ = ["State", "Store"]


@dataclass(frozen=True)
class State:
    """One tenant's run at one step."""

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    statics: Mapping[str, Tensor] = field(default_factory=dict)
    """Of a mark: what codecs had learnt."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors, which is nearly all that it takes on the disk."""
        parts = (self.adapter, self.optimizer, self.statics)
        return sum(t.nbytes for part in parts for t in part.values())


@dataclass(frozen=True)
class Store:
    """A folder of states."""

    root: Path

    def save(self, tenant: str, run: str, state: State) -> None:
        """Write a state under its step.

        Raises:
            StorageError: If the disk is full or cannot be written; older states stay.
        """
        home = self._home(tenant, run)
        older = list(home.glob(f"step-{state.step}~*"))
        number = max(map(_age_of, older), default=0) + 1
        self._write(home, f"step-{state.step}~{number}", state)
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def retain(self, tenant: str, run: str, steps: set[int]) -> None:
        """Drop all states of a run but those of these steps."""
        home = self._home(tenant, run)
        for folder in home.glob("step-*"):
            if _step_of(folder) not in steps:
                shutil.rmtree(folder, ignore_errors=True)

    def mark(self, tenant: str, run: str, sequence: int, state: State) -> None:
        """Write where a session stood after a request, beside its older marks.

        Raises:
            StorageError: If the disk is full or cannot be written; older marks stay.
        """
        home, name = self._home(tenant, run), f"mark-{sequence}"
        # Left by a server that was killed before its journal named it; the request is done again.
        shutil.rmtree(home / name, ignore_errors=True)
        self._write(home, name, state)

    def marked(self, tenant: str, run: str, sequence: int) -> State:
        """Read a mark.

        Raises:
            Refused: If it is not there or damaged.
        """
        return self._read(self._home(tenant, run) / f"mark-{sequence}")

    def drop_marks(self, tenant: str, run: str, *, but: int = 0) -> None:
        """Drop the marks of a run, but the one after the request `but`."""
        for folder in self._home(tenant, run).glob("mark-*"):
            if folder.name != f"mark-{but}":
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self, home: Path, name: str, state: State) -> None:
        final, aside = home / name, home / f".{name}.part"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True, mode=0o700)
            save_file(dict(state.adapter), aside / "adapter.safetensors")
            save_file(dict(state.optimizer), aside / "optimizer.safetensors")
            if state.statics:
                save_file(dict(state.statics), aside / "statics.safetensors")
            settings = {**state.settings, "step": state.step}
            (aside / "state.json").write_text(json.dumps(settings))
            for file in aside.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            aside.rename(final)
            _sync_folder(home)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise StorageError(
                f"the server could not save step {state.step} of run '{home.name}' ({reason}): its "
                "operator must free space; what was saved before is untouched"
            ) from error

    def _read(self, folder: Path) -> State:
        try:
            settings = json.loads((folder / "state.json").read_text())
            return State(
                step=int(settings.pop("step")),
                adapter=load_file(folder / "adapter.safetensors"),
                optimizer=load_file(folder / "optimizer.safetensors"),
                settings=settings,
                statics=load_file(statics)
                if (statics := folder / "statics.safetensors").exists()
                else {},
            )
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise Refused(
                f"what the server kept of run '{folder.parent.name}' as {folder.name} cannot be "
                f"read ({type(error).__name__}): resume at another step"
            ) from error

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
        folders = self._home(tenant, run).glob(f"step-{wanted}~*")
        return self._read(max(folders, key=_age_of))

    def steps(self, tenant: str, run: str) -> list[int]:
        """Return the steps held of a run, ascending."""
        return sorted(set(map(_step_of, self._home(tenant, run).glob("step-*"))))

    def _home(self, tenant: str, run: str) -> Path:
        if not (is_plain_name(tenant) and is_plain_name(run)):
            raise Refused(
                f"run name '{run}' is not plain: use letters, digits, '.', '_' and '-', at most 64"
            )
        return self.root / tenant / run


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").partition("~")[0])


def _age_of(folder: Path) -> int:
    return int(folder.name.partition("~")[2])


def _sync_folder(folder: Path) -> None:
    """Have a rename in this folder survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _by_age(home: Path) -> list[Path]:
    # Not by step: a new run under an old name begins at step 0 again.
    return sorted(home.glob("step-*"), key=lambda folder: folder.stat().st_mtime_ns)
