"""What an audit has found so far, so that one that is interrupted can go on.

Each part is a file of its own, written aside and renamed, and names the digest of what was audited:
what was found of other data, other weights or other settings is not taken over. The files hold
token ids, as a transcript does: their owner alone may read them, and they go when the audit is
whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer.errors import StorageError

__all__ = ["Unfinished", "digest_of"]


class Unfinished:
    """The parts of an audit that are done."""

    def __init__(self, folder: Path, digest: str, tell: Callable[[str], None]) -> None:
        """Look into a folder, which need not exist.

        Args:
            folder: Where the parts are.
            digest: Of all that the findings depend on.
            tell: Is told what is taken over.
        """
        self._folder = folder
        self._digest = digest
        self._tell = tell

    def kept(self, name: str, find: Callable[[], Any]) -> Any:
        """Return a part: what stands there, or what `find` finds, which is then kept.

        Raises:
            StorageError: If it cannot be written.
        """
        path = self._folder / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            there = json.loads(path.read_text())
            if there["digest"] == self._digest:
                self._tell(f"{name} was done before this audit was interrupted")
                return there["found"]
        found = find()
        aside = path.with_suffix(".part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            aside.unlink(missing_ok=True)
            handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                json.dump({"digest": self._digest, "found": found}, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            raise StorageError(
                f"'{path}' could not be written ({error.strerror}): free space or name another "
                "--output"
            ) from error
        return found


def digest_of(facts: Mapping[str, Any], tensors: Iterable[Tensor | None]) -> str:
    """Return a digest of some facts and tensors."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in tensors:
        digest.update(b"-" if tensor is None else str((tensor.dtype, tensor.shape)).encode())
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
