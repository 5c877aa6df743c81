"""What a remote trunk asks of its server, in the words of the protocol."""

# Shapes:  B batch   T tokens   D model width   N positions whose output is wanted

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cutlayer.client.calibration import Calibration, Watched
from cutlayer.client.connection import Connection
from cutlayer.client.remote_trunk import Question
from cutlayer.client.replies import Named, Pending
from cutlayer.client.send_once import Batch
from cutlayer.errors import ProtocolError
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.codecs import CODECS, codecs_of, in_force, prepare, round_trip
from cutlayer.wire.rows import SMASHED
from cutlayer.wire.statics import Statics, statics_as_tensors
from cutlayer.wire.tensors import dtype_name

__all__ = ["TrunkLink"]


class TrunkLink:
    """A session, as a remote trunk uses it.

    What is asked leaves at once; nothing waits but a commit whose norms are not known yet.
    """

    def __init__(self, connection: Connection, *, codecs: str | Mapping[str, str] = "raw") -> None:
        """Ask through a session.

        Args:
            connection: The session.
            codecs: How tensors are written, as the handshake agreed: one name, or by departure.
        """
        self._connection = connection
        self._codecs = codecs_of(codecs)
        prepare(self._codecs.values())
        self._calibration = Calibration(self._codecs)
        self._wanted: dict[int, Tensor] = {}  # by forward

    def forward(self, smashed_BTD: Tensor, question: Question) -> tuple[int, Named | Watched]:
        """Send activations; return the request's number and the trunk's output to come."""
        if question.rows is None:
            self.calibrate_if_due()  # else before the rows got their ids
        head = pb.Head(
            forward=pb.Forward(
                training=question.training,
                keep_graph=question.keep_graph,
                wants_gradient=question.wants_gradient,
                seed=question.seed,
                autocast=dtype_name(question.autocast) if question.autocast else "",
                adapter_disabled=question.adapter_disabled,
                cache=question.cache,
                past_tokens=question.past_tokens,
                cache_rows=question.cache_rows,
            )
        )
        tensors, wanted_N = {"smashed": smashed_BTD, **question.carried}, question.wanted_N
        if question.rows is not None:
            head.forward.rows.extend(question.rows.ids)
            head.forward.row_tokens = question.rows.tokens
            tensors = question.rows.tensors(question.carried)
        if wanted_N is not None:
            tensors["wanted"] = wanted_N
        codecs = self._codecs_of(tensors)
        pending = self._connection.request(head, tensors, codecs=codecs)
        output = Named(pending, "trunk_out")
        if wanted_N is not None:
            if question.keep_graph:
                self._wanted[pending.sequence] = wanted_N
            placed = functools.partial(_placed, wanted_N=wanted_N, shape=smashed_BTD.shape)
            output = Named(pending, "trunk_out", placed)
        # A token that goes on from a cache begins no text, and looks as if it did.
        if self._calibration.learns and not question.past_tokens:
            return pending.sequence, self._calibration.watched(smashed_BTD, question, output)
        return pending.sequence, output

    def _statics(self, name: str) -> Statics | None:
        return self._connection.statics.get(name)

    def calibrate_if_due(self) -> None:
        """Send what was learnt of a direction's activations, once; it is used from then on."""
        statics = self._calibration.finished()
        if statics:
            self.calibrate(statics)

    def calibrate(self, statics: Mapping[str, Statics]) -> None:
        """Send statics, which are used from then on, also for rows that are sent once."""
        for name in statics:
            self._calibration.known(name)
        if self._connection.once is not None and SMASHED in statics:
            self._connection.once.learnt(statics[SMASHED])
        tensors = statics_as_tensors(statics)
        self._connection.request(pb.Head(calibrate=pb.Calibrate()), tensors, unattended=True)
        self._connection.statics = {**self._connection.statics, **statics}

    def as_it_arrives(self, name: str, tensor: Tensor, forward: int) -> Tensor:
        """Return what leaves for a forward as the server will have it: `smashed` or `gradient`."""
        if name == "gradient":
            wanted_N = self._wanted.get(forward)
            leaving = tensor if wanted_N is None else _at(tensor, wanted_N)
            arrived = round_trip(self._codecs["gradients_up"], leaving)
            if wanted_N is None:
                return arrived
            return _placed(arrived, wanted_N=wanted_N, shape=tensor.shape)
        statics = self._statics(name)
        codec = in_force(self._codecs["activations_up"], statics)
        return round_trip(codec, tensor, statics if CODECS[codec].learns else None)

    def _codecs_of(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        up = self._codecs["activations_up"]
        codecs = dict.fromkeys(tensors, "int32")
        for name in tensors:
            if name.partition("/")[0] == SMASHED:
                codecs[name] = in_force(up, self._statics(SMASHED))
        return codecs

    def keep_rows(self, rows: Batch, carried: Mapping[str, Tensor]) -> Pending:
        """Send rows ahead of the forward that will name them; return the reply to come."""
        head = pb.Head(keep_rows=pb.KeepRows(rows=rows.ids, row_tokens=rows.tokens))
        tensors = {n: t for n, t in rows.tensors(carried).items() if "/" in n}
        pending = self._connection.request(head, tensors, codecs=self._codecs_of(tensors))
        self._calibration.rows_left(rows, carried)
        return pending

    def backward(
        self, forward: int, grad_BTD: Tensor, *, hold: int = 0, wants_norms: bool = True
    ) -> Named:
        """Send the gradient of a forward's output; return the activations' gradient to come."""
        wanted_N = self._wanted.pop(forward, None)
        if wanted_N is not None:
            grad_BTD = _at(grad_BTD, wanted_N)
        asked = pb.Backward(forward_sequence=forward, hold=hold, norms=wants_norms)
        head, tensors = pb.Head(backward=asked), {"gradient": grad_BTD}
        pending = self._connection.request(
            head, tensors, codecs={"gradient": self._codecs["gradients_up"]}
        )
        return Named(pending, "gradient")

    def commit(self, hold: int, factor: float, *, norms_are_of: int) -> None:
        """Have the held gradients, times a factor, added to the accumulated ones.

        The norms that came with the last backward under `hold` are true of this commit if it is
        by factor 1 and nothing has touched the gradients since; else it is waited for.
        """
        known = factor == 1.0 and norms_are_of == self.gradient_changes()
        head = pb.Head(commit=pb.Commit(hold=hold, factor=factor))
        pending = self._connection.request(head, unattended=known)
        if not known:
            self._connection.norms = pending.wait()["norms"]

    def gradient_changes(self) -> int:
        """Count the requests so far that change the trunk's gradients."""
        return self._connection.gradient_changes()

    def wait_any(self, answers: Sequence[Any]) -> None:
        """Wait until one of these has arrived, for as long as bytes move."""
        self._connection.wait_any([answer.pending for answer in answers])

    # The collector may call these at any moment, within a request too: they take no lock.

    def release(self, hold: int) -> None:
        """Say that held gradients will not be committed."""
        self._connection.tell(pb.Head(release=pb.Release(hold=hold)))

    def discard(self, forward: int) -> None:
        """Say that a forward will have no backward."""
        self._wanted.pop(forward, None)
        self._connection.tell(pb.Head(discard=pb.Discard(forward_sequence=forward)))

    def drop_cache(self, cache: int) -> None:
        """Say that a KV cache is not needed any more."""
        self._connection.tell(pb.Head(drop_cache=pb.DropCache(cache=cache)))


def _at(grad_BTD: Tensor, wanted_N: Tensor) -> Tensor:
    """Return the gradient at the positions whose output was wanted, (1, N, D)."""
    return grad_BTD.flatten(0, 1)[wanted_N.to(grad_BTD.device)][None]


def _placed(out_1ND: Tensor, *, wanted_N: Tensor, shape: torch.Size) -> Tensor:
    """Return the output at its positions, and zero elsewhere.

    Raises:
        ProtocolError: If it is not for these positions.
    """
    if out_1ND.shape != (1, len(wanted_N), shape[-1]):
        raise ProtocolError(
            f"an output of shape {tuple(out_1ND.shape)} came for {len(wanted_N)} positions"
        )
    out_BTD = out_1ND.new_zeros(shape)
    # The positions lie where the labels do.
    out_BTD.flatten(0, 1)[wanted_N.to(out_BTD.device)] = out_1ND[0]
    return out_BTD
