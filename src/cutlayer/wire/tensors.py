"""Turn tensors into the body of a message and back. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from cutlayer.errors import NotFinite, ProtocolError
from cutlayer.wire.codecs import CODECS, Codec
from cutlayer.wire.cutlayer_pb2 import Head, TensorMeta
from cutlayer.wire.frames import Message
from cutlayer.wire.statics import Statics

__all__ = [
    "DTYPES",
    "MAX_DECODED_BYTES",
    "attach_tensors",
    "bytes_of",
    "decoded_bytes",
    "dtype_name",
    "read_tensors",
    "refuse_not_finite",
]

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_DIMS = 4
_CPU = torch.device("cpu")
# Elsewhere a dtype may be lacking. On "meta" nothing has a value, and who asks for one fails.
_DECODE = ("cuda", "meta")

MAX_DECODED_BYTES = 1 << 32
"""What the tensors of one message may take in memory, unless the receiver says less."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which a dtype crosses the wire.

    Raises:
        ProtocolError: If the dtype has none.
    """
    if dtype not in _NAMES:
        raise ProtocolError(f"tensors of {dtype} cannot be sent: one of {', '.join(DTYPES)}")
    return _NAMES[dtype]


def decoded_bytes(head: Head) -> int:
    """Return the bytes that the tensors of a message take once decoded, if they can be at all."""
    known = [meta for meta in head.tensors if meta.dtype in DTYPES]
    return sum(prod(meta.shape) * DTYPES[meta.dtype].itemsize for meta in known)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of a tensor's bytes; only a tensor elsewhere or with gaps is copied."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def attach_tensors(
    head: Head,
    tensors: Mapping[str, Tensor],
    *,
    codecs: Mapping[str, str] | None = None,
    statics: Mapping[str, Statics] | None = None,
) -> list[memoryview]:
    """Describe the tensors in the head and return the parts of the body.

    Args:
        head: The head, to which the metas are added.
        tensors: What to send, by name.
        codecs: The codec of each tensor by name; `raw` where none is named.
        statics: What codecs know of a tensor, by name; a row's `name/3` is looked up as `name`.
    """
    parts = []
    for name, tensor in tensors.items():
        codec = (codecs or {}).get(name, "raw")
        known = (statics or {}).get(_kind_of(name)) if CODECS[codec].learns else None
        payload = bytes_of(CODECS[codec].encode(tensor.detach(), known))
        head.tensors.append(
            TensorMeta(
                name=name,
                dtype=dtype_name(tensor.dtype),
                shape=list(tensor.shape),
                codec=codec,
                nbytes=len(payload),
                centred=known is not None,
            )
        )
        parts.append(payload)
    return parts


def read_tensors(
    message: Message,
    *,
    statics: Mapping[str, Statics] | None = None,
    max_bytes: int = MAX_DECODED_BYTES,
    device: torch.device = _CPU,
) -> dict[str, Tensor]:
    """Return the tensors of a message by name; they share the memory of its body where they can.

    Args:
        message: The message, whole.
        statics: What codecs know of a tensor, by name.
        max_bytes: How much memory the tensors may take once they are decoded.
        device: Where to decode what is not raw, if it can be done there; that then stays there, in
            the order of the device's current stream. All else stays on the CPU.

    Raises:
        ProtocolError: If a dtype or codec is unknown, a name comes twice, the bytes are not what
            shape, dtype and codec ask for, or they would become more than `max_bytes`.
    """
    tensors: dict[str, Tensor] = {}
    offset = decoded_bytes = 0
    for meta in message.head.tensors:
        if meta.dtype not in DTYPES or meta.codec not in CODECS or meta.name in tensors:
            raise ProtocolError(
                f"tensor '{meta.name}' of dtype '{meta.dtype}' and codec '{meta.codec}' "
                "comes twice or is of an unknown kind"
            )
        codec, dtype, shape = CODECS[meta.codec], DTYPES[meta.dtype], tuple(meta.shape)
        known = _known(meta, codec, statics or {})
        if len(shape) > _MAX_DIMS or codec.stored_bytes(shape, dtype, known) != meta.nbytes:
            raise ProtocolError(
                f"tensor '{meta.name}' of shape {shape} and dtype {meta.dtype} in codec "
                f"{meta.codec} cannot have {meta.nbytes} bytes"
            )
        # A packed tensor is up to 32 times its bytes: what was announced is not what it takes.
        decoded_bytes += prod(shape) * dtype.itemsize
        if decoded_bytes > max_bytes:
            raise ProtocolError(
                f"message {message.head.sequence} would take {decoded_bytes} bytes once decoded: "
                f"the limit is {max_bytes}; send smaller batches or more chunks"
            )
        part = message.body[offset : offset + meta.nbytes]
        offset += meta.nbytes
        stored = (
            torch.frombuffer(part, dtype=torch.uint8)
            if len(part)
            else torch.empty(0, dtype=torch.uint8)
        )
        if meta.codec != "raw" and dtype.is_floating_point:
            stored = _moved(stored, device)
        tensors[meta.name] = codec.decode(stored, shape, dtype, known)
    return tensors


def _moved(stored: Tensor, device: torch.device) -> Tensor:
    """Return bytes where they are decoded: a fraction of what the tensor takes is copied."""
    if device.type not in _DECODE:
        return stored
    # Torch keeps pinned memory until a copy from it is done, so nobody need wait for that.
    stored = stored.pin_memory() if device.type == "cuda" else stored
    return stored.to(device, non_blocking=True)


def _known(meta: TensorMeta, codec: Codec, statics: Mapping[str, Statics]) -> Statics | None:
    """Return the statics that a tensor was encoded with, `None` if with none."""
    if not meta.centred and codec.learns != "basis":
        return None
    known = statics.get(_kind_of(meta.name))
    fits = known is not None and list(meta.shape[-1:]) == [known.width]
    if not codec.learns or not fits or (codec.learns == "basis" and known.bits_K is None):  # type: ignore[union-attr]
        raise ProtocolError(
            f"tensor '{meta.name}' in codec {meta.codec} was written with statics that are not "
            "held here"
        )
    return known


def _kind_of(name: str) -> str:
    return name.partition("/")[0]


def refuse_not_finite(tensor: Tensor, what: str, hint: str) -> None:
    """Raise unless every value is a number.

    Raises:
        NotFinite: With what it is, how many values are not finite, and what to do.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NotFinite(
            f"{what} has {bad} of {tensor.numel()} values that are NaN or infinite: {hint}"
        )
