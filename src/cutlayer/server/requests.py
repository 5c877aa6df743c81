"""What a request may hold, and what its client is told of a failure."""

# Shapes:  B batch   T tokens   D model width   N positions whose output is wanted

from __future__ import annotations

import math

import torch
from torch import Tensor

from cutlayer.errors import CutlayerError, ProtocolError, Refused
from cutlayer.server.optimizers import Group
from cutlayer.split.entry import CARRIED
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.tensors import refuse_not_finite

__all__ = ["checked_forward", "checked_groups", "failed"]


def checked_forward(
    asked: pb.Forward, tensors: dict[str, Tensor], *, width: int
) -> tuple[Tensor, Tensor | None]:
    """Take the activations, and the positions whose output is wanted, out of `tensors`.

    What is left there is what the trunk's layers are called with.

    Raises:
        ProtocolError: If there is anything that no forward has.
        NotFinite: If an activation is NaN or infinite.
    """
    smashed_BTD = tensors.pop("smashed", torch.empty(0))
    if smashed_BTD.dim() != 3 or smashed_BTD.shape[2] != width or 0 in smashed_BTD.shape:
        raise ProtocolError(
            f"activations of shape {tuple(smashed_BTD.shape)} came: (batch, tokens, {width}) is "
            "expected"
        )
    wanted_N = _positions(tensors.pop("wanted", None), smashed_BTD)
    if not set(tensors) <= set(CARRIED) or any(0 in t.shape for t in tensors.values()):
        raise ProtocolError(f"tensors {sorted(tensors)} came with the activations")
    refuse_not_finite(smashed_BTD, "the smashed activations", "nothing was computed")
    if asked.autocast and asked.autocast not in ("bfloat16", "float16"):
        raise ProtocolError(f"autocast to '{asked.autocast}' is unknown")
    return smashed_BTD, wanted_N


def _positions(wanted_N: Tensor | None, smashed_BTD: Tensor) -> Tensor | None:
    if wanted_N is None:
        return None
    positions = smashed_BTD.shape[0] * smashed_BTD.shape[1]
    if wanted_N.dim() != 1 or wanted_N.dtype != torch.int64 or not 0 < len(wanted_N) <= positions:
        raise ProtocolError(
            f"positions of shape {tuple(wanted_N.shape)} and {wanted_N.dtype} came: at most "
            f"{positions} int64 in a row are expected"
        )
    if int(wanted_N.min()) < 0 or int(wanted_N.max()) >= positions:
        raise ProtocolError(f"a position was asked for that is none of the batch's {positions}")
    return wanted_N


def checked_groups(asked: pb.OptimStep) -> list[Group]:
    """Return the parameter groups of an optimizer's step.

    Raises:
        ProtocolError: If a number is NaN or infinite.
    """
    groups = [
        Group(dict(g.numbers), dict(g.flags), tuple(g.betas), tuple(g.names)) for g in asked.groups
    ]
    numbers = [asked.clip_factor, *(n for g in groups for n in (*g.numbers.values(), *g.betas))]
    if not all(map(math.isfinite, numbers)):
        raise ProtocolError("a number of the optimizer step is not finite")
    return groups


def failed(sequence: int, error: Exception) -> pb.Head:
    """Return the reply that tells of an error; of one that is not ours, only its kind."""
    code, words = (error.code, str(error)) if isinstance(error, CutlayerError) else _told_of(error)
    return pb.Head(sequence=sequence, failure=pb.Failure(code=code, message=words))


def _told_of(error: Exception) -> tuple[str, str]:
    # torch tells of a lack of memory on a CPU with a RuntimeError like any other.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate" in str(error):
        return Refused.code, (
            "the server has not the memory for this batch: send smaller batches or more chunks"
        )
    return CutlayerError.code, (
        f"the trunk failed on this request ({type(error).__name__}): the server's log has the cause"
    )
