"""An adapter that is taken up is the adapter that was trained, and nothing more."""

# Shapes:  B batch   T tokens

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cutlayer.errors import Refused
from tests.site import Loop, Site, batch_of, lora


def test_an_adapter_taken_up_evaluates_without_dropout(llama: Site, tmp_path):
    """A new session evaluates like stock peft, though its LoRA has dropout and never trained."""
    batch = batch_of(1)
    with llama.connect(peft_config=lora(lora_dropout=0.5)) as split:
        Loop.over(split).step(batch_of(2))
        split.save_pretrained(tmp_path / "adapter")

    with llama.connect(peft_config=lora(lora_dropout=0.5)) as again, torch.no_grad():
        again.take_up(tmp_path / "adapter")
        found = again.eval()(**batch).logits

    base = AutoModelForCausalLM.from_pretrained(llama.folder)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, found)


def test_an_adapter_without_the_trunks_half_is_refused(llama: Site, tmp_path):
    """An adapter of the ends alone leaves no trunk as it happens to be."""
    with llama.connect(train=("bottom", "top")) as split:
        split.save_pretrained(tmp_path)

    with llama.connect() as again, pytest.raises(Refused, match="has nothing for the trunk"):
        again.take_up(tmp_path)
