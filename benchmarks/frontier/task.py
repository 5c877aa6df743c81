"""The demo's task in its shortest form: a wording goes in, its chapter's first token comes out.

    <wording>, a new line, "ICD chapter:"  ->  " Circulatory" | " Neoplasms" | …

No two chapters share their first token, so it decides which one is meant. Nothing of the answer is
among the tokens that are sent: a release that pools a whole sequence cannot give it away.
"""

# Shapes:  B batch   T tokens   A answers

from __future__ import annotations

import collections
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Batch", "Sample", "Task"]

QUESTION = "\nICD chapter:"


@dataclass(frozen=True)
class Sample:
    """A wording's tokens, and the number of its chapter."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Batch:
    """Samples with the question behind each, padded at the left."""

    ids_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor
    answer_B: Tensor

    @property
    def sent(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a model is called with."""
        return self.ids_BT, self.mask_BT, self.positions_BT


@dataclass(frozen=True)
class Task:
    """Samples to train on and to score, and how they are asked."""

    train: list[Sample]
    test: list[Sample]
    question: tuple[int, ...]
    answers_A: Tensor
    """The first token of each chapter's name."""

    @classmethod
    def of_icd10(cls, model: Path, folder: Path) -> Task:
        """Return the demo's task."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        lines = {
            part: [json.loads(line) for line in (folder / f"{part}.jsonl").open()]
            for part in ("train", "test")
        }
        names = sorted({line["completion"][0]["content"] for line in lines["train"]})
        firsts = [tokenizer.encode(f" {name}")[0] for name in names]
        assert len(set(firsts)) == len(names)

        def samples(part: str) -> list[Sample]:
            return [
                Sample(
                    tuple(tokenizer.encode(line["prompt"][-1]["content"])),
                    names.index(line["completion"][0]["content"]),
                )
                for line in lines[part]
            ]

        question = tuple(tokenizer.encode(QUESTION))
        return cls(samples("train"), samples("test"), question, torch.tensor(firsts))

    @classmethod
    def tiny(cls, text: Path) -> Task:
        """Return a task of bytes for the quick form: words, sorted by their first letter."""
        words = sorted({word for word in text.read_text().lower().split() if word.isalpha()})
        samples = [Sample(tuple(word.encode()), ord(word[0]) % 4) for word in words]
        random.Random(0).shuffle(samples)
        return cls(samples[24:], samples[:24], tuple(b" ?"), torch.tensor([1, 2, 3, 4]))

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Return samples as a model takes them."""
        rows = [(*sample.ids, *self.question) for sample in samples]
        width = max(map(len, rows))
        ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for number, row in enumerate(rows):
            ids_BT[number, width - len(row) :] = torch.tensor(row)
            mask_BT[number, width - len(row) :] = 1
        answer_B = torch.tensor([sample.answer for sample in samples])
        return Batch(ids_BT, mask_BT, (mask_BT.cumsum(1) - 1).clamp_min(0), answer_B)

    def batches(self, steps: int, size: int, seed: int) -> Iterator[Batch]:
        """Yield training batches of samples of like length, no sample twice."""
        drawn = random.Random(seed)
        chosen = drawn.sample(self.train, steps * size)
        chosen.sort(key=lambda sample: len(sample.ids))  # stable, so the draw decides among equals
        starts = [step * size for step in range(steps)]
        drawn.shuffle(starts)
        for start in starts:
            yield self.batch(chosen[start : start + size])

    def held_out(self, count: int, size: int) -> Iterator[Batch]:
        """Yield the first `count` test samples by length."""
        chosen = sorted(self.test[:count], key=lambda sample: len(sample.ids))
        for start in range(0, len(chosen), size):
            yield self.batch(chosen[start : start + size])

    def guessing(self, count: int) -> float:
        """Return the accuracy of always naming the commonest answer of the test samples."""
        counted = collections.Counter(sample.answer for sample in self.test[:count])
        return max(counted.values()) / sum(counted.values())
