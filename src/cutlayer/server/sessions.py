"""All the sessions of a server: opened, attached to streams, parked, and made again.

A session is in memory while its tenant is heard of within the lease, and in the journal until it
is closed. Everything that touches a session's tensors is done by the trunk's thread.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from cutlayer.errors import CutlayerError, Refused
from cutlayer.server.access import Limits
from cutlayer.server.database import Journal
from cutlayer.server.fusing import Fuser
from cutlayer.server.lora import lora_of
from cutlayer.server.names import is_plain_name
from cutlayer.server.optimizers import OPTIMIZERS
from cutlayer.server.quotas import Desk
from cutlayer.server.rows import RowStore
from cutlayer.server.session import Reply, Session
from cutlayer.server.session_table import Entry, SessionTable
from cutlayer.server.store import State, Store
from cutlayer.server.trunk import SharedTrunk
from cutlayer.server.watch import Watch
from cutlayer.server.worker import Joint, Stopped, TrunkThread, give_memory_back
from cutlayer.split.cut import Cut
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.agreement import disagreements
from cutlayer.wire.codecs import CODECS, codec_faults, codecs_of, prepare

__all__ = ["Sessions"]

log = logging.getLogger(__name__)

_DRAIN_S = 20.0


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
        desk: Desk | None = None,
        row_ttl_s: float = 0.0,
        fuse_tokens: int = 0,
    ) -> None:
        self.watch = watch or Watch()
        self.desk = desk or Desk()
        self.desk.usages = lambda tenant: [s.memory for s in self.in_memory(tenant)]
        self.trunk = trunk
        self.agreement = agreement
        self.limits = limits or Limits()
        self.keeps_adapter = keeps_adapter
        self._store = store
        self._rows = RowStore(store.root, row_ttl_s, lambda tenant: self.desk.of(tenant).row_bytes)
        self._journal = Journal(store.root)
        self._table = SessionTable(self._journal)
        self._open: dict[str, Session] = {}
        self.fuser = Fuser(fuse_tokens, self.in_memory) if fuse_tokens else None
        self._thread = TrunkThread(self._holders, together=self.fuser)
        self._marks = ThreadPoolExecutor(1, thread_name_prefix="marks")
        self._marking: set[str] = set()
        self._mark_lock = threading.RLock()
        self._stopping = threading.Event()
        threading.Thread(target=self._sweep, name="leases", daemon=True).start()

    def in_memory(self, tenant: str | None = None) -> list[Session]:
        """Return the sessions that are not parked, of all tenants or of one."""
        return [s for s in list(self._open.values()) if tenant in (None, s.tenant)]

    def _holders(self) -> set[str]:
        return {session.tenant for session in self._open.values() if session.trunk.pending}

    def known(self) -> list[Entry]:
        """Return all sessions, the parked ones too."""
        return self._table.all()

    def waiting(self) -> int:
        """Return how many requests wait for the trunk."""
        return self._thread.depth()

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
            lease_s=self.limits.lease_s,
            row_ttl_s=self._rows.ttl_s,
        )

    def open(self, tenant: str, asked: pb.OpenSessionRequest) -> Session:
        """Agree with a client and make a place for its run.

        Raises:
            Refused: Naming all that the two sides do not agree on.
            ConfigError: If the LoRA does not fit the trunk.
            StorageError: If the journal cannot be written.
        """
        faults = disagreements(asked.agreement, self.agreement)
        faults += codec_faults(codecs_of(asked.codecs))
        if not is_plain_name(asked.run):
            faults.append(f"run name '{asked.run}' is not plain (letters, digits, '.', '_', '-')")
        if asked.rows and not self._rows.ttl_s:
            faults.append("rows are not kept here for send-once (serve --send_once_ttl_s)")
        ranks = [module.rank for module in asked.lora.modules]
        if ranks and not 1 <= min(ranks) <= max(ranks) <= self.limits.max_rank:
            faults.append(f"LoRA rank {max(ranks)} is not within 1 and {self.limits.max_rank}")
        if faults:
            raise Refused("; ".join(faults))
        prepare(codecs_of(asked.codecs).values())  # here, where the trunk need not wait for it

        def make() -> Session:
            others = [other for other in self.in_memory(tenant) if other.run != asked.run]
            self.desk.admit_session(tenant, len(others), ranks)
            session = self._made(secrets.token_urlsafe(24), tenant, asked)
            if asked.take_up:
                session.take_up(None)
            # A run that is opened again has left its old session behind.
            for key, other in list(self._open.items()):
                if (other.tenant, other.run) == (tenant, asked.run):
                    self._let_go(key)
            self._make_room()
            with self._mark_lock:
                self._table.add(session.identifier, tenant, asked)
                self._store.drop_marks(tenant, asked.run)
            self._open[session.identifier] = session
            if asked.take_up:
                # What is taken up may have changed when this session must be made again.
                self._write_mark(session, session.marked())
            return session

        opened: Session = self.on_trunk(make, tenant).result()
        log.info("tenant %s opened run %s at cut %s", tenant, asked.run, opened.trunk.cut)
        return opened

    def _made(self, identifier: str, tenant: str, asked: pb.OpenSessionRequest) -> Session:
        cut = Cut(asked.agreement.lower, asked.agreement.upper)
        lora = lora_of(asked.lora, self.trunk, cut)
        give_memory_back()  # else the tenant's tensors settle between another's activations
        return Session(
            identifier=identifier,
            tenant=tenant,
            run=asked.run,
            codecs=codecs_of(asked.codecs),
            trunk=self.trunk.tenant(cut, lora, gradient_checkpointing=asked.gradient_checkpointing),
            store=self._store,
            limits=self.limits,
            keeps_adapter=self.keeps_adapter,
            width=self.trunk.model.config.get_text_config().hidden_size,
            mark_aside=self._mark_aside,
            mark_now=self._write_mark,
            desk=self.desk,
            rows=self._rows.of(tenant, asked.run, asked.rows),
        )

    def attach(
        self,
        tenant: str,
        identifier: str,
        received: int,
        hang_up: Callable[[], None],
        rows_key: bytes = b"",
    ) -> tuple[Session, int, list[Reply]]:
        """Begin a stream of a session, one that is parked or was lost with its server included.

        Args:
            tenant: Who calls.
            identifier: The session.
            received: The last reply that has reached the client.
            hang_up: Ends the stream.
            rows_key: Opens the rows that were sent once.

        Returns:
            The session, the number of its stream, and what must be said on it first.

        Raises:
            Refused: If there is none; another tenant's is told the same way.
        """
        # Here: a stranger's guess must not take the trunk's time, nor a compiler after a restart.
        prepare(codecs_of(self.get(tenant, identifier).asked.codecs).values())

        def attach() -> tuple[Session, int, list[Reply]]:
            session = self._open.get(identifier)
            if session is None:
                session = self._revived(tenant, identifier)
            if session is None or session.tenant != tenant:
                raise Refused("there is no such session: it was closed or never opened")
            return session, *session.attach(received, hang_up, rows_key)

        attached: tuple[Session, int, list[Reply]] = self.on_trunk(attach, tenant).result()
        return attached

    def _revived(self, tenant: str, identifier: str) -> Session | None:
        entry = self._table.find(identifier)
        if entry is None or entry.tenant != tenant:
            return None
        self._make_room()
        session = self._made(identifier, tenant, entry.asked)
        if entry.mark or entry.asked.take_up:
            session.restore(self._store.marked(tenant, entry.run, entry.mark))
        session.last_sequence = session.durable = entry.mark
        self._open[identifier] = session
        self.watch.happened("resumed", tenant, entry.run, step=session.trunk.step)
        log.info("tenant %s resumed run %s after request %d", tenant, entry.run, entry.mark)
        return session

    def _make_room(self) -> None:
        """Park the session that was silent longest if all places are taken.

        Raises:
            Refused: If all of them have a stream.
        """
        if len(self._open) < self.limits.max_sessions:
            return
        silent = [session for session in self._open.values() if session.hang_up is None]
        if not silent:
            raise Refused(
                f"{self.limits.max_sessions} sessions are open, which is this server's limit: "
                "try again later"
            )
        self._park(min(silent, key=lambda session: session.silent_since_s))

    # ------------------------------------------------------------------ marks and parking

    def _mark_aside(self, session: Session, state: State) -> None:
        """Write a mark while the trunk goes on; a failure leaves the older one in force."""
        if session.identifier in self._marking:
            return
        self._marking.add(session.identifier)
        frozen = replace(
            state,
            adapter={name: tensor.clone() for name, tensor in state.adapter.items()},
            optimizer={name: tensor.clone() for name, tensor in state.optimizer.items()},
            settings=dict(state.settings),
        )
        sequence = session.last_sequence

        def write() -> None:
            try:
                self._write_mark(session, frozen, sequence)
            except CutlayerError as error:
                log.warning("tenant %s: no mark was written: %s", session.tenant, error)
            finally:
                self._marking.discard(session.identifier)

        self._marks.submit(write)

    def _write_mark(self, session: Session, state: State, sequence: int | None = None) -> None:
        sequence = session.last_sequence if sequence is None else sequence
        with self._mark_lock:
            # A session that was closed or opened anew meanwhile must not touch its heir's marks.
            is_open = self._open.get(session.identifier) is session
            if not is_open or session.durable > sequence:
                return
            self._store.mark(session.tenant, session.run, sequence, state)
            self._table.marked(session.identifier, sequence)
            session.durable = sequence
            self._store.drop_marks(session.tenant, session.run, but=sequence)

    def _park(self, session: Session) -> None:
        """Free a session's memory; it is made again from its mark when it is called.

        What was done since a mark is sent again by the client, so a session may be parked at any
        moment; between steps a new mark spares that.
        """
        # Of what a mark covers the client hears no more than that it was done.
        is_due = session.last_sequence > session.durable and not session.owes_an_answer()
        if session.is_between_steps() and is_due:
            with contextlib.suppress(CutlayerError):  # a full disk: the older mark stays in force
                self._write_mark(session, session.marked())
        self._let_go(session.identifier)
        give_memory_back()
        self.watch.happened("parked", session.tenant, session.run, step=session.trunk.step)
        log.info("tenant %s: run %s was parked", session.tenant, session.run)

    def _let_go(self, identifier: str) -> None:
        session = self._open.pop(identifier, None)
        if session is not None:
            session.stream += 1  # what its stream has queued is not done any more
            session.trunk.discard_all()
            if session.hang_up is not None:
                session.hang_up()

    def _sweep(self) -> None:
        """Park sessions whose tenants were silent for longer than the lease; drop old rows."""
        while not self._stopping.wait(min(self.limits.lease_s / 4, 5.0)):
            self._rows.sweep_if_due()
            for session in list(self._open.values()):
                if self._is_silent(session):
                    with contextlib.suppress(Stopped):
                        self.on_trunk(partial(self._park_if_silent, session), session.tenant)

    def _is_silent(self, session: Session) -> bool:
        return time.monotonic() - session.silent_since_s > self.limits.lease_s

    def _park_if_silent(self, session: Session) -> None:
        if session.identifier in self._open and self._is_silent(session):
            self._park(session)

    # ------------------------------------------------------------------ the end

    def get(self, tenant: str, identifier: str) -> Entry:
        """Return a session of this tenant's, open or parked.

        Raises:
            Refused: If there is none; another tenant's is told the same way.
        """
        entry = self._table.find(identifier)
        if entry is None or entry.tenant != tenant:
            raise Refused("there is no such session: it was closed or never opened")
        return entry

    def close(self, tenant: str, identifier: str, *, keep_rows: bool = False) -> None:
        """End a session for good; what the server keeps is saved first.

        Args:
            tenant: Whose it is.
            identifier: The session.
            keep_rows: Keep what was sent once, for a run that will be resumed.

        Raises:
            Refused: If there is none; another tenant's is told the same way.
        """
        run = self.get(tenant, identifier).run

        def end() -> None:
            session = self._open.get(identifier)
            if session is None and self.keeps_adapter:
                session = self._revived(tenant, identifier)
            if session is not None and self.keeps_adapter:
                session.save(session.trunk.step)
            self._let_go(identifier)
            entry = self._table.find(identifier)
            if entry is not None:
                with self._mark_lock:
                    self._table.drop(identifier)
                    self._store.drop_marks(tenant, entry.run)
                steps = {"step": session.trunk.step} if session is not None else {}
                self.watch.happened("closed", tenant, entry.run, **steps)
                log.info("tenant %s closed run %s", tenant, entry.run)

        self.on_trunk(end, tenant).result()
        if not keep_rows:
            self._rows.drop(tenant, run)

    def on_trunk(
        self,
        work: Callable[[], Any],
        tenant: str = "",
        *,
        begins: bool = False,
        ends: bool = False,
        joint: Joint | None = None,
    ) -> Future[Any]:
        """Have the trunk's thread do something in a tenant's turn, as `TrunkThread.submit` says."""
        return self._thread.submit(work, tenant, begins=begins, ends=ends, joint=joint)

    def stop(self) -> None:
        """Finish what was handed in, mark where each session stands, and stop.

        What is not finished within the deadline is sent again by its client, to the next server.
        """
        self._stopping.set()
        for session in list(self._open.values()):
            self.on_trunk(partial(self._park, session), session.tenant)
        self._thread.stop(_DRAIN_S)
        self._marks.shutdown()
        self._rows.close()
        self._journal.close()
