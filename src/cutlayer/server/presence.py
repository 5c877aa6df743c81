"""One server for a folder, and how an operator's command finds it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.errors import ConfigError, StorageError

__all__ = ["Presence", "server_in"]

_FILE = "server.json"


class Presence:
    """Held by a running server: a locked file that says where it is."""

    def __init__(self, state_dir: Path) -> None:
        """Take the folder.

        Raises:
            ConfigError: If another server has it.
            StorageError: If it cannot be written.
        """
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(state_dir / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"--state_dir '{state_dir}' cannot be written ({error.strerror}): check its owner"
            ) from error
        self._file = os.fdopen(handle, "r+")
        # The server before this one may be on its way out, or an operator's command may look.
        for _ in range(20):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
        self._file.close()
        raise ConfigError(
            f"another server uses --state_dir '{state_dir}': stop it, or name another folder"
        )

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Write down where the server is."""
        self._file.seek(0)
        self._file.truncate()
        json.dump({"pid": os.getpid(), "started_s": time.time(), **facts}, self._file)
        self._file.flush()

    def close(self) -> None:
        """Let the folder go."""
        self._file.close()


def server_in(state_dir: Path) -> dict[str, Any] | None:
    """Return what the server of a folder said of itself, `None` if none runs."""
    try:
        with (state_dir / _FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return dict(json.loads(file.read() or "{}"))
    except (OSError, ValueError):
        pass
    return None
