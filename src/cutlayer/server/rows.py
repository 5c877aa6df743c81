"""Rows that clients send once: kept on the disk for later epochs, under each client's own key.

    <root>/<tenant>/<run>/rows/<name>/<ab>/<abcdef…>    one row, sealed; its mtime is when it came

The key comes with each stream and is in memory only, so a disk that is taken away has nothing to
read. A row may be gone at any moment (age, quota, an operator, a crash before it was written): the
client is told which and sends it again. So nothing is synced, nothing is journaled, and a row that
cannot be kept is no error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, ProtocolError, Refused
from cutlayer.server.names import is_plain_name
from cutlayer.split.entry import CARRIED
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Message
from cutlayer.wire.rows import (
    ID_BYTES,
    KEY_BYTES,
    MAX_ROWS,
    SMASHED,
    opened,
    path_of,
    records_in,
    rows_that_came,
    sealed,
    unpacked,
)
from cutlayer.wire.statics import Statics
from cutlayer.wire.tensors import decoded_bytes, read_tensors, refuse_not_finite

__all__ = ["RowStore", "RunRows", "check_rows", "drop_rows", "row_bytes"]

log = logging.getLogger(__name__)

_FOLDER = "rows"
_NAME = re.compile("[0-9a-f]{32}")
_MAX_SWEEP_EVERY_S = 3600.0
_MAX_WAITING_BYTES = 256 << 20


class RowStore:
    """The rows of all tenants."""

    def __init__(
        self, root: Path, ttl_s: float, quota_of: Callable[[str], int] = lambda _tenant: 0
    ) -> None:
        """Open the store and drop what is too old.

        Args:
            root: The folder of the tenants' states.
            ttl_s: Seconds after which a row is deleted; 0 keeps none and deletes what is there.
            quota_of: How many bytes a tenant may keep, 0 for no limit.
        """
        self.ttl_s = ttl_s
        self.quota_of = quota_of
        self._root = root
        self._held: dict[str, int] = {}
        self._waiting: dict[Path, tuple[bytes, bytes]] = {}
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._next_sweep_s = 0.0
        self.sweep_if_due()

    def of(self, tenant: str, run: str, name: str) -> RunRows | None:
        """Return a run's rows, `None` without a name; those under another name are dropped.

        Raises:
            Refused: If the name is none.
        """
        home = self._root / tenant / run / _FOLDER
        if name and not _NAME.fullmatch(name):
            raise Refused("the name of rows has 32 hexadecimal digits: update both sides")
        for other in home.glob("*"):
            if other.name != name:
                self._drop(other)
        return RunRows(self, tenant, home / name) if name else None

    def drop(self, tenant: str, run: str) -> None:
        """Delete all rows of a run, and wait until they are gone."""
        self._drop(self._root / tenant / run / _FOLDER).result()

    def _drop(self, folder: Path) -> Future[None]:
        # After what is still to be written there; who calls may be the trunk's thread: do not wait.
        return self._writer.submit(self._delete, folder)

    def _delete(self, folder: Path) -> None:
        tenant = folder.relative_to(self._root).parts[0]
        size = _size_of(folder)
        shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            if tenant in self._held:
                self._held[tenant] -= size

    def sweep_if_due(self) -> None:
        """Delete rows that are too old, every fiftieth of their time; count what is left."""
        now_s = time.monotonic()
        if now_s < self._next_sweep_s:
            return
        self._next_sweep_s = now_s + min(max(self.ttl_s / 50, 1.0), _MAX_SWEEP_EVERY_S)
        held: dict[str, int] = {}
        for path in (path for home in _homes(self._root) for path in _files(home)):
            with contextlib.suppress(OSError):
                if self.is_too_old(path):
                    path.unlink()
                else:
                    tenant = path.relative_to(self._root).parts[0]
                    held[tenant] = held.get(tenant, 0) + path.stat().st_size
        with self._lock:
            self._held = held

    def is_too_old(self, path: Path) -> bool:
        """Say whether a row must not be used any more."""
        return time.time() - path.stat().st_mtime > self.ttl_s

    def close(self) -> None:
        """Write what is to be written."""
        self._writer.shutdown()

    def admit(self, tenant: str, path: Path, record: bytes, key: bytes) -> bool:
        """Take a record to be written, if there is room for it."""
        with self._lock:
            if path in self._waiting:
                return True
            quota, held = self.quota_of(tenant), self._held.get(tenant, 0)
            more = 0 if path.exists() else len(record)
            # A disk that is slower than the link must not fill the memory instead.
            too_many = self._waiting_bytes + len(record) > _MAX_WAITING_BYTES
            if too_many or (quota and held + more > quota):
                return False
            self._held[tenant] = held + more
            self._waiting_bytes += len(record)
            self._waiting[path] = record, key
            return True

    def write_later(self, path: Path, failed: Callable[[], None]) -> None:
        """Have an admitted record written by the store's own thread."""
        self._writer.submit(self._write, path, failed)

    def _write(self, path: Path, failed: Callable[[], None]) -> None:
        with self._lock:
            waiting = self._waiting.get(path)
        if waiting is None:
            return  # it came twice and is written already
        record, key = waiting
        aside = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            aside.write_bytes(sealed(key, record, name_of(path)))
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            log.warning("a row was not kept: %s", error.strerror)
            failed()
        finally:
            with self._lock:
                del self._waiting[path]
                self._waiting_bytes -= len(record)

    def record_waiting(self, path: Path) -> bytes | None:
        """Return a record that is not written yet."""
        with self._lock:
            waiting = self._waiting.get(path)
        return waiting[0] if waiting else None


class RunRows:
    """The rows of one run, for as long as its session is in memory.

    Attributes:
        key: Opens them; the client hands it over with each stream.
        not_kept: Rows that could not be written, of which the client has not been told.
    """

    def __init__(self, store: RowStore, tenant: str, home: Path) -> None:
        self.key = b""
        self.not_kept: list[bytes] = []
        self._read: dict[int, Message] = {}
        self._store = store
        self._tenant = tenant
        self._home = home

    def take_key(self, key: bytes) -> None:
        """Take the key that a stream has brought.

        Raises:
            ProtocolError: If it is none.
        """
        if len(key) != KEY_BYTES:
            raise ProtocolError(f"the key to rows has {KEY_BYTES} bytes and {len(key)} came")
        self.key = key

    def keep(self, row: bytes, record: bytes) -> None:
        """Keep a row's record, if there is room; else it is among `not_kept`."""
        path = path_of(self._home, row)
        if self.key and self._store.admit(self._tenant, path, record, self.key):
            self._store.write_later(path, lambda: self.not_kept.append(row))
        else:
            self.not_kept.append(row)

    def get(self, row: bytes) -> Message | None:
        """Return a row, `None` if it is not here, too old, or not what was written."""
        path = path_of(self._home, row)
        record = self._store.record_waiting(path)
        if record is not None:
            return unpacked(record)
        try:
            if not self.key or self._store.is_too_old(path):
                return None
            return opened(self.key, path.read_bytes(), name_of(path))
        except OSError:
            return None

    # ------------------------------------------------------------------ for a request

    def missing(self, head: pb.Head, max_bytes: int) -> pb.Missing | None:
        """Read the rows that a forward names and does not bring; return those that are not here.

        Args:
            head: The request.
            max_bytes: What the request's tensors and these rows may take once decoded; no more are
                read.
        """
        self._read.clear()
        named = head.forward.rows if head.WhichOneof("verb") == "forward" else ()
        if _are_no_rows(named):
            return None  # `check_rows` will say so
        lacking = sorted(set(range(len(named))) - rows_that_came(head))
        found: dict[int, Message | None] = {}
        max_bytes -= decoded_bytes(head)
        for number in lacking:
            found[number] = row = self.get(named[number])
            max_bytes -= decoded_bytes(row.head) if row is not None else 0
            if max_bytes < 0:
                return None  # `joined` will find too few
        gone = [named[number] for number, row in found.items() if row is None]
        if gone:
            return pb.Missing(rows=gone, all=next(_files(self._home), None) is None)
        self._read = {number: row for number, row in found.items() if row is not None}
        return None

    def joined(
        self,
        head: pb.Head,
        tensors: dict[str, Tensor],
        statics: Mapping[str, Statics],
        device: torch.device,
    ) -> dict[str, Tensor]:
        """Return the tensors of a forward as if all its rows had come in one piece.

        Those that came are checked before (`check_rows`); tensors of another verb stay as they are.

        Args:
            head: The request.
            tensors: What came with it.
            statics: What its codecs know.
            device: Where what came was decoded, and rows that were kept are.

        Raises:
            ProtocolError: If rows do not fit together, or not what the head says of them.
        """
        if not head.HasField("forward"):
            return tensors
        asked = head.forward
        rows: list[dict[str, Tensor]] = [{} for _ in asked.rows]
        whole = {}
        for name, tensor in tensors.items():
            kind, _, number = name.partition("/")
            if number:
                rows[int(number)][kind] = tensor
            else:
                whole[name] = tensor
        for place, message in self._read.items():
            rows[place] = read_tensors(message, statics=statics, device=device)
        self._read = {}
        first = {name: (t.shape, t.dtype) for name, t in rows[0].items()}
        for row in rows:
            smashed_1TD = row.get(SMASHED, torch.empty(0))
            fits = smashed_1TD.dim() == 3 and smashed_1TD.shape[:2] == (1, asked.row_tokens)
            if not fits or {name: (t.shape, t.dtype) for name, t in row.items()} != first:
                raise ProtocolError(
                    f"the rows of a batch have not one shape each of {asked.row_tokens} tokens, or "
                    "are more than a message may have: send smaller batches or more chunks"
                )
        return whole | {name: torch.cat([row[name] for row in rows]) for name in first}

    def keep_those_in(self, message: Message) -> None:
        """Keep the rows that came with a message; who calls has checked them."""
        head = message.head
        named = head.forward.rows if head.HasField("forward") else head.keep_rows.rows
        parts, offset = [], 0
        for meta in head.tensors:
            parts.append(message.body[offset : offset + meta.nbytes])
            offset += meta.nbytes
        for number, record in records_in(head, parts).items():
            self.keep(named[number], record)

    def take_not_kept(self) -> list[bytes]:
        """Return the rows that could not be kept since this was asked before."""
        told = []
        while self.not_kept:
            told.append(self.not_kept.pop())
        return told


def check_rows(head: pb.Head, tensors: dict[str, Tensor], width: int) -> None:
    """Look at the rows that a request names or brings ahead.

    Raises:
        ProtocolError: If there are too many, an id is none, or what came is no row.
        NotFinite: If a value is no number.
    """
    verb = head.WhichOneof("verb")
    named = head.forward.rows if verb == "forward" else head.keep_rows.rows
    tokens = head.forward.row_tokens if verb == "forward" else head.keep_rows.row_tokens
    if _are_no_rows(named):
        raise ProtocolError(
            f"{len(named)} rows were named: at most {MAX_ROWS}, by {ID_BYTES} bytes"
        )
    for name, tensor in tensors.items():
        kind, _, number = name.partition("/")
        if not number and verb == "forward":
            continue
        if not number.isdecimal() or int(number) >= len(named) or kind not in (SMASHED, *CARRIED):
            raise ProtocolError(f"tensor '{name}' belongs to none of {len(named)} rows")
        if kind == SMASHED and tensor.shape != (1, tokens, width):
            raise ProtocolError(
                f"a row of shape {tuple(tensor.shape)} came: (1, {tokens}, {width}) is expected"
            )
        refuse_not_finite(tensor, "the smashed activations of a row", "it was not kept")


def _are_no_rows(named: Sequence[bytes]) -> bool:
    return len(named) > MAX_ROWS or any(len(row) != ID_BYTES for row in named)


def name_of(path: Path) -> bytes:
    """Return what binds a row to its place: tenant, run, name and id."""
    return "/".join(path.parts[-6:]).encode()


def row_bytes(root: Path, tenant: str = "*", run: str = "*") -> dict[tuple[str, str], int]:
    """Return the bytes of kept rows by tenant and run, for an operator."""
    found = {}
    for home in _homes(root, tenant, run):
        name, holder = home.parent.name, home.parent.parent.name
        if is_plain_name(name) and is_plain_name(holder) and (size := _size_of(home)):
            found[holder, name] = size
    return found


def drop_rows(root: Path, tenant: str, run: str) -> int:
    """Delete the rows of a run from a server's folder; return how many bytes they were.

    Raises:
        ConfigError: If the names are none.
    """
    if not (is_plain_name(tenant) and is_plain_name(run)):
        raise ConfigError(f"'{tenant}/{run}' names no run: write TENANT/RUN")
    home = root / tenant / run / _FOLDER
    size = _size_of(home)
    shutil.rmtree(home, ignore_errors=True)
    return size


def _homes(root: Path, tenant: str = "*", run: str = "*") -> list[Path]:
    with contextlib.suppress(OSError):  # a run that is being deleted at this moment
        return sorted(root.glob(f"{tenant}/{run}/{_FOLDER}"))
    return []


def _files(folder: Path) -> Iterator[Path]:
    for parent, _folders, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _size_of(folder: Path) -> int:
    size = 0
    for path in _files(folder):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size
