"""A bottom that is run before its batch comes gives what it gives in its turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.equivalence.test_trl import logged, trainer_of
from tests.site import Loop, Site, adapter_of, batch_of, equal, lora

BATCHES = [batch_of(seed) for seed in range(6)]


def trained(
    site: Site, *, told: bool, another: int = 0, use_cache: bool = False, **given: Any
) -> tuple[Any, Any, int]:
    """Train over the batches; return what was seen, the adapter, and how many bottoms were early.

    `another` is how many batches further the one is that is told, where it is not the next.
    """
    with site.connect(chunks=4, **given) as split:
        torch.manual_seed(3)
        loop = Loop.over(split)
        seen = []
        batches: list[Any] = [{**batch, "use_cache": use_cache} for batch in BATCHES]
        for number, batch in enumerate(batches):
            if told and number + 1 < len(batches):
                split.comes(batches[(number + 1 + another) % len(batches)])
            seen += loop.step(batch) if not split.lean_head else _step(loop, batch)
        return seen, adapter_of(split), split.ahead.used


def _step(loop: Loop, batch: Any) -> list[Any]:
    """Do a step of a model that returns no logits."""
    loss = loop.model(**batch).loss
    loss.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    return [loss.detach()]


@pytest.mark.parametrize("given", [{}, {"use_cache": True}, {"lean_head": True}])
def test_a_frozen_bottom_may_run_early(llama: Site, given: dict[str, Any]):
    """Not a bit changes, and bottoms are run early indeed."""
    frozen = ("trunk", "top")
    *expected, none = trained(llama, told=False, train=frozen, **given)
    *found, used = trained(llama, told=True, train=frozen, **given)

    assert equal(expected, found)
    assert none == 0
    assert used > 0


def test_a_trained_bottom_never_runs_early(llama: Site):
    """What the step changes cannot be computed before it."""
    *expected, _none = trained(llama, told=False)
    *found, used = trained(llama, told=True)

    assert equal(expected, found)
    assert used == 0


def test_another_batch_may_come_than_was_told(llama: Site):
    """What was run for a batch that does not come is dropped."""
    *expected, _none = trained(llama, told=False, train=("trunk",))
    *found, used = trained(llama, told=True, another=1, train=("trunk",))

    assert equal(expected, found)
    assert used == 0


def test_a_bottom_with_dropout_never_runs_early(folder_of: Any, serve: Any):
    """Its dropout is drawn in its turn: what was drawn early would be another."""
    site = serve(folder_of("gpt2"))
    with site.connect(chunks=2, train=("trunk",), peft_config=lora(), embd_pdrop=0.3) as split:
        loop = Loop.over(split)
        for number in range(3):
            split.comes(BATCHES[number + 1])
            loop.step(BATCHES[number])

        assert split.ahead.used == 0


class Plain(DataCollatorForLanguageModeling):
    """TRL's collator under a name that nobody knows, so that nothing is fetched early."""


def test_a_trainer_tells_what_comes(llama: Site, tmp_path: Path):
    """SFTTrainer's batches are fetched a step early; losses and adapter are the same to the bit."""
    runs, used = [], []
    for kind in (Plain, DataCollatorForLanguageModeling):
        with llama.connect(chunks=2, train=("trunk", "top")) as split:
            trainer = trainer_of(split, tmp_path / kind.__name__, gradient_accumulation_steps=1)
            trainer.data_collator.__class__ = kind
            trainer.train()
            runs.append((logged(trainer), adapter_of(split)))
            used.append(split.ahead.used)

    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    assert used[0] == 0
    assert used[1] > 0
