"""Frames carry any message whole; a frame that lies ends in a named error."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
import torch

from cutlayer.errors import NotFinite, ProtocolError
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import FRAME_BYTES, MAX_HEAD_BYTES, Assembler, Message, frames_of
from cutlayer.wire.tensors import DTYPES, attach_tensors, read_tensors, refuse_not_finite
from tests.site import equal

LIMIT = 1 << 26


def message_of(tensors: dict[str, torch.Tensor], **codecs: str) -> list[bytes]:
    """Return the frames of a message with these tensors."""
    head = pb.Head(sequence=1, forward=pb.Forward(training=True))
    return list(frames_of(head, attach_tensors(head, tensors, codecs=codecs)))


def assembled(frames: list[bytes], *, limit: int = LIMIT) -> Message | None:
    """Return what an assembler makes of frames."""
    assembler = Assembler(max_message_bytes=limit)
    message = None
    for frame in frames:
        message = assembler.feed(frame)
    return message


def random_tensor(generator: random.Random) -> torch.Tensor:
    """Return a tensor of a random dtype and shape, now and then with gaps or empty."""
    shape = [generator.choice([0, 1, 2, 3, 7, 64]) for _ in range(generator.randint(0, 4))]
    dtype = generator.choice(list(DTYPES.values()))
    tensor = (100 * torch.randn(shape)).to(dtype)
    return tensor.transpose(0, -1) if len(shape) > 1 and generator.random() < 0.3 else tensor


@pytest.mark.parametrize("seed", range(40))
def test_any_tensors_come_back_as_they_were(seed: int):
    """Names, dtypes, shapes and every bit of random tensors survive the wire."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {f"t{i}": random_tensor(generator) for i in range(generator.randint(0, 5))}

    message = assembled(message_of(tensors))

    assert message is not None
    found = read_tensors(message)
    assert equal(tensors, found)
    assert [t.dtype for t in tensors.values()] == [t.dtype for t in found.values()]
    assert [t.shape for t in tensors.values()] == [t.shape for t in found.values()]


@pytest.mark.parametrize("size", [FRAME_BYTES - 40, FRAME_BYTES, 3 * FRAME_BYTES + 1, 0])
def test_no_frame_is_longer_than_a_frame(size: int):
    """A message of any size comes in frames of at most FRAME_BYTES and is whole after the last."""
    tensors = {"t": torch.arange(size).to(torch.uint8)}

    frames = message_of(tensors)
    assembler = Assembler(max_message_bytes=LIMIT)
    made = [assembler.feed(frame) for frame in frames]

    assert max(map(len, frames)) <= FRAME_BYTES
    assert made[:-1] == [None] * (len(frames) - 1)
    assert equal(tensors, read_tensors(made[-1]))


def test_messages_follow_one_another():
    """An assembler is as new after each message."""
    assembler = Assembler(max_message_bytes=LIMIT)
    for size in (1, FRAME_BYTES, 0, 2 * FRAME_BYTES):
        tensors = {"t": torch.ones(size, dtype=torch.uint8)}
        *first, last = [assembler.feed(frame) for frame in message_of(tensors)]

        assert set(first) <= {None}
        assert equal(tensors, read_tensors(last))


BIG = {"t": torch.zeros(2 * FRAME_BYTES, dtype=torch.uint8)}

HOSTILE = {
    "nothing": lambda _f: [b""],
    "an unknown kind": lambda f: [b"\x07" + f[0][1:]],
    "a body first": lambda f: [f[1]],
    "a head where a body is due": lambda f: [f[0], f[0]],
    "reordered": lambda f: [f[1], f[0], f[2]],
    "an empty body frame": lambda f: [f[0], b"\x02"],
    "more than promised": lambda f: [*f[:-1], f[-1] + b"x"],
    "one frame too many": lambda f: [*f[:-1], f[-2], f[-1]],
    "a head cut off in its length": lambda f: [f[0][:3]],
    "a head longer than its frame": lambda _f: [b"\x01" + struct.pack("<I", 500) + b"abc"],
    "a head longer than any": lambda _f: [
        b"\x01" + struct.pack("<I", MAX_HEAD_BYTES + 1) + bytes(MAX_HEAD_BYTES + 1)
    ],
    "a head of garbage": lambda _f: [b"\x01" + struct.pack("<I", 4) + b"\xff\xff\xff\xff"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_end_in_a_named_error(name: str):
    """Truncated, reordered, surplus and senseless frames are each a ProtocolError."""
    with pytest.raises(ProtocolError):
        assembled(HOSTILE[name](message_of(BIG)))


def test_a_truncated_message_never_becomes_one():
    """Without its last frame there is no message, and nothing is read."""
    assert assembled(message_of(BIG)[:-1]) is None


def test_an_oversized_message_is_refused_before_anything_is_allocated():
    """A head that announces a terabyte ends in ProtocolError without a large allocation."""
    head = pb.Head(sequence=1)
    head.tensors.add(name="t", dtype="uint8", shape=[1 << 40], codec="raw", nbytes=1 << 40)
    (frame,) = frames_of(head, [])

    tracemalloc.start()
    with pytest.raises(ProtocolError, match="announces 1099511627776 bytes"):
        assembled([frame])
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1 << 20


LIES = {
    "an unknown dtype": {"dtype": "float128"},
    "an object dtype": {"dtype": "object"},
    "an unknown codec": {"codec": "pickle"},
    "a larger shape": {"shape": [5, 4]},
    "a smaller shape": {"shape": [3]},
    "a wider dtype": {"dtype": "float64"},
    "another codec": {"codec": "bf16"},
    "a shape that overflows": {"shape": [1 << 32, 1 << 32]},
    "too many dimensions": {"shape": [1, 1, 1, 4, 4]},
}


@pytest.mark.parametrize("name", LIES)
def test_lying_metadata_ends_in_a_named_error(name: str):
    """Bytes that are not what shape, dtype and codec ask for are a ProtocolError."""
    head = pb.Head(sequence=1)
    parts = attach_tensors(head, {"t": torch.ones(4, 4)})
    for key, value in LIES[name].items():
        if key == "shape":
            head.tensors[0].ClearField("shape")
            head.tensors[0].shape.extend(value)
        else:
            setattr(head.tensors[0], key, value)

    with pytest.raises(ProtocolError):
        read_tensors(assembled(list(frames_of(head, parts))))


def test_a_name_that_comes_twice_is_refused():
    """Two tensors of one name are a ProtocolError."""
    head = pb.Head(sequence=1)
    parts = attach_tensors(head, {"t": torch.ones(2)}) + attach_tensors(head, {"t": torch.ones(2)})

    with pytest.raises(ProtocolError, match="comes twice"):
        read_tensors(assembled(list(frames_of(head, parts))))


@pytest.mark.parametrize("seed", range(200))
def test_flipped_bytes_never_do_more_than_raise_a_named_error(seed: int):
    """A message with random bytes changed is read, or ends in ProtocolError; nothing else."""
    generator = random.Random(seed)
    frames = [bytearray(f) for f in message_of({"a": torch.randn(3, 5), "b": torch.arange(4)})]
    for _ in range(generator.randint(1, 4)):
        frame = generator.choice(frames)
        frame[generator.randrange(min(len(frame), 80))] = generator.randrange(256)

    try:
        message = assembled([bytes(frame) for frame in frames])
        tensors = read_tensors(message) if message is not None else {}
    except ProtocolError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_a_dtype_without_a_name_is_not_sent():
    """A complex tensor is a ProtocolError at the sender."""
    with pytest.raises(ProtocolError, match="complex64"):
        message_of({"t": torch.ones(2, dtype=torch.complex64)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value: float):
    """One value that is no number is NotFinite, with how many there are and the hint."""
    tensor = torch.ones(3, 3)
    tensor[1, 1] = value

    with pytest.raises(NotFinite, match=r"the loss has 1 of 9 values .*: look here"):
        refuse_not_finite(tensor, "the loss", "look here")
