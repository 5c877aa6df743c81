"""One tenant's run: check every request, do it on the trunk, answer it.

A session knows tensors and no gRPC. Requests of all sessions are done one after another by one
thread per trunk, in the order in which they came.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, CutlayerError, NotFinite, ProtocolError, Refused
from cutlayer.server.access import Limits
from cutlayer.server.names import is_plain_name
from cutlayer.server.store import State, Store
from cutlayer.server.trunk import OPTIMIZERS, Group, SharedTrunk, TenantTrunk
from cutlayer.server.watch import Watch
from cutlayer.server.worker import TrunkThread, give_memory_back
from cutlayer.split.adapters import LoraTarget, TrunkLora
from cutlayer.split.cut import Cut
from cutlayer.split.entry import CARRIED
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.agreement import disagreements
from cutlayer.wire.codecs import CODECS
from cutlayer.wire.frames import Message
from cutlayer.wire.tensors import DTYPES, attach_tensors, read_tensors, refuse_not_finite

__all__ = ["Reply", "Session", "Sessions"]

log = logging.getLogger(__name__)

Reply = tuple[pb.Head, list[memoryview]]


@dataclass
class Session:
    """One run of one tenant over one stream."""

    identifier: str
    tenant: str
    run: str
    codec: str
    trunk: TenantTrunk
    store: Store
    limits: Limits
    keeps_adapter: bool
    width: int
    last_sequence: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    saved_bytes: int = 0
    """Bytes of the state that was saved last."""

    def answer(self, message: Message, arrived_s: float) -> Reply:
        """Do what a message asks and return the reply; a failure is a reply too."""
        started_s = time.monotonic()
        head = pb.Head(sequence=message.head.sequence)
        try:
            tensors = self._do(message)
        except CutlayerError as error:
            head.failure.code, head.failure.message = error.code, str(error)
            return head, []
        except Exception as error:  # a model's own forward may raise anything
            log.exception("session of tenant %s: request failed", self.tenant)
            head.failure.code = CutlayerError.code
            head.failure.message = (
                f"the trunk failed on this request ({type(error).__name__}): the server's log has "
                "the cause"
            )
            return head, []
        head.done.compute_s = time.monotonic() - started_s
        head.done.queue_s = started_s - arrived_s
        return head, attach_tensors(head, tensors, codecs=self._codecs(tensors))

    def _codecs(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        return {name: self.codec for name in ("trunk_out", "gradient") if name in tensors}

    def _do(self, message: Message) -> dict[str, Tensor]:
        head = message.head
        if head.sequence != self.last_sequence + 1:
            raise ProtocolError(
                f"request {head.sequence} came after {self.last_sequence}: requests are numbered "
                "without a gap"
            )
        self.last_sequence = head.sequence
        tensors = read_tensors(message)
        verb = head.WhichOneof("verb")
        do: Callable[[pb.Head, dict[str, Tensor]], dict[str, Tensor]] | None
        do = getattr(self, f"_do_{verb}", None)
        if do is None:
            raise ProtocolError(f"'{verb}' is nothing that a client can ask for")
        return do(head, tensors)

    def _do_forward(self, head: pb.Head, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        asked = head.forward
        smashed_BTD = tensors.pop("smashed", torch.empty(0))
        if smashed_BTD.dim() != 3 or smashed_BTD.shape[2] != self.width or 0 in smashed_BTD.shape:
            raise ProtocolError(
                f"activations of shape {tuple(smashed_BTD.shape)} came: (batch, tokens, "
                f"{self.width}) is expected"
            )
        if not set(tensors) <= set(CARRIED) or any(0 in t.shape for t in tensors.values()):
            raise ProtocolError(f"tensors {sorted(tensors)} came with the activations")
        if asked.keep_graph and self.trunk.pending >= self.limits.max_pending:
            raise ProtocolError(
                f"{self.trunk.pending} forwards wait for their backward: the limit is "
                f"{self.limits.max_pending}"
            )
        refuse_not_finite(smashed_BTD, "the smashed activations", "nothing was computed")
        if asked.autocast and asked.autocast not in ("bfloat16", "float16"):
            raise ProtocolError(f"autocast to '{asked.autocast}' is unknown")
        out_BTD = self.trunk.forward(
            head.sequence,
            smashed_BTD,
            tensors,
            training=asked.training,
            keep_graph=asked.keep_graph,
            wants_gradient=asked.wants_gradient,
            seed=asked.seed,
            autocast=DTYPES[asked.autocast] if asked.autocast else None,
            adapter_disabled=asked.adapter_disabled,
            cache=asked.cache,
            past_tokens=asked.past_tokens,
            cache_rows=asked.cache_rows,
        )
        return {"trunk_out": out_BTD}

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
        groups = [
            Group(dict(g.numbers), dict(g.flags), tuple(g.betas), tuple(g.names))
            for g in asked.groups
        ]
        numbers = [asked.clip_factor, *(n for g in groups for n in (*g.numbers.values(), *g.betas))]
        if not all(map(math.isfinite, numbers)):
            raise ProtocolError("a number of the optimizer step is not finite")
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
        self.trunk.drop_cache(head.drop_cache.cache)
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
        self.take_up(head.load_state.step)
        return {}

    def save(self, step: int) -> None:
        """Keep the adapter and the optimizer as they are.

        Raises:
            StorageError: If the disk says no.
        """
        if not self.trunk.lora.targets:
            return
        state = State(
            step, self.trunk.export_adapter(), self.trunk.optimizer_tensors(), self.settings
        )
        self.store.save(self.tenant, self.run, state)
        self.saved_bytes = state.size_bytes

    def take_up(self, step: int | None) -> None:
        """Go back to a kept state of this run, or its last.

        Raises:
            Refused: If there is none, or it does not fit.
        """
        if not self.trunk.lora.targets:
            return
        state = self.store.load(self.tenant, self.run, step)
        self.trunk.import_adapter(state.adapter)
        self.settings = dict(state.settings)
        groups = [
            Group(g["numbers"], g["flags"], tuple(g["betas"]), tuple(g["names"]))
            for g in self.settings.get("groups", [])
        ]
        if groups:
            self.trunk.restore_optimizer(self.settings["optimizer"], groups, state.optimizer)
        self.trunk.step = state.step


class Sessions:
    """All the sessions of a server, and the one thread that computes for them."""

    def __init__(
        self,
        trunk: SharedTrunk,
        agreement: pb.Agreement,
        store: Store,
        *,
        limits: Limits | None = None,
        keeps_adapter: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch or Watch()
        self.trunk = trunk
        self.agreement = agreement
        self.limits = limits or Limits()
        self.keeps_adapter = keeps_adapter
        self._store = store
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._thread = TrunkThread()

    def offer(self) -> pb.Offer:
        """Return what this server holds and allows."""
        return pb.Offer(
            agreement=self.agreement,
            codecs=list(CODECS),
            optimizers=list(OPTIMIZERS),
            keeps_adapter=self.keeps_adapter,
            max_message_bytes=self.limits.max_message_bytes,
            max_rank=self.limits.max_rank,
            idle_timeout_s=self.limits.idle_timeout_s,
        )

    def open(self, tenant: str, asked: pb.OpenSessionRequest) -> Session:
        """Agree with a client and make a place for its run.

        Raises:
            Refused: Naming all that the two sides do not agree on.
            ConfigError: If the LoRA does not fit the trunk.
        """
        faults = disagreements(asked.agreement, self.agreement)
        if asked.codec not in CODECS:
            faults.append(f"codec '{asked.codec}' is unknown here: one of {', '.join(CODECS)}")
        if not is_plain_name(asked.run):
            faults.append(f"run name '{asked.run}' is not plain (letters, digits, '.', '_', '-')")
        ranks = [module.rank for module in asked.lora.modules]
        if ranks and not 1 <= min(ranks) <= max(ranks) <= self.limits.max_rank:
            faults.append(f"LoRA rank {max(ranks)} is not within 1 and {self.limits.max_rank}")
        if faults:
            raise Refused("; ".join(faults))
        cut = Cut(asked.agreement.lower, asked.agreement.upper)
        lora = _lora_of(asked.lora, self.trunk, cut)

        def make() -> TenantTrunk:
            give_memory_back()  # else the tenant's tensors settle between another's activations
            return self.trunk.tenant(cut, lora, gradient_checkpointing=asked.gradient_checkpointing)

        made: TenantTrunk = self.on_trunk(make).result()
        session = Session(
            identifier=secrets.token_urlsafe(24),
            tenant=tenant,
            run=asked.run,
            codec=asked.codec,
            trunk=made,
            store=self._store,
            limits=self.limits,
            keeps_adapter=self.keeps_adapter,
            width=self.trunk.model.config.get_text_config().hidden_size,
        )
        if asked.take_up:
            self.on_trunk(lambda: session.take_up(None)).result()
        with self._lock:
            # A run that is opened again has left its old session behind.
            for key, other in list(self._open.items()):
                if (other.tenant, other.run) == (tenant, asked.run):
                    del self._open[key]
            if len(self._open) >= self.limits.max_sessions:
                raise Refused(
                    f"{self.limits.max_sessions} sessions are open, which is this server's limit: "
                    "try again later"
                )
            self._open[session.identifier] = session
        log.info("tenant %s opened run %s at cut %s", tenant, asked.run, cut)
        return session

    def get(self, tenant: str, identifier: str) -> Session:
        """Return an open session of this tenant.

        Raises:
            Refused: If there is none; another tenant's is told the same way.
        """
        with self._lock:
            session = self._open.get(identifier)
        if session is None or session.tenant != tenant:
            raise Refused("there is no such session: it was closed or never opened")
        return session

    def close(self, session: Session) -> None:
        """Give a session's place back; what the server keeps is saved first."""
        with self._lock:
            if self._open.pop(session.identifier, None) is None:
                return
        if self.keeps_adapter:
            self.on_trunk(lambda: session.save(session.trunk.step)).result()
        self.watch.happened("closed", session.tenant, session.run, step=session.trunk.step)
        log.info(
            "tenant %s closed run %s at step %d", session.tenant, session.run, session.trunk.step
        )

    def on_trunk(self, work: Callable[[], Any]) -> Future[Any]:
        """Have the trunk's thread do something in its turn."""
        return self._thread.submit(work)

    def stop(self) -> None:
        """Finish what is being computed, keep what is to be kept, and stop."""
        for session in list(self._open.values()):
            self.close(session)
        self._thread.stop()


def _lora_of(asked: pb.LoraSpec, trunk: SharedTrunk, cut: Cut) -> TrunkLora:
    layers = dict(trunk.anatomy.layers(trunk.model).named_modules())
    prefix = trunk.anatomy.layers_path + "."
    for module in asked.modules:
        inner = module.name.removeprefix(prefix)
        number = inner.partition(".")[0]
        in_trunk = inner != module.name and number.isdigit() and int(number) in cut
        if not in_trunk or inner not in layers:
            raise ConfigError(
                f"LoRA target '{module.name}' is no module of layers {cut}: the client and the "
                "server disagree about the model"
            )
        if not (math.isfinite(module.alpha) and module.alpha > 0):
            raise ConfigError(f"LoRA alpha {module.alpha} of '{module.name}' must be above 0")
    if not 0 <= asked.dropout < 1:
        raise ConfigError(f"LoRA dropout {asked.dropout} must be at least 0 and below 1")
    return TrunkLora(
        tuple(LoraTarget(m.name, m.rank, m.alpha) for m in asked.modules),
        dropout=asked.dropout,
        use_rslora=asked.use_rslora,
        use_dora=asked.use_dora,
        gaussian_init=asked.gaussian_init,
        fan_in_fan_out=asked.fan_in_fan_out,
        seed=asked.seed,
    )
