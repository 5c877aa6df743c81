"""Any family that is cut is exact: no code for a family, so the families are the test."""

from __future__ import annotations

import pytest
import torch

from cutlayer.errors import CannotCut
from cutlayer.split.cut import REFUSED, Cut, refuse_by_name
from tests.families import CUTS, faults_of, generation_of, verdict_on
from tests.tiny import CAUSAL_TYPES, CLASSIFICATION_TYPES, tiny_config

# All kinds of anatomy: tuples and tensors, tied and untied, learned, rotary and ALiBi positions,
# windows, soft caps, multipliers, mixtures of experts, parallel blocks, latent attention.
QUICK_CAUSAL = [
    "bert", "biogpt", "bloom", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "falcon", "gemma",
    "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss",
    "gptj", "granite", "llama", "minicpm3", "mistral", "mixtral", "modernbert-decoder", "mpt",
    "nemotron", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
QUICK_CLASSIFICATION = ["bert", "distilbert", "electra", "llama", "modernbert", "roberta"]


@pytest.mark.parametrize("model_type", QUICK_CAUSAL)
def test_causal_family_is_exact(model_type: str):
    """Logits, loss and every gradient are the whole model's, at three cuts and all paddings."""
    assert faults_of(model_type, "causal-lm", attention="eager") == []


@pytest.mark.parametrize("model_type", QUICK_CLASSIFICATION)
def test_classifier_is_exact(model_type: str):
    """A classifier's logits, loss and every gradient are the whole model's."""
    assert faults_of(model_type, "sequence-classification", attention="sdpa") == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3", "phi3", "cohere2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sdpa_is_exact_in_either_dtype(model_type: str, dtype: torch.dtype):
    """With sdpa too, in float32 and in bfloat16, nothing differs."""
    assert faults_of(model_type, "causal-lm", attention="sdpa", dtype=dtype, cuts=CUTS[-1:]) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bloom", "gemma3_text", "gpt_oss"])
def test_generation_is_exact_to_the_last_logit(model_type: str):
    """Greedy generation with a KV cache on both sides gives the whole model's logits."""
    assert generation_of(model_type) == "exact"


@pytest.mark.parametrize(
    "layers", [(lower, upper) for lower in range(6) for upper in range(lower + 1, 7)]
)
def test_every_cut_of_a_llama_is_exact(layers: tuple[int, int]):
    """All 21 cuts 0 <= a < b <= L of a model of six layers are exact."""
    found = faults_of(
        "llama",
        "causal-lm",
        attention="sdpa",
        cuts=(Cut(*layers),),
        paddings=("left",),
        loaded=False,
    )

    assert found == []


def test_packed_sequences_are_exact():
    """Several samples in one row, told apart by their position ids alone, are exact."""
    from tests.loopback import differences, split_copies
    from tests.tiny import tiny_batch, tiny_model

    whole = tiny_model("llama")
    batch = tiny_batch(whole.config, task="causal-lm", padding="none", batch=1, tokens=12)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])

    assert differences(whole, split_copies(whole, Cut(2, 5)), batch) == []


@pytest.mark.parametrize("model_type", sorted(REFUSED.keys() & set(CAUSAL_TYPES)))
def test_refused_family_is_refused_by_name(model_type: str):
    """A family that cannot be cut is refused from its config alone, with its name and why."""
    config = tiny_config(model_type)

    with pytest.raises(CannotCut, match=rf"models of type '{config.model_type}' cannot be cut: \w"):
        refuse_by_name(config)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_causal_sweep(model_type: str):
    """Every causal type is exact, or refused with a reason; none differs silently."""
    verdict = verdict_on(model_type, "causal-lm")

    assert verdict.kind in ("exact", "refused", "not buildable"), verdict.reason
    assert verdict.generates != "DIFFERS"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CLASSIFICATION_TYPES)
def test_classification_sweep(model_type: str):
    """Every classification type is exact, or refused with a reason; none differs silently."""
    verdict = verdict_on(model_type, "sequence-classification")

    assert verdict.kind in ("exact", "refused", "not buildable"), verdict.reason
