"""A tokenizer and a dataset made in memory, for trainers that insist on them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}


def tokenizer() -> Any:
    """Return a tokenizer of 97 words, whose pad and end are those of the tiny models."""
    words = SPECIAL | {f"w{i}": i for i in range(4, 97)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def dataset(rows: int, *, seed: int = 0) -> Dataset:
    """Return texts of 4 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (rows,), generator=generator).tolist()
    texts = [
        " ".join(f"w{i}" for i in torch.randint(12, 80, (length,), generator=generator).tolist())
        for length in lengths
    ]
    return Dataset.from_dict({"text": texts})
