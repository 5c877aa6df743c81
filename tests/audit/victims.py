"""Models to attack and texts that they read: random ones of a GPT-2's shape, and the demo's own."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cutlayer.audit.public import PublicModel
from cutlayer.errors import CutlayerError

DATA = Path(__file__).parents[2] / ".data"  # made by `make test`

CLINICAL = (
    "Patient Maria Oberholzer, born 14 March 1961, was admitted with acute appendicitis "
    "and type 2 diabetes; her insulin was stopped."
)
"""Made up."""


def write_gpt2(
    folder: Path,
    *,
    layers: int = 4,
    width: int = 96,
    vocabulary: int = 1024,
    heads: int = 4,
    seed: int = 0,
) -> Path:
    """Write a GPT-2 of this shape, drawn as Hugging Face draws it, to `folder`."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=128, n_embd=width, n_layer=layers, n_head=heads
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def public_of(folder: Path, *, bottom: int = 2, top: int = 1, **settings: object) -> PublicModel:
    """Return the ends of the model in `folder`, as an attacker has them."""
    return PublicModel.load(str(folder), bottom_layers=bottom, top_layers=top, **settings)


@functools.cache
def smollm2(*, bottom: int = 2, top: int = 2) -> PublicModel:
    """Return the ends of SmolLM2-135M with its real weights, once a cut."""
    return public_of(DATA / "smollm2", bottom=bottom, top=top)


@functools.cache
def tokenizer_of_smollm2() -> AutoTokenizer:
    """Return its tokenizer."""
    return AutoTokenizer.from_pretrained(DATA / "smollm2")


def clinical_ids(text: str = CLINICAL) -> Tensor:
    """Return the tokens of a sentence for SmolLM2, (T,)."""
    return tokenizer_of_smollm2()(text, return_tensors="pt").input_ids[0]


def random_ids(vocabulary: int, sequences: int, tokens: int, *, seed: int = 0) -> Tensor:
    """Return texts of tokens drawn evenly, (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, tokens), generator=generator)


@torch.no_grad()
def sent(public: PublicModel, ids_BT: Tensor) -> list[Tensor]:
    """Return what a client sends for each text, (T, D) each."""
    return list(public.bottom(ids_BT))


def rotation(width: int, *, seed: int = 0) -> Tensor:
    """Return a secret rotation, (D, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def quantiser(bits: int) -> Callable[[Tensor], Tensor]:
    """Return a map that rounds each row to this many bits, scaled to its largest element."""
    levels = 2 ** (bits - 1) - 1

    def quantise(rows_TD: Tensor) -> Tensor:
        step_T1 = rows_TD.abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
        return (rows_TD / step_T1).round() * step_T1

    return quantise


def noisy(rows_TD: Tensor, ratio: float, *, seed: int = 0) -> tuple[Tensor, float]:
    """Return the rows with Gaussian noise of `ratio` times their rms, and its sigma."""
    sigma = ratio * float(rows_TD.square().mean().sqrt())
    generator = torch.Generator().manual_seed(seed)
    return rows_TD + sigma * torch.randn(rows_TD.shape, generator=generator), sigma


def refusal(error: BaseException) -> str:
    """Return an error's sentence, or fail if it is not one that a user should read."""
    assert isinstance(error, CutlayerError)
    text = str(error)
    assert "\n" not in text
    assert not text.endswith(".")
    return text
