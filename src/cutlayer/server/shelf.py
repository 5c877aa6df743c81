"""The states on a server's disk as an operator sees them: names, steps, sizes. Loads no tensor."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from cutlayer.errors import ConfigError, StorageError
from cutlayer.server.names import is_plain_name

__all__ = ["Kept", "delete", "held_bytes", "kept_in"]

_STATE = re.compile(r"step-(\d+)(?:~\d+)?")


@dataclass(frozen=True)
class Kept:
    """One saved state."""

    tenant: str
    run: str
    step: int
    size_bytes: int
    saved_s: float
    folder: Path


def kept_in(root: Path, tenant: str = "*", run: str = "*") -> list[Kept]:
    """Return the saved states, of all tenants and runs or of some."""
    found = []
    for folder in root.glob(f"{tenant}/{run}/step-*"):
        name, home = _STATE.fullmatch(folder.name), folder.parent
        if name and is_plain_name(home.parent.name) and folder.is_dir():
            found.append(
                Kept(
                    home.parent.name,
                    home.name,
                    int(name[1]),
                    _size_bytes(folder),
                    folder.stat().st_mtime,
                    folder,
                )
            )
    return sorted(found, key=lambda kept: (kept.tenant, kept.run, kept.step))


def held_bytes(root: Path, tenant: str) -> int:
    """Return the bytes of all of a tenant's saved states."""
    return sum(kept.size_bytes for kept in kept_in(root, tenant))


def delete(root: Path, tenant: str, run: str, step: int | None = None) -> list[Kept]:
    """Delete the saved states of a run, or the one of a step, and return what they were.

    Raises:
        ConfigError: If there is none.
        StorageError: If one cannot be deleted.
    """
    if not (is_plain_name(tenant) and is_plain_name(run)):
        raise ConfigError(f"'{tenant}/{run}' names no run: write TENANT/RUN")
    found = [kept for kept in kept_in(root, tenant, run) if step in (None, kept.step)]
    if not found:
        which = "no saved state" if step is None else f"no saved state of step {step}"
        raise ConfigError(f"there is {which} of {tenant}/{run}: see 'cutlayer checkpoints list'")
    for kept in found:
        # Away under a name that nobody reads, so that half of a state never stands under its own.
        aside = kept.folder.with_name(f".{kept.folder.name}.gone")
        try:
            kept.folder.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            raise StorageError(
                f"step {kept.step} of {tenant}/{run} cannot be deleted ({error.strerror}): check "
                "the folder's owner"
            ) from error
    return found


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
