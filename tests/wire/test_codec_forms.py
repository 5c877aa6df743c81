"""A codec gives the same bits in whatever form, and beside whatever tokens, it is computed."""

from __future__ import annotations

import pytest
import torch

from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire import one_pass
from cutlayer.wire.codecs import CODECS
from cutlayer.wire.frames import Message
from cutlayer.wire.levels import LEVELS, rotation, told
from cutlayer.wire.statics import Learner, Statics
from cutlayer.wire.tensors import attach_tensors, read_tensors

ROTATED = [name for name in CODECS if name.startswith(("rotated", "waterfill"))]
BY_THEMSELVES = [
    name
    for name, codec in CODECS.items()
    if codec.learns != "basis" and not name.startswith("waterfill")
]


def tokens(width: int, count: int = 500) -> torch.Tensor:
    """Return tokens with a mean, of unlike size, some of them long, tiny, nothing or no numbers."""
    drawn = torch.Generator().manual_seed(width)
    x_ND = torch.randn(count, width, generator=drawn) * torch.logspace(0.5, -0.5, width)
    x_ND = x_ND * torch.logspace(1, -2, count)[torch.randperm(count, generator=drawn)][:, None]
    x_ND[::50] += 40 * torch.randn(width, generator=torch.Generator().manual_seed(1))
    x_ND[7], x_ND[8], x_ND[9] = 0.0, 1e-20, 1e20
    x_ND[10, 3], x_ND[11, 4], x_ND[12, 5] = float("nan"), float("inf"), -float("inf")
    x_ND[13] = 0.0
    x_ND[13, :64] = rotation(64, torch.device("cpu"))[:, 5]  # one value, once it is rotated
    return x_ND


def statics_of(x_ND: torch.Tensor, name: str) -> Statics | None:
    """Return the mean of the tokens without sinks, and that of the sinks, if a codec has such."""
    if CODECS[name].learns != "mean":
        return None
    return Statics(x_ND[14:50].mean(0), x_ND[50:500:50].mean(0))


@pytest.mark.parametrize("width", [64, 192, 576])
@pytest.mark.parametrize("name", ROTATED)
def test_one_pass_gives_the_bits_of_the_products(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
):
    """Bytes are the same with numba and without, values too; either side may lack it."""
    assert one_pass.IS_HERE, "no numba here: make installs it"
    x_ND, codec = tokens(width), CODECS[name]
    for statics in {statics_of(x_ND, name), None}:
        stored = codec.encode(x_ND, statics)
        found_ND = codec.decode(stored, x_ND.shape, x_ND.dtype, statics)
        with monkeypatch.context() as without:
            without.setattr(one_pass, "IS_HERE", False)
            assert torch.equal(codec.encode(x_ND, statics), stored)
            plain_ND = codec.decode(stored, x_ND.shape, x_ND.dtype, statics)
        assert torch.equal(plain_ND.nan_to_num(7.0), found_ND.nan_to_num(7.0))


@pytest.mark.parametrize("has_numba", [True, False])
@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_a_token_has_the_same_bytes_in_any_company(
    name: str, has_numba: bool, monkeypatch: pytest.MonkeyPatch
):
    """Alone, among others, and at whatever place of what is worked on at a time."""
    monkeypatch.setattr(one_pass, "IS_HERE", has_numba and one_pass.IS_HERE)
    x_ND, codec = tokens(192), CODECS[name]
    monkeypatch.setattr(type(codec), "block_values", 100 * 192, raising=False)
    for statics in {statics_of(x_ND, name), None}:
        together = codec.decode(
            codec.encode(x_ND, statics).view(-1).view(torch.uint8), x_ND.shape, x_ND.dtype, statics
        )
        for count in (1, 3, 70):
            some_ND = x_ND[-count:]
            stored = codec.encode(some_ND, statics).view(-1).view(torch.uint8)
            found_ND = codec.decode(stored, some_ND.shape, x_ND.dtype, statics)
            assert torch.equal(found_ND, together[-count:])


@pytest.mark.parametrize("name", [name for name in CODECS if CODECS[name].learns != "basis"])
def test_autocast_changes_no_bit(name: str):
    """A client under autocast rotates in float32 like one without."""
    x_ND, codec = torch.randn(20, 192, generator=torch.Generator().manual_seed(0)), CODECS[name]
    stored = codec.encode(x_ND).view(-1).view(torch.uint8)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = codec.encode(x_ND).view(-1).view(torch.uint8)
        found_ND = codec.decode(stored, x_ND.shape, x_ND.dtype)

    assert torch.equal(again, stored)
    assert torch.equal(found_ND, codec.decode(stored, x_ND.shape, x_ND.dtype))


@pytest.mark.parametrize("bits", LEVELS)
def test_sums_of_levels_are_exact(bits: int):
    """In any order a float32 holds the sum of 64 levels, so no device and library differ."""
    steps = told(bits, torch.device("cpu")).double() * 2**16

    assert torch.equal(steps, steps.round())
    assert float(steps.abs().max()) * 64 < 2**24


META = torch.device("meta")


def message_of(name: str, statics: Statics | None) -> Message:
    """Return a message with a tensor in this codec, a mask and a raw tensor."""
    head = pb.Head(sequence=1)
    sent = {"smashed": tokens(192, 60)[14:].view(2, 23, 192), "norms": torch.ones(3)}
    mask_BT = torch.ones(2, 23, dtype=torch.int64)
    parts = attach_tensors(
        head,
        sent | {"attention_mask": mask_BT},
        codecs={"smashed": name, "attention_mask": "int32"},
        statics={} if statics is None else {"smashed": statics},
    )
    return Message(head, bytearray(b"".join(parts)))


# `waterfill` asks for its scales, of which there are none on such a device.
NEVER_ASK = [name for name in CODECS if not name.startswith("waterfill")]


@pytest.mark.parametrize("name", [name for name in NEVER_ASK if name not in ("raw", "int32")])
def test_what_is_decoded_is_where_it_was_asked_for(name: str):
    """The coded tensor comes on the device, masks and raw tensors stay on the CPU."""
    statics = known(name)
    found = read_tensors(
        message_of(name, statics), statics={"smashed": statics} if statics else {}, device=META
    )

    assert {key: tensor.device.type for key, tensor in found.items()} == {
        "smashed": "meta",
        "norms": "cpu",
        "attention_mask": "cpu",
    }
    assert (found["smashed"].shape, found["smashed"].dtype) == ((2, 23, 192), torch.float32)


@pytest.mark.parametrize("name", NEVER_ASK)
def test_neither_way_waits_for_a_device(name: str):
    """On a device whose values cannot be read, encoding and decoding ask for none."""
    x_BTD = torch.randn(2, 5, 192, dtype=torch.bfloat16, device=META)
    statics, codec = known(name), CODECS[name]

    stored = codec.encode(x_BTD, statics)
    found_BTD = codec.decode(stored.view(-1).view(torch.uint8), x_BTD.shape, x_BTD.dtype, statics)

    assert stored.device == found_BTD.device == META
    assert stored.nbytes == codec.stored_bytes(x_BTD.shape, x_BTD.dtype, statics)


def known(name: str) -> Statics | None:
    """Return what a codec learns of some tokens, if anything."""
    if not CODECS[name].learns:
        return None
    learner = Learner(192, basis=CODECS[name].learns == "basis")
    learner.see(tokens(192)[None, 14:50], {})
    return learner.learnt(CODECS[name].budget)
