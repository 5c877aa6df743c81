"""A codec gives the same bits in whatever form, and beside whatever tokens, it is computed."""

from __future__ import annotations

import pytest
import torch

from cutlayer.wire import one_pass
from cutlayer.wire.codecs import CODECS
from cutlayer.wire.levels import LEVELS, rotation, told
from cutlayer.wire.statics import Statics

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
    pytest.importorskip("numba")
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
