"""What a kill, a late thread or a full disk leaves behind harms nothing that comes after it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.client.savepoints import RECORD
from cutlayer.errors import ProtocolError, Refused, StorageError
from cutlayer.server.store import State, Store
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.codecs import CODECS, Raw
from cutlayer.wire.frames import Assembler, frames_of
from cutlayer.wire.statics import Statics
from tests.equivalence.test_trl import trainer_of
from tests.site import Loop, Site, batch_of
from tests.tiny import HIDDEN


def state_of(step: int) -> State:
    """Return a state whose one number is its step."""
    return State(step, {"a": torch.tensor([float(step)])}, {}, {})


def test_an_unreadable_reply_fails_who_waits_for_it(llama: Site):
    """A reply whose tensors cannot be read ends the wait with its reason."""
    split = llama.connect(run="unreadable")
    connection = split.connection
    fed = queue.SimpleQueue[Any]()
    lying = pb.Head(sequence=connection._sequence + 1, done=pb.Done())
    lying.tensors.append(pb.TensorMeta(name="payload", dtype="float32", shape=[3], codec="none"))
    deliver = connection._deliver

    def lie(message: Any, outgoing: Any) -> None:
        if message.head.sequence == lying.sequence:
            (frame,) = frames_of(lying, [])
            message = Assembler(max_message_bytes=1 << 20).feed(frame)
        deliver(message, outgoing)

    connection._deliver = lie
    pending = connection.request(pb.Head(zero_grad=pb.ZeroGrad()))

    def wait() -> None:
        try:
            fed.put(pending.wait())
        except Exception as error:
            fed.put(error)

    threading.Thread(target=wait, daemon=True).start()
    assert isinstance(fed.get(timeout=20), ProtocolError)
    with pytest.raises(ProtocolError):
        connection.request(pb.Head(zero_grad=pb.ZeroGrad()))
    split.close()


class _Failing(Raw):
    """A codec for which the memory does not suffice."""

    def encode(self, tensor: Tensor, statics: Statics | None = None) -> Tensor:
        """Find no memory."""
        raise torch.OutOfMemoryError("no room for what is sent")


def test_a_reply_that_cannot_be_written_fails_its_request_alone(
    llama: Site, monkeypatch: pytest.MonkeyPatch
):
    """Who waits is told why, no graph stays behind, and the next request is done."""
    with llama.connect(run="unwritten", codec={"activations_down": "bf16"}) as split:
        connection = split.connection
        smashed = {"smashed": torch.ones(1, 2, HIDDEN)}
        asked = pb.Forward(keep_graph=True)
        with monkeypatch.context() as patch:
            patch.setitem(CODECS, "bf16", _Failing())
            pending = connection.request(pb.Head(forward=asked), smashed)
            with pytest.raises(Refused, match="has not the memory"):
                pending.future.result(timeout=60)
        (session,) = [s for s in llama.server.sessions.in_memory() if s.run == "unwritten"]
        graphs = session.trunk.pending
        out = connection.request(pb.Head(forward=asked), smashed).wait()["trunk_out"]

    assert graphs == 0
    assert out.shape == (1, 2, HIDDEN)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_forward_that_fails_leaves_no_cache(
    llama: Site, monkeypatch: pytest.MonkeyPatch, keep_graph: bool
):
    """A cache of half the layers is not kept: its session would be within a step for ever."""

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room for this layer")

    with llama.connect(run="half-a-cache") as split:
        (session,) = [s for s in llama.server.sessions.in_memory() if s.run == "half-a-cache"]
        layer = session.trunk.anatomy.layers(session.trunk.model)[3]
        monkeypatch.setattr(layer, "forward", fail)
        asked = pb.Forward(keep_graph=keep_graph, cache=1)
        smashed = {"smashed": torch.ones(1, 2, HIDDEN)}
        with pytest.raises(Refused, match="has not the memory"):
            split.connection.request(pb.Head(forward=asked), smashed).wait()

        assert session.is_between_steps()


def test_a_mark_that_a_kill_left_gives_way_to_the_next_of_its_number(tmp_path: Path):
    """A folder that no journal names does not stop the mark of the same request."""
    store = Store(tmp_path)
    store.mark("ward", "run", 7, state_of(1))

    store.mark("ward", "run", 7, state_of(2))

    assert store.marked("ward", "run", 7).step == 2


def test_a_late_mark_leaves_the_heirs_marks_alone(llama: Site):
    """A mark that is written when its run was opened anew touches neither disk nor journal."""
    sessions = llama.server.sessions  # type: ignore[union-attr]

    def on_trunk(do: Callable[[], Any]) -> Any:
        return sessions.on_trunk(do, "default").result()

    with llama.connect(run="late") as split:
        Loop.over(split).step(batch_of(1))
        old = sessions._open[split.connection.session]
        late = state_of(99)
        with llama.connect(run="late") as heir:
            Loop.over(heir).step(batch_of(2))
            new = sessions._open[heir.connection.session]
            while new.trunk.step < 1:  # nobody waits for the answer to a step
                time.sleep(0.01)
            on_trunk(lambda: sessions._write_mark(new, new.state()))
            home = sessions._store.root / "default" / "late"
            before = sorted(path.name for path in home.glob("mark-*"))

            sessions._write_mark(old, late, old.last_sequence + 100)

            assert sorted(path.name for path in home.glob("mark-*")) == before != []
            mark = sessions._table.find(new.identifier).mark
            assert sessions._store.marked("default", "late", mark).step == 1


def test_a_checkpoint_of_the_same_step_outlives_the_servers_full_disk(
    llama: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the client has under that step is not removed when the server's half is refused."""
    with llama.connect(run="kept") as split:
        trainer = trainer_of(split, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
        trainer.train()
        folder = tmp_path / "checkpoint-2"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def full_disk(*_args: Any) -> None:
            raise StorageError("the server could not save (No space left on device)")

        monkeypatch.setattr(Store, "_write", full_disk)
        trainer._save_checkpoint(trainer.model, None)

    assert RECORD in before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
