"""Send once: the activations of a frozen bottom go up once a row, later epochs name them.

A row is what the trainer put into a batch: one sample or one pack, at its padded width. Its id is
an HMAC under a secret of this run over all that decides its activations, so that the server can
tell that a row came again and nothing else. Beside the secret lies a copy of what was sent of each
row, sealed; so the bottom never runs for a row again, and a row that the server has lost
(docs/decisions/0015) is sent again as it was. What the codec has learnt lies there too, for a
resumed run, and is among what decides an id: no row is ever read with other statics than its own.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import logging
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlayer.client.chunks import NOT_FOR_THE_BOTTOM
from cutlayer.errors import StorageError
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Message
from cutlayer.wire.rows import (
    SMASHED,
    add_row,
    opened,
    path_of,
    record_of,
    records_in,
    rows_that_came,
    sealed,
)
from cutlayer.wire.statics import Statics, statics_as_tensors, statics_of
from cutlayer.wire.tensors import attach_tensors, bytes_of, read_tensors

__all__ = ["Batch", "SendOnce"]

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """The rows of one forward.

    Attributes:
        ids: One a row.
        new: The numbers of those that the bottom must run for.
        tokens: How many each has.
        once: What was sent before.
        hidden_BTD: The activations of the new ones.
    """

    ids: list[bytes]
    new: list[int]
    tokens: int
    once: SendOnce
    hidden_BTD: Tensor | None = None

    def tensors(self, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is sent: the tensors of each new row, and what belongs to no row."""
        sent = {name: t for name, t in carried.items() if not self._in_rows(t)}
        for place, number in enumerate(self.new):
            assert self.hidden_BTD is not None
            sent[f"smashed/{number}"] = self.hidden_BTD[place : place + 1]
            for name, tensor in carried.items():
                if self._in_rows(tensor):
                    sent[f"{name}/{number}"] = tensor[number : number + 1]
        return sent

    def _in_rows(self, tensor: Tensor) -> bool:
        return tensor.dim() > 1 and len(tensor) == len(self.ids)

    def as_the_server_has_it(self) -> Tensor:
        """Return the activations of all rows, (B, T, D), as they were decoded at the server."""
        return torch.cat([self.once.row(row)["smashed"] for row in self.ids])

    @property
    def referenced(self) -> list[int]:
        """The numbers of the rows that the bottom did not run for: they were sent before."""
        return sorted(set(range(len(self.ids))) - set(self.new))


class SendOnce:
    """What this run has sent, and what the server is believed to hold of it.

    Attributes:
        name: Under which the server keeps the rows; it tells nothing.
        key: Opens them; handed over with each stream, never written down at the server.
        rows_sent: How many rows went up as activations.
        rows_named: How many went up as a reference.
        sent_bytes: Bytes of the activations, masks and positions of the former, encoded.
        statics: What the codec knows of the activations, as `smashed`, once it is learnt.
    """

    def __init__(self, folder: Path | None, *, ttl_s: float) -> None:
        """Begin, or go on where a run in this folder was interrupted.

        Args:
            folder: Where secret and copies are; without one, in a folder that goes with the
                process.
            ttl_s: Seconds for which the server keeps a row.

        Raises:
            StorageError: If the folder cannot be written.
        """
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="cutlayer-rows-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder, self._copies = folder, folder / "rows"
        try:
            self._copies.mkdir(parents=True, exist_ok=True, mode=0o700)
            secret = _secret_in(folder / "key")
        except OSError as error:
            raise StorageError(
                f"split_send_once cannot write to '{folder}' ({error.strerror}): name another "
                "output_dir or free space"
            ) from error
        derive = functools.partial(_hmac, secret)
        self.name, self.key = derive(b"name").hex()[:32], derive(b"rows")
        self._id_key = derive(b"ids")
        self._ttl_s = ttl_s
        self._has_told_of_disk = False
        self.statics: dict[str, Statics] = {}
        self.rows_sent = self.rows_named = self.sent_bytes = 0
        self._sent_s = {  # when each row went up that the server may hold
            bytes.fromhex(path.name): path.stat().st_mtime
            for path in self._copies.glob("*/*")
            if not path.name.startswith(".")
        }
        self._copied = set(self._sent_s)

    def bind(self, bottom: bytes) -> None:
        """Make all ids depend on what a row's activations follow from, the row itself apart."""
        self._id_key = hmac.digest(self._id_key, bottom, hashlib.sha256)

    def statics_of_an_earlier_run(self, width: int) -> dict[str, Statics]:
        """Return what was learnt before this run was interrupted, nothing if that is not here."""
        path, name = self._statics_file()
        try:
            found = opened(self.key, path.read_bytes(), name)
        except OSError:
            return {}
        return statics_of(read_tensors(found), width) if found is not None else {}

    def learnt(self, statics: Statics) -> None:
        """Keep what was learnt for a resumed run; the ids of all rows from now on depend on it."""
        path, name = self._statics_file()
        self.statics = {SMASHED: statics}
        head, tensors = pb.Head(), statics_as_tensors(self.statics)
        record = record_of(head, attach_tensors(head, tensors))
        try:
            aside = path.with_name(f".{path.name}")
            aside.write_bytes(sealed(self.key, record, name))
            aside.replace(path)
        except OSError as error:
            log.warning("a resumed run will send all rows again (%s)", error.strerror)
        self.bind(record)

    def _statics_file(self) -> tuple[Path, bytes]:
        """Return where statics are that were learnt of this bottom with this codec."""
        name = hmac.digest(self._id_key, b"statics", hashlib.sha256)
        return self.folder / f"statics-{name.hex()[:32]}", name

    # ------------------------------------------------------------------ before a forward

    def batch_of(self, given: Mapping[str, Any], rows: int, autocast: str) -> Batch:
        """Return the rows of a forward, by the arguments that it is called with.

        Args:
            given: The arguments.
            rows: How many rows.
            autocast: The dtype of autocast, empty without.
        """
        shared = hmac.new(self._id_key, autocast.encode(), hashlib.sha256)
        own = [shared] * rows
        for name in sorted(given):
            value = given[name]
            if name in NOT_FOR_THE_BOTTOM or not isinstance(value, Tensor):
                continue
            is_in_rows = value.dim() > 0 and len(value) == rows
            about = f"\0{name} {value.dtype} {tuple(value.shape[is_in_rows:])}\0".encode()
            if is_in_rows:
                own = [_with(mac, about, bytes_of(r)) for mac, r in zip(own, value, strict=True)]
            else:
                own = [_with(mac, about, bytes_of(value)) for mac in own]
        ids = [mac.digest() for mac in own]
        new = [number for number, row in enumerate(ids) if row not in self._copied]
        return Batch(ids, new, given["input_ids"].shape[1], self)

    def _is_held(self, row: bytes) -> bool:
        # A little earlier than the server, which counts from when the row came.
        return time.time() - self._sent_s.get(row, 0.0) < 0.95 * self._ttl_s

    def holds_all(self, batch: Batch) -> bool:
        """Say whether the server is believed to hold all rows of a batch."""
        return not batch.new and all(self._is_held(row) for row in batch.ids)

    def row(self, row: bytes) -> dict[str, Tensor]:
        """Return the tensors of a row that was sent.

        Raises:
            StorageError: If its copy is gone.
        """
        return read_tensors(self._copy_of(row), statics=self.statics)

    # ------------------------------------------------------------------ what leaves and comes back

    def leaving(self, head: pb.Head, parts: Sequence[memoryview]) -> None:
        """Keep a copy of each row that is about to leave."""
        named = _rows_of(head)
        self.rows_named += len(named) - len(rows_that_came(head))
        for number, record in records_in(head, parts).items():
            row = named[number]
            path = path_of(self._copies, row)
            try:
                path.parent.mkdir(exist_ok=True, mode=0o700)
                aside = path.with_name(f".{path.name}")
                aside.write_bytes(sealed(self.key, record, row))
                aside.replace(path)
                self._copied.add(row)
                self._sent_s[row] = time.time()
            except OSError as error:
                # Without a copy it could not be sent again: the next epoch begins anew with it.
                if not self._has_told_of_disk:
                    self._has_told_of_disk = True
                    log.warning("rows go up again in each epoch: no copy here (%s)", error.strerror)
            self.rows_sent += 1
            self.sent_bytes += len(record)

    def lost(self, told: pb.Missing) -> None:
        """Take note that the server does not hold these rows."""
        for row in list(self._sent_s) if told.all else told.rows:
            self._sent_s.pop(row, None)

    def not_kept(self, rows: Sequence[bytes]) -> None:
        """Take note that the server has not kept these rows."""
        for row in rows:
            self._sent_s.pop(row, None)

    def completed(
        self, head: pb.Head, parts: Sequence[memoryview]
    ) -> tuple[pb.Head, list[memoryview]]:
        """Return a request with all rows in it that the server does not hold.

        Raises:
            StorageError: If the copy of one is gone.
        """
        named, came = _rows_of(head), rows_that_came(head)
        lacking = [n for n, row in enumerate(named) if n not in came and not self._is_held(row)]
        if not lacking:
            return head, list(parts)
        whole, longer = pb.Head(), list(parts)
        whole.CopyFrom(head)
        for number in lacking:
            row = self._copy_of(named[number])
            longer += add_row(whole, number, row)
            self._sent_s[named[number]] = time.time()
            os.utime(path_of(self._copies, named[number]))
            self.rows_named -= 1
            self.rows_sent += 1
            self.sent_bytes += len(row.body)
        return whole, longer

    def _copy_of(self, row: bytes) -> Message:
        path = path_of(self._copies, row)
        try:
            found = opened(self.key, path.read_bytes(), row)
        except OSError:
            found = None
        if found is None:
            path.unlink(missing_ok=True)
            raise StorageError(
                f"the copy of a row that was sent is not in '{self.folder}' as it was written: "
                "start the run again with --resume, which sends it anew"
            )
        return found

    def counts(self) -> dict[str, int]:
        """Return how many rows went up, how many were named, and the bytes of the former."""
        return {"sent": self.rows_sent, "named": self.rows_named, "sent_bytes": self.sent_bytes}

    def forget(self) -> None:
        """Delete secret and copies: the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _secret_in(path: Path) -> bytes:
    with contextlib.suppress(FileExistsError):
        opened_file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.write(opened_file, secrets.token_bytes(32))
            os.fsync(opened_file)
        finally:
            os.close(opened_file)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise StorageError(f"'{path}' is no key of split_send_once: delete its folder")
    return secret


def _hmac(secret: bytes, purpose: bytes) -> bytes:
    return hmac.digest(secret, b"cutlayer send once 1: " + purpose, hashlib.sha256)


def _with(mac: hmac.HMAC, *parts: bytes | memoryview) -> hmac.HMAC:
    longer = mac.copy()
    for part in parts:
        longer.update(part)
    return longer


def _rows_of(head: pb.Head) -> Sequence[bytes]:
    verb = head.WhichOneof("verb")
    if verb == "forward":
        return head.forward.rows
    return head.keep_rows.rows if verb == "keep_rows" else ()
