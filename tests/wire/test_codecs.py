"""One battery for every codec of the table."""

from __future__ import annotations

import pytest
import torch

from cutlayer.wire.codecs import CODECS

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool]

# The relative error that a codec states for floats of more bits than it keeps.
STATED_ERROR = {"raw": 0.0, "bf16": 2**-8, "int32": 0.0}

every_codec = pytest.mark.parametrize("name", CODECS)


def through(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it comes out of a codec."""
    codec = CODECS[name]
    return codec.decode(codec.encode(tensor), tensor.dtype)


def test_every_codec_states_its_error():
    """A codec that is added to the table must state its error here."""
    assert STATED_ERROR.keys() == CODECS.keys()


@every_codec
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_come_back_within_the_stated_error(name: str, dtype: torch.dtype):
    """The error of each value is at most what the codec states, relative to it."""
    tensor_BTD = (10 * torch.randn(2, 5, 16, dtype=torch.float64)).to(dtype)

    found_BTD = through(name, tensor_BTD)

    error_BTD = (found_BTD.double() - tensor_BTD.double()).abs()
    assert bool((error_BTD <= STATED_ERROR[name] * tensor_BTD.double().abs()).all())


@every_codec
@pytest.mark.parametrize("dtype", INTEGERS)
def test_masks_and_positions_come_back_exactly(name: str, dtype: torch.dtype):
    """Integers of the size of positions are kept by every codec."""
    tensor_BT = torch.tensor([[0, 1, 2], [1, 0, 1]]).to(dtype)

    assert torch.equal(tensor_BT, through(name, tensor_BT))


@every_codec
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3, 4), (1,), ()])
def test_dtype_and_shape_are_kept(name: str, dtype: torch.dtype, shape: tuple[int, ...]):
    """What comes out has the dtype and shape of what went in, empty tensors included."""
    tensor = torch.ones(shape).to(dtype)
    codec = CODECS[name]

    stored, found = codec.encode(tensor), through(name, tensor)

    assert (stored.dtype, stored.shape) == (codec.stored_dtype(dtype), tensor.shape)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)


@every_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(name: str, value: float):
    """NaN and infinity come out as such, so that the check behind the codec sees them."""
    tensor = torch.tensor([1.0, value, -2.0])

    found = through(name, tensor)

    assert torch.isfinite(found).tolist() == [True, False, True]


@every_codec
def test_no_token_sees_a_later_one(name: str):
    """Changing one token changes no other token's decoded values."""
    tensor_BTD = torch.randn(2, 6, 8)
    changed_BTD = tensor_BTD.clone()
    changed_BTD[:, 3] = 1e4 * torch.randn(2, 8)

    before_BTD, after_BTD = through(name, tensor_BTD), through(name, changed_BTD)

    others = [0, 1, 2, 4, 5]
    assert torch.equal(before_BTD[:, others], after_BTD[:, others])
