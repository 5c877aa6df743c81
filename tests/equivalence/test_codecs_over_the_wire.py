"""Codecs in a run: what they learn, that both sides hold the same, and that nothing loses it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.client.replies import Pending
from cutlayer.errors import NotFinite, ProtocolError
from cutlayer.privacy.transcript import TranscriptWriter, read_transcript
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.codecs import CODECS
from cutlayer.wire.frames import Message
from cutlayer.wire.statics import Statics, statics_as_tensors
from cutlayer.wire.tensors import attach_tensors, read_tensors
from tests.site import Loop, ServerProcess, Site, adapter_of, batch_of, equal

MIXED = {
    "activations_up": "klt2",
    "activations_down": "rotated4",
    "gradients_up": "rotated2",
    "gradients_down": "int8",
}


@pytest.fixture(autouse=True)
def learn_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learn statics from the two batches that a test has."""
    monkeypatch.setattr("cutlayer.client.calibration._TOKENS_FOR_A_MEAN", 60)
    monkeypatch.setattr("cutlayer.client.calibration._TOKENS_A_COORDINATE", 1)


def losses_of(model: Any, steps: int = 6) -> list[float]:
    """Train a few steps and return the losses."""
    loop = Loop.over(model)
    return [float(loss) for step in range(steps) for loss in loop.step(batch_of(step))[:1]]


@pytest.mark.parametrize(
    ("codec", "tolerance", "chunks"),
    [("int8", 0.01, 1), ("rotated4", 0.03, 1), (MIXED, 0.1, 1), (MIXED, 0.1, 2)],
)
def test_a_lossy_run_follows_the_unsplit_one(
    llama: Site, codec: Any, tolerance: float, chunks: int
):
    """Losses stay near those of the unsplit run, before and after statics are learnt."""
    expected = losses_of(llama.unsplit())

    with llama.connect(codec=codec, chunks=chunks) as split:
        found = losses_of(split)
        learnt = split.connection.statics.keys()

    assert found != expected
    assert found == pytest.approx(expected, rel=tolerance)
    needed = {"rotated6", "rotated4"} & {codec} if isinstance(codec, str) else {"both"}
    assert learnt == ({"smashed", "trunk_out"} if needed else set())


def test_both_sides_hold_the_same_statics(llama: Site):
    """What the client learnt is what the server writes and reads with, bit for bit."""
    with llama.connect(codec=MIXED) as split:
        losses_of(split, steps=3)
        ours = statics_as_tensors(split.connection.statics)
        sessions = llama.server.sessions.in_memory()  # type: ignore[union-attr]
        theirs = statics_as_tensors(sessions[-1].statics)

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_transcript_has_what_the_server_has(llama: Site, tmp_path: Path):
    """Activations and gradients are recorded as the trunk gets them, through each codec in turn."""
    writer = TranscriptWriter(tmp_path, {}, sequences=100)
    reached: list[torch.Tensor] = []
    with llama.connect(codec=MIXED, transcript=writer) as split:
        trunk = llama.server.sessions.in_memory()[-1].trunk  # type: ignore[union-attr]
        forward, backward = trunk.forward, trunk.backward

        def seen_forward(number: int, smashed_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            reached.append(smashed_BTD.detach().clone())
            return forward(number, smashed_BTD, *args, **kwargs)

        def seen_backward(number: int, grad_BTD: torch.Tensor, **kwargs: Any) -> Any:
            reached.append(grad_BTD.clone())
            return backward(number, grad_BTD, **kwargs)

        trunk.forward, trunk.backward = seen_forward, seen_backward
        losses_of(split, steps=5)

    _facts, departures = read_transcript(tmp_path)
    recorded = [tensor for one in departures for tensor in (one.smashed_BTD, one.gradient_BTD)]
    wanted = [tensor for step in (0, 1, 2, 4) for tensor in reached[2 * step : 2 * step + 2]]
    assert len(recorded) == len(wanted) == 8
    for ours, theirs in zip(recorded, wanted, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mark_after_s", [0.0, 1e9])
def test_statics_survive_a_killed_server(
    llama: Site, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark_after_s: float
):
    """After SIGKILL a run goes on with what was learnt, from a mark or from the client's log."""
    monkeypatch.setattr("cutlayer.client.connection._MARK_AFTER_S", mark_after_s)
    server = ServerProcess(llama.folder, certs, tmp_path)
    site = Site(llama.folder, certs, server)
    with site.connect(seed=3, lease_s=60.0, codec=MIXED) as split:
        loop = Loop.over(split)
        for step in range(5):
            loop.step(batch_of(step))
        while mark_after_s == 0 and split.connection._log.trimmed_to < 8:
            with torch.no_grad():
                split(**batch_of(9))  # any reply tells what is durable
            time.sleep(0.02)
        server.kill()
        again: list[ServerProcess] = []
        threading.Timer(
            0.1,
            lambda: again.append(ServerProcess(llama.folder, certs, tmp_path, port=server.port)),
        ).start()
        for step in range(5, 7):
            loop.step(batch_of(step))
        rough = adapter_of(split)
        assert split.connection.traffic.resent
    again[0].kill()
    with llama.connect(seed=3, codec=MIXED) as split:
        loop = Loop.over(split)
        for step in range(7):
            loop.step(batch_of(step))
        calm = adapter_of(split)

    assert equal(calm, rough)


def test_generating_before_and_after_statics_are_learnt(llama: Site):
    """One token at a time goes through the same codecs, and is not taken for a text's first."""
    ids_BT = batch_of(1)["input_ids"][:1]
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        whole = llama.unsplit().eval()(ids_BT, output_hidden_states=True)

    with llama.connect(codec="rotated6") as split:
        split.eval()
        for _ in range(8):
            split.generate(ids_BT, **asked)
        statics = split.connection.statics["smashed"]

    torch.testing.assert_close(statics.sink_D, whole.hidden_states[2][0, 0])


def statics_tensors(width: int, **changed: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a Calibrate, some of them changed or (`None`) left out."""
    given = {
        "smashed.mean": torch.zeros(width),
        "smashed.sink": torch.zeros(width),
        "smashed.basis": torch.eye(width)[:, :16].to(torch.bfloat16).contiguous(),
        "smashed.deviation": torch.ones(16),
        "smashed.bits": torch.tensor([2] * 8 + [1] * 8, dtype=torch.uint8),
    }
    given |= {name.replace("__", "."): value for name, value in changed.items()}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


LIES = {
    "a width of its own": ({"smashed__mean": torch.zeros(3)}, ProtocolError),
    "half precision": ({"smashed__sink": torch.zeros(48).half()}, ProtocolError),
    "no mean": ({"smashed__mean": None}, ProtocolError),
    "a mean that is NaN": ({"smashed__mean": torch.full((48,), float("nan"))}, NotFinite),
    "a basis without bits": ({"smashed__bits": None}, ProtocolError),
    "too many bits": ({"smashed__bits": torch.full((16,), 9, dtype=torch.uint8)}, ProtocolError),
    "bits that go up": (
        {"smashed__bits": torch.tensor([1] * 8 + [2] * 8, dtype=torch.uint8)},
        ProtocolError,
    ),
    "bits within a group": (
        {"smashed__bits": torch.tensor([2] * 7 + [1] * 9, dtype=torch.uint8)},
        ProtocolError,
    ),
    "a deviation of zero": ({"smashed__deviation": torch.zeros(16)}, ProtocolError),
    "another direction": ({"gradient__mean": torch.zeros(48)}, ProtocolError),
    "something else": ({"smashed__name": torch.zeros(48)}, ProtocolError),
}


@pytest.mark.parametrize("lie", LIES)
def test_statics_that_do_not_fit_are_refused(llama: Site, lie: str):
    """A Calibrate that holds anything but statics is told so, and changes nothing."""
    with llama.connect() as split:
        width = split.config.hidden_size
        changed, kind = LIES[lie]
        changed = {
            n: t if t is None or len(t) != 48 else t[:1].repeat(width) for n, t in changed.items()
        }
        head = pb.Head(calibrate=pb.Calibrate())
        with pytest.raises(kind, match="statics"):
            split.connection.request(head, statics_tensors(width, **changed)).wait()

        fine = statics_tensors(width)
        split.connection.request(pb.Head(calibrate=pb.Calibrate()), fine).wait()


def message_of(codec: str, tensor: torch.Tensor, statics: Statics | None = None) -> Message:
    """Return a message with one tensor."""
    head = pb.Head()
    known = {"smashed": statics} if statics else {}
    parts = attach_tensors(head, {"smashed": tensor}, codecs={"smashed": codec}, statics=known)
    return Message(head, memoryview(b"".join(bytes(part) for part in parts)))


def test_tensors_are_written_and_read_with_their_statics():
    """A head says whether statics were used; who does not hold them refuses, else it is equal."""
    x_BTD = torch.randn(2, 3, 64) + 5
    statics = Statics(torch.full((64,), 5.0), torch.full((64,), 50.0))

    message = message_of("rotated4", x_BTD, statics)

    found_BTD = read_tensors(message, statics={"smashed": statics})["smashed"]
    assert message.head.tensors[0].centred
    assert (found_BTD - x_BTD).norm() < 0.2 * (x_BTD - 5).norm()
    for held in ({}, {"smashed": Statics(torch.zeros(32), torch.zeros(32))}):
        with pytest.raises(ProtocolError, match="not held here"):
            read_tensors(message, statics=held)


def test_a_basis_that_was_never_sent_is_refused():
    """A tensor in a codec with a basis cannot be read without one."""
    x_BTD = torch.randn(2, 3, 64)
    message = message_of("rotated2", x_BTD)
    message.head.tensors[0].codec = "klt1"

    with pytest.raises(ProtocolError, match="not held here"):
        read_tensors(message)


def test_packed_bytes_do_not_take_more_memory_than_allowed():
    """A message that is small on the wire and large once decoded is refused before it is."""
    message = message_of("rotated1", torch.zeros(4, 100, 64))

    read_tensors(message, max_bytes=4 * 100 * 64 * 4)
    with pytest.raises(ProtocolError, match="102400 bytes once decoded: the limit is 102399"):
        read_tensors(message, max_bytes=4 * 100 * 64 * 4 - 1)


@pytest.mark.parametrize(
    "codec",
    [n for n, c in CODECS.items() if n not in ("raw", "bf16", "int32") and c.learns != "basis"],
)
@pytest.mark.parametrize("lie", [b"\xff\x7f", b"\x80\x7f"], ids=["NaN", "infinity"])
def test_a_scale_that_lies_is_refused(llama: Site, codec: str, lie: bytes):
    """A scale of NaN or infinity is told as activations that are not finite."""
    with llama.connect() as split:
        head = pb.Head(forward=pb.Forward())
        x_BTD = torch.randn(1, 3, split.config.hidden_size)
        message = message_of(codec, x_BTD)
        stored = CODECS[codec].encode(x_BTD).view(torch.uint8).clone()
        stored[:2] = torch.tensor(list(lie), dtype=torch.uint8)
        assert message.head.tensors[0].nbytes == len(stored)
        connection = split.connection
        with connection._send_lock:
            head.tensors.extend(message.head.tensors)
            pending = connection._put(head, [memoryview(stored.numpy())], Pending(connection))
        with pytest.raises(NotFinite, match="smashed activations"):
            pending.wait()
