"""Acceptance tests at the sizes of the audit's specification; smaller ones stand beside the code.

They take minutes each on one core; benchmarks/acceptance runs them and keeps what they measured.
"""

# Shapes:  B texts   T tokens   D model width   V vocabulary

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.audit.forward_search import SearchSettings, forward_search
from cutlayer.audit.metrics import clopper_pearson
from cutlayer.audit.public import PublicModel
from cutlayer.privacy.two_server import KAPPA, shares
from tests.audit.test_forward_search import CASES
from tests.audit.test_labels import sent as sent_at_the_upper_cut
from tests.audit.test_labels import share_found, whole_model
from tests.audit.victims import (
    DATA,
    clinical_ids,
    public_of,
    random_ids,
    sent,
    smollm2,
    write_gpt2,
)

pytestmark = pytest.mark.slow

TEXTS, TOKENS = 16, 16


def diagnoses(rows: int, tokens: int) -> Tensor:
    """Return rows of the demo's held-out wordings, one after the other, (B, T)."""
    lines = (DATA / "icd10/test.jsonl").read_text().splitlines()
    names = [json.loads(line)["prompt"][-1]["content"] for line in lines]
    ids_T = clinical_ids(". ".join(names))
    assert len(ids_T) >= rows * tokens
    return ids_T[: rows * tokens].reshape(rows, tokens)


@pytest.mark.parametrize("cut", [1, 3])
def test_gpt2_small_is_read_exactly(tmp_path: Path, cut: int, measured: Callable[..., None]):
    """T-A1: a random model of GPT-2-small's width and vocabulary, 16 texts of 16 tokens: all."""
    public = public_of(
        write_gpt2(tmp_path, width=768, vocabulary=50_257, layers=cut + 2, heads=12), bottom=cut
    )
    ids_BT = random_ids(public.vocabulary, TEXTS, TOKENS)

    found = forward_search(public, sent(public, ids_BT), list(ids_BT))

    measured(trr=found.trr)
    assert found.trr == 1.0


@pytest.mark.parametrize("cut", [1, 3])
def test_smollm2_is_read_exactly(cut: int, measured: Callable[..., None]):
    """T-A1: SmolLM2's real weights and 16 texts of 16 tokens of diagnoses: all."""
    public, ids_BT = smollm2(bottom=cut), diagnoses(TEXTS, TOKENS)

    found = forward_search(public, sent(public, ids_BT), list(ids_BT))

    measured(trr=found.trr)
    assert found.trr == 1.0


@pytest.fixture(scope="module")
def four_thousand(tmp_path_factory: pytest.TempPathFactory) -> PublicModel:
    """A random model with the width and vocabulary of the specification's own, cut at 3."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    return public_of(write_gpt2(folder, layers=6, width=192, vocabulary=4096), bottom=3)


@pytest.mark.parametrize(("hide", "settings", "least"), CASES)
def test_cheap_obfuscation_is_read_through(
    four_thousand: PublicModel,
    hide: Callable[[Tensor], Tensor],
    settings: SearchSettings,
    least: float,
    measured: Callable[..., None],
):
    """T-A1b: 16 texts of 16 tokens of a vocabulary of 4,096, every one of it tried if need be."""
    ids_BT = random_ids(4096, TEXTS, TOKENS)
    hidden = [hide(rows_TD) for rows_TD in sent(four_thousand, ids_BT)]

    found = forward_search(four_thousand, hidden, list(ids_BT), settings)

    measured(trr=found.trr)
    assert found.trr >= least


@pytest.mark.parametrize("score", ["l2", "map", "sorted_l1", "any_row", "gram"])
def test_noise_gives_chance(four_thousand: PublicModel, score: str, measured: Callable[..., None]):
    """T-A1c: 16 texts of 16 tokens of noise in place of activations are read at one in 4,096."""
    ids_BT = random_ids(4096, TEXTS, TOKENS)
    generator = torch.Generator().manual_seed(6)
    hidden = [
        rows_TD.square().mean().sqrt() * torch.randn(rows_TD.shape, generator=generator)
        for rows_TD in sent(four_thousand, ids_BT)
    ]
    settings = SearchSettings(score=score, rungs=(256,))

    found = forward_search(four_thousand, hidden, list(ids_BT), settings)

    measured(trr=found.trr)
    low, high = clopper_pearson(round(found.trr * found.tokens), found.tokens)
    assert low <= 1 / 4096 <= high


@pytest.mark.parametrize(("top", "least"), [(0, 0.98), (1, 0.95), (2, 0.93)])
def test_labels_come_back_from_real_weights(top: int, least: float, measured: Callable[..., None]):
    """T-A4: 8 texts of 32 tokens of diagnoses, SmolLM2, with none, one and two layers on top."""
    ids_BT = diagnoses(8, 32)
    model = whole_model(DATA / "smollm2")
    message = sent_at_the_upper_cut(model, DATA / "smollm2", ids_BT, ids_BT, top=top)

    found = message.inverted()

    share = share_found(message.carried_BT, found.labels_BT)
    measured(share=share)
    assert share >= least


def in_its_own_dtype(norm: Any) -> torch.nn.RMSNorm:
    """Return the same norm, computed in the dtype of its weight."""
    made = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=norm.weight.dtype)
    made.load_state_dict(norm.state_dict())
    return made.requires_grad_(False)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-2), (torch.float64, 1e-4)])
def test_two_backwards_of_a_real_trunk_add_up(
    dtype: torch.dtype, bound: float, measured: Callable[..., None]
):
    """T-D8: of SmolLM2's 26 layers the sum is exact in float64; float32 keeps two digits of it.

    Its family's norms compute in float32 whatever the weights are, so in float64 they are torch's.
    """
    model = AutoModelForCausalLM.from_pretrained(DATA / "smollm2", dtype=dtype).eval()
    model.requires_grad_(False)
    model.model.layers = model.model.layers[2:28]
    model.model.norm = torch.nn.Identity()
    if dtype == torch.float64:
        for layer in model.model.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, in_its_own_dtype(getattr(layer, name)))
    weights = [layer.self_attn.q_proj.weight.requires_grad_() for layer in model.model.layers]
    embedded_BTD = model.get_input_embeddings()(diagnoses(2, 32)).detach().requires_grad_()
    out_BTD = model.model(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
    generator = torch.Generator().manual_seed(0)
    grad_BTD = torch.randn(out_BTD.shape, generator=generator, dtype=dtype) * 1e-4

    def backward_of(upper_BTD: Tensor) -> Tensor:
        found = torch.autograd.grad(out_BTD, [embedded_BTD, *weights], upper_BTD, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in found])

    plain = backward_of(grad_BTD)
    both = sum(map(backward_of, shares(grad_BTD, KAPPA)))

    off = float((both - plain).norm() / plain.norm())
    measured(off=off)
    assert off < bound
