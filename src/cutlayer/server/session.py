"""One tenant's run: check every request, do it on the trunk once, answer it.

A session knows tensors and no gRPC. It outlives its stream: a client whose link broke comes back,
is told what was done, and gets the replies that it missed. What a session has done is a function
of its requests in their order, so one that was lost with its server is made again by sending
again all requests since the last mark (docs/decisions/0012).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.errors import CutlayerError, NotFinite, ProtocolError, Refused
from cutlayer.server.access import Limits
from cutlayer.server.memory import Memory
from cutlayer.server.optimizers import Group
from cutlayer.server.quotas import Desk
from cutlayer.server.requests import checked_forward, checked_groups, failed
from cutlayer.server.rows import RunRows, check_rows
from cutlayer.server.shelf import held_bytes
from cutlayer.server.store import State, Store
from cutlayer.server.trunk import TenantTrunk
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.codecs import in_force
from cutlayer.wire.frames import Message
from cutlayer.wire.statics import Statics, statics_as_tensors, statics_of
from cutlayer.wire.tensors import DTYPES, attach_tensors, read_tensors, refuse_not_finite

__all__ = ["Reply", "Session"]

log = logging.getLogger(__name__)

Reply = tuple[pb.Head, list[memoryview]]


@dataclass
class Session:
    """One run of one tenant.

    Attributes:
        last_sequence: The last request that was done.
        durable: The last request whose effect is on disk, with all before it.
        replies: What was answered and may not have arrived, by sequence.
        stream: The number of the stream that is attached; requests of an older one are not done.
        hang_up: Ends the attached stream; `None` while there is none.
        silent_since_s: When the last request came or the stream ended.
        saved_bytes: Bytes of the state that was saved last.
        statics: What codecs know of the tensors that are named, from the client's `Calibrate`.
        memory: What this session uses, for its tenant's quotas.
        rows: What is kept of this run for send-once, if it was opened so.
        ahead_s: Seconds that were spent ahead on the request that is done now.
    """

    identifier: str
    tenant: str
    run: str
    codecs: Mapping[str, str]
    trunk: TenantTrunk
    store: Store
    limits: Limits
    keeps_adapter: bool
    width: int
    mark_aside: Callable[[Session, State], None]
    mark_now: Callable[[Session, State], None]
    desk: Desk
    last_sequence: int = 0
    durable: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    replies: dict[int, Reply] = field(default_factory=dict)
    stream: int = 0
    hang_up: Callable[[], None] | None = None
    silent_since_s: float = field(default_factory=time.monotonic)
    saved_bytes: int = 0
    rows: RunRows | None = None
    statics: dict[str, Statics] = field(default_factory=dict)
    ahead_s: float = 0.0

    def __post_init__(self) -> None:
        self.memory = Memory(self.trunk)

    def attach(
        self, received: int, hang_up: Callable[[], None], rows_key: bytes = b""
    ) -> tuple[int, list[Reply]]:
        """Begin a new stream; return its number and what must be said on it first."""
        if self.rows is not None:
            self.rows.take_key(rows_key)
        if self.hang_up is not None:
            self.hang_up()
        self.stream += 1
        self.hang_up = hang_up
        self.silent_since_s = time.monotonic()
        self._forget(received)
        attached = pb.Attached(
            reached=self.last_sequence, durable=self.durable, replies=list(self.replies)
        )
        return self.stream, [(pb.Head(attached=attached), []), *self.replies.values()]

    def detach(self, stream: int) -> None:
        """End a stream; the session waits for the next."""
        if stream == self.stream:
            self.hang_up = None
            self.silent_since_s = time.monotonic()

    def answer(self, message: Message, arrived_s: float) -> Reply:
        """Do what a message asks, once, and return the reply; a failure is a reply too."""
        started_s = self.silent_since_s = time.monotonic()
        asked = message.head
        if asked.sequence <= self.last_sequence:
            return self._answered_before(asked.sequence)
        self._forget(asked.received)
        if fault := self.out_of_order(asked):
            # It does not count, so nothing of it is kept either.
            return failed(asked.sequence, ProtocolError(fault)), []
        self.last_sequence = asked.sequence
        head = pb.Head(sequence=asked.sequence)
        try:
            if (missing := self._missing(asked)) is not None:
                # It does not count: it comes again with these rows, on a new stream, and so does
                # what was sent after it.
                self.last_sequence = asked.follows
                self.stream, self.hang_up = self.stream + 1, None
                return pb.Head(missing=missing), []
            parts = self._attached(head, self._do(message))
        except Exception as error:  # a model's own forward may raise anything
            if not isinstance(error, CutlayerError):
                log.exception("session of tenant %s: request failed", self.tenant)
            # The client has no output to go on from, so nobody would ever free graph and cache.
            self.trunk.discard(asked.sequence)
            self.trunk.caches.drop(asked.forward.cache)
            return self._remember(failed(asked.sequence, error), [])
        # Reading and writing tensors is in it, and its part of what was computed ahead of it.
        head.done.compute_s = time.monotonic() - started_s + self.ahead_s
        head.done.queue_s = started_s - arrived_s - self.ahead_s
        head.done.durable = self.durable
        if self.rows is not None:
            head.done.not_kept.extend(self.rows.take_not_kept())
        return self._remember(head, parts)

    def _missing(self, asked: pb.Head) -> pb.Missing | None:
        limit = self.limits.max_message_bytes
        return self.rows.missing(asked, limit) if self.rows is not None else None

    def _attached(self, head: pb.Head, tensors: dict[str, Tensor]) -> list[memoryview]:
        codecs = {
            "trunk_out": in_force(self.codecs["activations_down"], self.statics.get("trunk_out")),
            "gradient": self.codecs["gradients_down"],
        }
        return attach_tensors(head, tensors, codecs=codecs, statics=self.statics)

    def _remember(self, head: pb.Head, parts: list[memoryview]) -> Reply:
        self.replies[head.sequence] = (head, parts)
        return head, parts

    def _forget(self, received: int) -> None:
        """Let go of the replies that have arrived."""
        for sequence in [known for known in self.replies if known <= received]:
            del self.replies[sequence]

    def _answered_before(self, sequence: int) -> Reply:
        if sequence in self.replies:
            return self.replies[sequence]
        fault = f"request {sequence} was done before and its reply is not kept any more"
        return failed(sequence, ProtocolError(fault)), []

    def out_of_order(self, asked: pb.Head) -> str:
        """Return why a request cannot be the next one; nothing if it can."""
        if asked.follows != self.last_sequence:
            return (
                f"request {asked.sequence} says that it follows {asked.follows} and came after "
                f"{self.last_sequence}: one between them is missing"
            )
        if len(self.replies) > 4 * self.limits.max_pending:
            return f"{len(self.replies)} replies were not acknowledged: read them and say so"
        return ""

    def _do(self, message: Message) -> dict[str, Tensor]:
        head = message.head
        most, device = self.limits.max_message_bytes, self.trunk.device
        tensors = read_tensors(message, statics=self.statics, max_bytes=most, device=device)
        verb = head.WhichOneof("verb")
        do: Callable[[pb.Head, dict[str, Tensor]], dict[str, Tensor]] | None
        do = getattr(self, f"_do_{verb}", None)
        if do is None:
            raise ProtocolError(f"'{verb}' is nothing that a client can ask for")
        if self.rows is None or not (head.forward.rows or head.keep_rows.rows):
            return do(head, tensors)
        check_rows(head, tensors, self.width)
        answer = do(head, self.rows.joined(head, tensors, self.statics, device))
        self.rows.keep_those_in(message)
        return answer

    def _do_keep_rows(self, _head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # looked at before and kept afterwards, as with a forward

    def _do_forward(self, head: pb.Head, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        asked = head.forward
        smashed_BTD, wanted_N = checked_forward(asked, tensors, width=self.width)
        if asked.keep_graph and self.trunk.pending >= self.limits.max_pending:
            raise ProtocolError(
                f"{self.trunk.pending} forwards wait for their backward: the limit is "
                f"{self.limits.max_pending}"
            )
        tokens = smashed_BTD.shape[0] * smashed_BTD.shape[1]
        self.desk.admit_forward(self.tenant, tokens, keeps_graph=asked.keep_graph)
        with self.memory.admitting(head.sequence, asked, smashed_BTD, self._more_memory):
            out_BTD = self._forward(head.sequence, asked, smashed_BTD, tensors, wanted_N)
        return {"trunk_out": out_BTD}

    def _more_memory(self, more_bytes: int) -> None:
        self.desk.admit_memory(self.tenant, more_bytes)

    def _forward(
        self,
        sequence: int,
        asked: pb.Forward,
        smashed_BTD: Tensor,
        carried: dict[str, Tensor],
        wanted_N: Tensor | None,
    ) -> Tensor:
        return self.trunk.forward(
            sequence,
            smashed_BTD,
            carried,
            training=asked.training,
            keep_graph=asked.keep_graph,
            wants_gradient=asked.wants_gradient,
            seed=asked.seed,
            autocast=DTYPES[asked.autocast] if asked.autocast else None,
            adapter_disabled=asked.adapter_disabled,
            cache=asked.cache,
            past_tokens=asked.past_tokens,
            cache_rows=asked.cache_rows,
            wanted_N=wanted_N,
        )

    def _do_backward(self, head: pb.Head, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        grad_BTD = tensors.get("gradient", torch.empty(0))
        refuse_not_finite(grad_BTD, "the gradient at the upper cut", "no gradient was accumulated")
        asked = head.backward
        grad_smashed_BTD = self.trunk.backward(asked.forward_sequence, grad_BTD, hold=asked.hold)
        answer = {"norms": self.trunk.gradients.norms(asked.hold)} if asked.norms else {}
        if grad_smashed_BTD is not None:
            answer["gradient"] = grad_smashed_BTD
        return answer

    def _do_commit(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not math.isfinite(head.commit.factor):
            raise NotFinite("the gradient of the loss is NaN or infinite: nothing was committed")
        self.trunk.gradients.commit(head.commit.hold, head.commit.factor)
        return {"norms": self.trunk.gradients.norms()}

    def _do_release(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.trunk.gradients.release(head.release.hold)
        return {}

    def _do_optim_step(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        asked = head.optim_step
        groups = checked_groups(asked)
        if any(group.names for group in groups):
            self.settings["optimizer"] = asked.optimizer
            self.settings["groups"] = [
                {
                    "numbers": dict(g.numbers),
                    "flags": dict(g.flags),
                    "betas": g.betas,
                    "names": g.names,
                }
                for g in groups
            ]
        self.trunk.optim_step(asked.step, asked.optimizer, groups, asked.clip_factor)
        return {}

    def _do_zero_grad(self, _head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.trunk.gradients.zero()
        return {}

    def _do_discard(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.trunk.discard(head.discard.forward_sequence)
        return {}

    def _do_drop_cache(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.trunk.caches.drop(head.drop_cache.cache)
        return {}

    def _do_export_adapter(self, _head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.keeps_adapter:
            raise Refused(
                "this server keeps the trunk's half of the adapter: use it through the split "
                "(cutlayer generate), or ask its operator for it"
            )
        return self.trunk.export_adapter()

    def _do_import_adapter(self, _head: pb.Head, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            refuse_not_finite(tensor, f"adapter tensor '{name}'", "the adapter was not taken up")
        self.trunk.import_adapter(tensors)
        return {}

    def _do_echo(self, _head: pb.Head, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"payload": tensors.get("payload", torch.empty(0))}

    def _do_save_state(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.save(head.save_state.step)
        return {}

    def _do_load_state(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.take_up(head.load_state.step, head.load_state.run)
        if self.is_between_steps():
            # This request cannot be done again: what it reads may have been dropped by then.
            self.mark_now(self, self.marked())
        return {}

    def _do_mark(self, _head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.is_between_steps():
            self.mark_aside(self, self.marked())
        return {}

    def _do_calibrate(self, _head: pb.Head, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not {name.partition(".")[0] for name in tensors} <= {"smashed", "trunk_out"}:
            raise ProtocolError(f"statics of {sorted(tensors)} came: of smashed and trunk_out")
        self.statics = self.statics | statics_of(tensors, self.width)
        return {}

    def _do_retain(self, head: pb.Head, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.store.retain(self.tenant, self.run, set(head.retain.steps))
        return {}

    def save(self, step: int) -> None:
        """Keep the adapter and the optimizer as they are.

        Raises:
            StorageError: If the disk says no.
        """
        if not self.trunk.lora.targets:
            return
        state = self.state(step)
        held = held_bytes(self.store.root, self.tenant)
        self.desk.admit_checkpoint(self.tenant, held, state.size_bytes)
        self.store.save(self.tenant, self.run, state)
        self.saved_bytes = state.size_bytes

    def state(self, step: int | None = None) -> State:
        """Return the adapter and the optimizer as they are; they go on being trained."""
        return State(
            self.trunk.step if step is None else step,
            self.trunk.export_adapter(),
            self.trunk.optimizer_tensors(),
            self.settings,
        )

    def marked(self) -> State:
        """Return all that this session is between steps: its state, and what it does not save."""
        return replace(self.state(), statics=statics_as_tensors(self.statics))

    def is_between_steps(self) -> bool:
        """Say whether adapter and optimizer are all that this session is."""
        return not self.trunk.is_busy

    def owes_an_answer(self) -> bool:
        """Say whether a reply may not have arrived that says more than that it was done."""
        return any(h.tensors or h.HasField("failure") for h, _ in self.replies.values())

    def take_up(self, step: int | None, run: str = "") -> None:
        """Go back to a kept state of a run, this one by default, or to its last.

        Raises:
            Refused: If there is none, or it does not fit.
        """
        if self.trunk.lora.targets:
            self.restore(self.store.load(self.tenant, run or self.run, step))

    def restore(self, state: State) -> None:
        """Go on from a state.

        Raises:
            Refused: If it does not fit.
        """
        # A step that was saved has none: statics are those of a session, not of a step.
        self.statics = statics_of(state.statics, self.width) or self.statics
        if not self.trunk.lora.targets:
            return
        self.trunk.import_adapter(state.adapter)
        self.settings = dict(state.settings)
        groups = [
            Group(g["numbers"], g["flags"], tuple(g["betas"]), tuple(g["names"]))
            for g in self.settings.get("groups", [])
        ]
        if groups:
            self.trunk.restore_optimizer(self.settings["optimizer"], groups, state.optimizer)
        self.trunk.step = state.step
