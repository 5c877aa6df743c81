"""Which small requests of several tenants are done together, and how long one waits for another.

What is computed together is computed ahead of each request's own turn, in which it is then done
as ever: checked, admitted, counted, answered once. So nothing but the numbers' last bits depends
on company, and a batch that fails costs its time only: each of its requests is done alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from cutlayer.errors import CutlayerError
from cutlayer.server.fused_batch import Asked, Batch, CannotFuse, FusedBatches, Share
from cutlayer.server.fused_batch import backward_together as _backward_together
from cutlayer.server.requests import checked_forward
from cutlayer.server.session import Session
from cutlayer.server.watch import tokens_in
from cutlayer.server.worker import Joint
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Message
from cutlayer.wire.tensors import DTYPES, read_tensors, refuse_not_finite

__all__ = ["Fuser"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """A request that may be done together with others'."""

    session: Session
    message: Message
    is_current: Callable[[], bool]

    @property
    def is_next(self) -> bool:
        """Whether its turn will do it: a repeated or a lost one changes nothing."""
        head, session = self.message.head, self.session
        is_new = head.sequence > session.last_sequence
        return is_new and self.is_current() and not session.out_of_order(head)

    def tensors(self) -> dict[str, Tensor]:
        """Read its tensors."""
        session = self.session
        return read_tensors(
            self.message,
            statics=session.statics,
            max_bytes=session.limits.max_message_bytes,
            device=session.trunk.device,
        )

    def asked(self) -> Asked:
        """Return the forward that it asks for."""
        head, tensors = self.message.head.forward, self.tensors()
        smashed_BTD, wanted_N = checked_forward(head, tensors, width=self.session.width)
        return Asked(
            self.session.trunk,
            smashed_BTD,
            tensors,
            wants_gradient=head.wants_gradient,
            wanted_N=wanted_N,
            training=head.training,
            autocast=DTYPES[head.autocast] if head.autocast else None,
        )

    def gradient(self, share: Share) -> Tensor:
        """Return the gradient that it brings, if it is one of this output."""
        grad_BTD = self.tensors()["gradient"]
        refuse_not_finite(grad_BTD, "the gradient at the upper cut", "it goes alone")
        if (grad_BTD.shape, grad_BTD.dtype) != (share.out_BTD.shape, share.out_BTD.dtype):
            raise CutlayerError("the gradient is of another shape")
        return grad_BTD


class Fuser:
    """Compute small requests of several tenants as one batch, ahead of their turns."""

    def __init__(self, most_tokens: int, sessions: Callable[[], Collection[Session]]) -> None:
        """Fuse forwards of so many tokens at most.

        Args:
            most_tokens: Larger forwards have nothing to gain.
            sessions: Gives the open sessions.
        """
        self._most_tokens = most_tokens
        self._sessions = sessions
        self.fused: Counter[str] = Counter()
        """By tenant, how many requests were computed together with others'."""
        self._batches = FusedBatches()
        self._alone: set[Hashable] = set()

    def joint_of(
        self, session: Session, message: Message, is_current: Callable[[], bool]
    ) -> Joint | None:
        """Say with which others a request may be done; `None` if alone.

        Args:
            session: Whose it is.
            message: The request.
            is_current: Says whether its stream is still the session's.
        """
        head, tokens = message.head, tokens_in(message.head)
        key: Hashable = None
        if head.WhichOneof("verb") == "forward":
            key = _kind(session, head) if tokens <= self._most_tokens else None
        elif head.WhichOneof("verb") == "backward":
            kept = session.trunk.kept.get(head.backward.forward_sequence)
            if isinstance(kept, Share):
                key, tokens = kept.batch, kept.asked.smashed_BTD.shape[:2].numel()
        if key is None or key in self._alone or session.identifier in self._alone:
            return None
        return Joint(key, tokens, _Part(session, message, is_current))

    def awaited(self, joint: Joint) -> set[str]:
        """Return the tenants who may bring what can be done together with this."""
        if isinstance(joint.key, Batch):
            return {share.tenant for share in joint.key.shares}
        mine = joint.what.session.trunk.likeness
        return {
            session.tenant
            for session in self._sessions()
            if session.hang_up is not None and session.trunk.likeness == mine
        }

    @contextlib.contextmanager
    def ahead(self, joints: Sequence[Joint]) -> Iterator[list[float]]:
        """Compute some requests together; while open, their turns find it done.

        Yields:
            The seconds that each of them has taken of the trunk's time.
        """
        started_s = time.monotonic()
        parts = [joint.what for joint in joints if joint.what.is_next]
        failed = False
        try:
            if isinstance(joints[0].key, Batch):
                self._backwards(parts, joints[0].key)
            else:
                self._forwards(parts)
        except CannotFuse as error:
            log.info("requests of this kind are not fused: %s", error)
            self._alone.add(joints[0].key)
        except Exception as error:  # whoever's it is, it is told in that one's own turn
            log.warning("a batch of %d tenants failed: %s", len(parts), type(error).__name__)
            failed = True
        total, took_s = sum(joint.weight for joint in joints), time.monotonic() - started_s
        seconds = [took_s * joint.weight / total for joint in joints]
        for joint, mine_s in zip(joints, seconds, strict=True):
            joint.what.session.ahead_s = mine_s
        try:
            yield seconds
        finally:
            self._tidy_up(joints, failed=failed)

    def _forwards(self, parts: Sequence[_Part]) -> None:
        asked = {}
        for index, part in enumerate(parts):
            with contextlib.suppress(CutlayerError):  # it is refused in its turn
                asked[index] = part.asked()
        if len(asked) > 1:
            shares = self._batches.forward(list(asked.values()))
            for index, share in zip(asked, shares, strict=True):
                session, head = parts[index].session, parts[index].message.head
                share.tenant = session.tenant
                session.trunk.ahead[head.sequence] = share
            self.fused.update(share.tenant for share in shares)

    def _backwards(self, parts: Sequence[_Part], batch: Batch) -> None:
        gradients = {}
        for part in parts:
            number = part.message.head.backward.forward_sequence
            share = part.session.trunk.kept.get(number)
            with contextlib.suppress(CutlayerError, KeyError):  # it is refused in its turn
                if isinstance(share, Share) and share in batch.shares:
                    gradients[share] = part.gradient(share)
        if gradients and _backward_together(batch, gradients):
            self.fused.update(share.tenant for share in gradients if share.ready is not None)

    def _tidy_up(self, joints: Sequence[Joint], *, failed: bool) -> None:
        culprits = []
        for joint in joints:
            session, head = joint.what.session, joint.what.message.head
            session.ahead_s = 0.0
            session.trunk.ahead.clear()
            share = session.trunk.kept.get(head.backward.forward_sequence)
            if isinstance(share, Share):
                share.ready = None  # its turn did not come: the stream was another by then
            reply = session.replies.get(head.sequence)
            if reply is not None and reply[0].HasField("failure"):
                culprits.append(session.identifier)
        if failed:
            # One whose request fails alone too must not cost the others their company again.
            self._alone.update(culprits or [joints[0].key])


def _kind(session: Session, head: pb.Head) -> Hashable:
    """Return what forwards have in common that can be one batch; `None` if there is no such."""
    asked, lora = head.forward, session.trunk.lora
    if not asked.keep_graph or asked.adapter_disabled or asked.past_tokens or asked.rows:
        return None
    if not lora.targets or lora.use_dora or session.trunk.gradient_checkpointing:
        return None
    if asked.training and lora.dropout:
        return None
    metas = {meta.name: meta for meta in head.tensors if meta.name != "wanted"}
    smashed = metas.pop("smashed", None)
    if smashed is None or len(smashed.shape) != 3:
        return None
    rows, tokens, _ = smashed.shape
    if any(list(m.shape) not in ([rows, tokens], [1, tokens]) for m in metas.values()):
        return None
    forms = tuple(sorted((name, meta.dtype) for name, meta in metas.items()))
    # Position ids without a mask may say where packed texts begin; a mask would hide it.
    may_be_packed = set(metas) == {"position_ids"}
    # The KV cache that models in training make by default is of no use to any later forward, but
    # with one transformers does not look for packed texts, and a batch has none.
    if may_be_packed and asked.cache:
        return None
    length = tokens if may_be_packed else 0
    return (
        session.trunk.likeness,
        asked.training,
        asked.autocast,
        smashed.dtype,
        forms,
        length,
    )
