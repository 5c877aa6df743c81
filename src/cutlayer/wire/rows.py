"""Rows that are sent once: what is kept of each, and how it is sealed. Knows bytes, no tensors.

A row is one sample of a batch as the trunk needs it: the tensors `smashed/i`, `attention_mask/i`
and `position_ids/i` of a message, each as it was encoded. Its record is a message of its own with
plain names, and lies on a disk, at the server and at the client, sealed by AES-GCM. A record that
is torn, of another key, or put under another name does not open.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from cutlayer.errors import ConfigError
from cutlayer.wire.cutlayer_pb2 import Head
from cutlayer.wire.frames import Message

__all__ = [
    "ID_BYTES",
    "KEY_BYTES",
    "MAX_ROWS",
    "SMASHED",
    "add_row",
    "opened",
    "path_of",
    "record_of",
    "records_in",
    "rows_that_came",
    "sealed",
    "unpacked",
]

ID_BYTES = KEY_BYTES = 32
MAX_ROWS = 4096
"""Rows of one message."""
SMASHED = "smashed"
_NONCE_BYTES = 12
_LENGTH = struct.Struct("<I")


def rows_that_came(head: Head) -> set[int]:
    """Return the numbers of the rows whose activations are in a message."""
    split = [meta.name.partition("/") for meta in head.tensors]
    return {int(number) for name, _, number in split if name == SMASHED and number.isdecimal()}


def records_in(head: Head, parts: Sequence[memoryview]) -> dict[int, bytes]:
    """Return the record of each row that is in a message.

    Args:
        head: The message's head.
        parts: The bytes of each of its tensors, in their order.
    """
    heads: dict[int, Head] = {}
    bodies: dict[int, list[memoryview]] = {}
    for meta, part in zip(head.tensors, parts, strict=True):
        name, _, number = meta.name.partition("/")
        if not number.isdecimal():
            continue
        kept = heads.setdefault(int(number), Head()).tensors.add()
        kept.CopyFrom(meta)
        kept.name = name
        bodies.setdefault(int(number), []).append(part)
    return {n: record_of(kept, bodies[n]) for n, kept in heads.items()}


def record_of(head: Head, parts: Sequence[memoryview]) -> bytes:
    """Return a message as a record."""
    packed = head.SerializeToString()
    return b"".join([_LENGTH.pack(len(packed)), packed, *parts])


def unpacked(record: bytes) -> Message:
    """Return a record as a message."""
    (length,) = _LENGTH.unpack_from(record)
    body = memoryview(bytearray(record[_LENGTH.size + length :]))
    return Message(Head.FromString(record[_LENGTH.size : _LENGTH.size + length]), body)


def add_row(head: Head, number: int, row: Message) -> list[memoryview]:
    """Put a row into a message under its number; return the parts to add to its body."""
    parts, offset = [], 0
    for meta in row.head.tensors:
        kept = head.tensors.add()
        kept.CopyFrom(meta)
        kept.name = f"{meta.name}/{number}"
        parts.append(row.body[offset : offset + meta.nbytes])
        offset += meta.nbytes
    return parts


def path_of(home: Path, row: bytes) -> Path:
    """Return the file of a row, in one of 256 folders."""
    return home / row.hex()[:2] / row.hex()


def sealed(key: bytes, record: bytes, name: bytes) -> bytes:
    """Return a record as it goes to a disk, bound to its name."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, record, name)


def opened(key: bytes, found: bytes, name: bytes) -> Message | None:
    """Return the row that a disk gave back, `None` if it is not what was sealed."""
    from cryptography.exceptions import InvalidTag

    try:
        record = _cipher(key).decrypt(found[:_NONCE_BYTES], found[_NONCE_BYTES:], name)
        return unpacked(record)
    except (InvalidTag, ValueError, struct.error, DecodeError):
        return None


def _cipher(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ConfigError(
            "to send rows once, both sides need the package cryptography: install "
            "'cutlayer[train]' here, 'cutlayer[server]' at the server"
        ) from error
    return AESGCM(key)
