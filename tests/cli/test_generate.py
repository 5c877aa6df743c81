"""`cutlayer generate` and `doctor --prove` of runs with defenses, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from cutlayer.cli.generate import answers
from cutlayer.cli.main import main
from tests.cli.test_audit import FORMAL, prepared  # noqa: F401  a fixture
from tests.cli.test_by_hand import one_sentence
from tests.tokens import tokenizer

EMPIRICAL = {"split_privacy_profile": "empirical"}


def test_prompts_of_several_lengths_pass_a_defense(prepared: Any, capsys: Any):  # noqa: F811
    """The mask of a KV cache is longer than what leaves, and the noise is on what leaves."""
    words = ["generate", "--config", prepared(**EMPIRICAL), "--max_new_tokens", "3"]

    assert main([*words, "--prompt", "w20 w21", "--prompt", "w20 w21 w22 w23"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("settings", [EMPIRICAL, FORMAL], ids=["empirical", "formal"])
def test_a_run_with_defenses_is_proven_without_them(
    settings: dict[str, Any],
    prepared: Any,  # noqa: F811
    capsys: Any,
):
    """What the doctor sends is made up, so nothing is booked and the two models are equal."""
    assert main(["doctor", "--config", prepared(**settings), "--prove"]) == 0
    assert "equal bit for bit" in capsys.readouterr().out


REFUSED = {
    "within a budget": (FORMAL, [], "each new token would be one more of the whole prompt"),
    "no text": ({"split_task": "sequence-classification"}, [], "generates no text"),
    "no tokens": ({}, ["--max_new_tokens", "0"], "must be at least 1"),
    "no template": ({}, ["--system", "Be brief."], "needs a chat template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_generated_is_refused(name: str, prepared: Any, capsys: Any):  # noqa: F811
    """Before the server is reached, in one sentence."""
    settings, more, told = REFUSED[name]
    words = ["generate", "--config", prepared(**settings), "--prompt", "w20", *more]

    assert one_sentence(words, capsys, told) == 2


def test_a_prompt_begins_as_in_training():
    """Without a chat template the tokenizer puts its own first token, as the trainer does."""
    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    seen = []

    def generate(input_ids: torch.Tensor, **_settings: Any) -> torch.Tensor:
        seen.append(input_ids)
        return input_ids

    answers(SimpleNamespace(eval=lambda: None, generate=generate), words, ["w20"])

    assert seen[0].tolist() == words(["w20"])["input_ids"] == [[1, 20]]
