"""`chunks="auto"` is a fixed number once it is found, and a resumed run has the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.client.savepoints import RECORD
from cutlayer.errors import ConfigError
from tests.equivalence.test_trl import trainer_of
from tests.site import Loop, Site, adapter_of, batch_of, equal, lora


def steps_of(split: Any, numbers: range, counts: dict[int, int]) -> list[Any]:
    """Do steps, with so many chunks as `counts` says or has learnt."""
    torch.manual_seed(3)
    loop = Loop.over(split)
    seen = []
    for number in numbers:
        if number in counts:
            split.chunks = counts[number]
        seen += loop.step(batch_of(number))
        counts.setdefault(number, split.chunks)
    return seen


def test_auto_is_the_same_fixed_numbers(llama: Site):
    """Losses, norms and adapter are those of a run that is told the numbers, to the bit."""
    counts: dict[int, int] = {}
    with llama.connect(chunks="auto") as split:
        found = steps_of(split, range(9), counts), adapter_of(split)
        assert split.tuning.found == counts[8]
    with llama.connect(chunks=1) as split:
        expected = steps_of(split, range(9), counts), adapter_of(split)

    assert equal(expected, found)
    assert [counts[number] for number in range(6)] == [2, 2, 2, 4, 4, 4]
    assert len({counts[number] for number in range(6, 9)}) == 1


def test_the_last_batch_of_an_epoch_is_not_compared(llama: Site):
    """It has fewer rows than the others, wherever in the search it comes."""
    with llama.connect(chunks="auto") as split:
        loop, counts = Loop.over(split), []
        for rows in (3, 8, 3, 8, 8, 3, 8, 3, 8, 8, 8):
            loop.step(batch_of(len(counts), rows=rows))
            counts.append(split.chunks)

        assert counts[:-1] == [2, 2, 2, 2, 2, 8, 8, 8, 8, 8]
        assert split.tuning.found == counts[-1]


def test_an_evaluation_decides_nothing(llama: Site):
    """Forwards without a backward are in one piece, and no step of the search."""
    with llama.connect(chunks="auto") as split, torch.no_grad():
        split.eval()
        for number in range(8):
            split(**batch_of(number))

        assert split.tuning.found is None
        assert split.chunks == 1


def test_a_resumed_run_has_the_number_of_its_checkpoint(llama: Site, tmp_path: Path):
    """The number stands in the checkpoint's record, and the run goes on bit for bit."""
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 8,
        "max_steps": 11,
    }
    with llama.connect(chunks="auto", run="auto") as split:
        trainer = trainer_of(split, tmp_path, **settings)
        trainer.train()
        expected, number = adapter_of(split), split.tuning.found
    record = json.loads((tmp_path / "checkpoint-8" / RECORD).read_text())
    with llama.connect(chunks="auto", run="auto") as split:
        trainer = trainer_of(split, tmp_path, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))

        assert record["chunks"] == split.tuning.found == split.chunks == number
        assert equal(expected, adapter_of(split))


def test_another_word_is_refused(llama: Site):
    """Only `auto` is a word for a number."""
    with pytest.raises(ConfigError, match="chunks=many must be a number of at least 1, or 'auto'"):
        llama.connect(chunks="many", peft_config=lora())
