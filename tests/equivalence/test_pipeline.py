"""A batch in micro-chunks, each with its backward as it arrives, is the batch in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from tests.equivalence.test_trl import logged, trainer_of
from tests.site import Loop, ServerProcess, Site, adapter_of, batch_of, equal, lora

# Sums over other rows round otherwise; in float64 no more than this. The loss of transformers is
# in float32 even then, so gradients differ by its rounding.
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def site(folder_of: Any, serve: Any) -> Site:
    """A llama in float64."""
    return serve(folder_of("llama", dtype=torch.float64), dtype="float64")


def gradients_of(model: Any) -> list[Tensor | None]:
    """Return the client's gradients, and the norms of the trunk's."""
    own = [p.grad for p in model.parameters() if p.requires_grad]
    norms = model.connection.norms
    return [*own, torch.zeros(0) if norms is None else norms.clone()]


def backward_of(model: Any, *batches: dict[str, Tensor], by_labels: bool, factor: float = 1) -> Any:
    """Do a forward and a backward of each batch."""
    for batch in batches:
        labels = batch["labels"]
        if by_labels:
            loss = model(**batch).loss
        else:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            loss = model.hf_model.loss_function(logits, labels, vocab_size=logits.shape[-1])
        (loss * factor).backward()
    return gradients_of(model)


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("train", [("bottom", "trunk", "top"), ("trunk",), ("top",), ("bottom",)])
def test_by_arrival_is_the_plain_pipeline_is_the_whole(site: Site, chunks: int, train: Any):
    """The three ways to do a batch give the same gradients, accumulated over two batches."""
    batches = batch_of(1), batch_of(2)
    found = []
    for pieces, by_labels in ((1, True), (chunks, False), (chunks, True)):
        with site.connect(dtype="float64", chunks=pieces, train=train) as split:
            found.append(backward_of(split.train(), *batches, by_labels=by_labels))

    whole, plain, by_arrival = found
    torch.testing.assert_close(whole, plain, **ROUNDING)
    torch.testing.assert_close(plain, by_arrival, **ROUNDING)


@pytest.mark.parametrize("factor", [0.25, 1 / 3, -2.0])
def test_a_factor_from_above_reaches_both_sides(site: Site, factor: float):
    """A trainer may multiply the loss by anything: both sides' gradients follow."""
    with site.connect(dtype="float64", chunks=2) as split:
        expected = backward_of(split.train(), batch_of(1), by_labels=True)
    with site.connect(dtype="float64", chunks=2) as split:
        found = backward_of(split.train(), batch_of(1), by_labels=True, factor=factor)

    expected = [grad * factor for grad in expected[:-1]] + [expected[-1] * abs(factor)]
    torch.testing.assert_close(expected, found, **ROUNDING)


def test_two_losses_may_be_added(site: Site):
    """Two batches whose losses are differentiated together accumulate as one after the other."""
    one, two = batch_of(1), batch_of(2)
    with site.connect(dtype="float64", chunks=2) as split:
        expected = backward_of(split.train(), one, two, by_labels=True)
    with site.connect(dtype="float64", chunks=2) as split:
        split.train()
        (split(**one).loss + split(**two).loss).backward()
        found = gradients_of(split)

    torch.testing.assert_close(expected, found, **ROUNDING)


def test_a_loss_that_is_never_differentiated_leaves_no_trace(site: Site):
    """Forwards in training mode without a backward change nothing, on either side."""
    runs = []
    for idle_forwards in (0, 2):
        with site.connect(dtype="float64", chunks=2) as split:
            loop = Loop.over(split)
            seen = []
            for seed in range(3):
                for _ in range(idle_forwards):
                    split(**batch_of(9 + seed))
                seen += loop.step(batch_of(seed))
            runs.append((seen, adapter_of(split)))

    assert equal(*runs)


def test_dropout_is_the_same_from_run_to_run(llama: Site, tmp_path: Path):
    """The order in which chunks arrive decides nothing about their dropout."""
    # In a process of its own: here the two sides would draw from one generator at once.
    with ServerProcess(llama.folder, llama.certs, tmp_path) as server:
        apart = Site(llama.folder, llama.certs, server)
        runs = []
        for dropout in (0.3, 0.3, 0.0):
            with apart.connect(chunks=4, peft_config=lora(lora_dropout=dropout)) as split:
                torch.manual_seed(5)
                loop = Loop.over(split)
                runs.append([loop.step(batch_of(seed)) for seed in range(5)])

    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_a_chunk_without_supervised_tokens_counts_for_nothing(site: Site):
    """Rows whose labels are all ignored neither weigh nor break the mean."""
    batch = batch_of(1)
    batch["labels"][:2] = -100
    found = []
    for chunks in (1, 2):
        with site.connect(dtype="float64", chunks=chunks) as split:
            found.append(backward_of(split.train(), batch, by_labels=True))

    torch.testing.assert_close(found[0], found[1], **ROUNDING)


def test_autocast_is_that_of_the_plain_pipeline(llama: Site):
    """Under bfloat16 autocast the gradients are those that a backward outside of it gives."""
    found = []
    for by_labels in (False, True):
        with llama.connect(chunks=2) as split:
            split.train()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                batch = batch_of(1)
                labels = batch["labels"] if by_labels else batch.pop("labels")
                output = split(**batch)
                loss = output.loss
            if not by_labels:
                logits = output.logits
                loss = split.hf_model.loss_function(logits, labels, vocab_size=logits.shape[-1])
            loss.backward()
            found.append(gradients_of(split))

    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=1e-5)
    assert found[0][0].dtype == torch.float32


def test_logits_beside_the_loss_cannot_be_differentiated(site: Site):
    """A second loss made of the logits is refused, not silently without a gradient."""
    with site.connect(dtype="float64", chunks=2) as split:
        output = split.train()(**batch_of(1))
        with pytest.raises(ConfigError, match="leave the labels out"):
            (output.loss + output.logits.square().mean()).backward()


def test_a_second_backward_is_refused(site: Site):
    """A loss is differentiated once."""
    with site.connect(dtype="float64", chunks=2) as split:
        loss = split.train()(**batch_of(1)).loss
        loss.backward(retain_graph=True)
        with pytest.raises(ConfigError, match="done once"):
            loss.backward()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_trl_in_chunks_is_trl_unchunked(llama: Site, tmp_path: Path, accumulate: int):
    """SFTTrainer's losses and norms are those of the unchunked run, and so is the adapter."""
    runs, adapters = [], []
    for chunks in (1, 2):
        with llama.connect(chunks=chunks) as split:
            trainer = trainer_of(
                split,
                tmp_path / str(chunks),
                max_steps=4,
                gradient_accumulation_steps=accumulate,
                per_device_train_batch_size=4,
            )
            changes = split.connection.gradient_changes()
            trainer.train()
            changes = split.connection.gradient_changes() - changes
            runs.append(logged(trainer))
            adapters.append(adapter_of(split))
            # Each batch has a backward for each chunk and, done by arrival, a commit.
            backwards = 4 * accumulate * (1 if chunks == 1 else chunks + 1)
            assert changes == backwards + 4

    # In float32, and AdamW's first steps divide a gradient by its own size.
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    torch.testing.assert_close(*adapters, rtol=0, atol=2e-4)
