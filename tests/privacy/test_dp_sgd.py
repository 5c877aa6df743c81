"""DP-SGD on what the client keeps: per-example gradients, noise, epsilon, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import cutlayer
from cutlayer.errors import BudgetExhausted, ConfigError, NotFinite
from cutlayer.privacy.adapter_guarantee import noise_multiplier_for
from cutlayer.privacy.dp_sgd import PrivateTraining, make_private
from tests.site import Site, adapter_of, equal, lora, unsplit

ENDS = ("bottom", "top")
CLIP = 0.05


def examples(count: int = 24, *, tokens: int = 9) -> list[dict[str, Tensor]]:
    """Return examples of different lengths, padded at the right, some tokens not supervised."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        ids_T = torch.randint(12, 80, (tokens,), generator=generator)
        mask_T = torch.ones_like(ids_T)
        mask_T[tokens - number % 6 :] = 0
        ids_T = ids_T.masked_fill(mask_T == 0, 0)
        labels_T = ids_T.masked_fill(mask_T == 0, -100)
        labels_T[: number % 2] = -100
        found.append({"input_ids": ids_T, "attention_mask": mask_T, "labels": labels_T})
    return found


def loader(count: int = 24, *, batch_size: int = 4) -> DataLoader[Any]:
    """Return an ordinary loader."""
    return DataLoader(examples(count), batch_size=batch_size)


def batch_of(rows: int = 6) -> dict[str, Tensor]:
    """Return the first examples as one batch."""
    return next(iter(loader(batch_size=rows)))


def optimizer_for(model: Any, kind: Any = torch.optim.SGD, lr: float = 1.0) -> Any:
    """Return an optimizer over what the model trains."""
    return kind([p for p in model.parameters() if p.requires_grad], lr=lr)


def private_of(model: Any, *, kind: Any = torch.optim.SGD, **settings: Any) -> PrivateTraining:
    """Return private training with numbers that bite."""
    data = settings.pop("data", None) or loader()
    if not {"epsilon", "noise_multiplier"} & set(settings):
        settings["noise_multiplier"] = 1.0
    optimizer = settings.pop("optimizer", None) or optimizer_for(model, kind)
    return make_private(model, optimizer, data, **{"delta": 1e-3, "clip": CLIP, **settings})


@pytest.fixture
def plain(folder_of: Any) -> Any:
    """An ordinary PEFT model whose LoRA has moved from its start, so that A has gradients too."""
    model = unsplit(folder_of("llama"), lora())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def trained(model: Any) -> dict[str, Tensor]:
    """Return copies of what the model trains."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients_one_by_one(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return per-example gradients by as many ordinary backwards, of the model's own loss."""
    model.train()
    found: dict[str, list[Tensor]] = {}
    for row in range(len(batch["input_ids"])):
        model.zero_grad()
        model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found.setdefault(name, []).append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(grads) for name, grads in found.items()}


# ------------------------------------------------------------------ gradients


def test_per_example_gradients_are_those_of_a_loop(plain: Any, measured: Any):
    """T-D4: Opacus's hooks on peft's LoRA give what one backward an example gives, to 1e-5."""
    expected = gradients_one_by_one(plain, batch_of())

    found = private_of(plain).per_example_gradients(batch_of())

    measured(off=max(float((found[n] - expected[n]).abs().max()) for n in expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert max(float(grads.abs().max()) for grads in found.values()) > 0.1


def test_they_are_so_through_a_server_too(llama: Site):
    """A split model's bottom and top get the gradients of each example from one batch."""
    with llama.connect(train=ENDS) as split:
        private = private_of(split, seed=5)
        for batch in private.data_loader:
            private.step(batch)
        found = private.per_example_gradients(batch_of())
        private.close()
        expected = gradients_one_by_one(split, batch_of())

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    of_bottom = {name for name in found if "layers.0." in name or "layers.1." in name}
    assert of_bottom < set(found)
    assert all(float(found[name].abs().max()) > 1e-4 for name in of_bottom if "lora_B" in name)


def test_an_empty_batch_is_not_sent(llama: Site):
    """A step without examples asks nothing of the server and still moves the adapter by noise."""
    with llama.connect(train=ENDS) as split:
        private = private_of(split)
        requests, start = split.connection._sequence, trained(split)
        private.step({})

        assert split.connection._sequence == requests
        assert not any(torch.equal(start[name], p) for name, p in trained(split).items())


def test_training_split_is_training_unsplit(llama: Site):
    """With the same seed of the noise, the adapter of a split run is the unsplit run's, exactly."""
    with llama.connect(train=ENDS) as split:
        config = split.plan.config
        optimizer = optimizer_for(split, torch.optim.AdamW, 1e-2)
        cutlayer.attach(optimizer, split)
        private = private_of(split, optimizer=optimizer, seed=5)
        losses = [private.step(batch) for batch in private.data_loader]
        found = adapter_of(split)
    whole = llama.unsplit(config)
    start = adapter_of(whole)
    private = private_of(whole, optimizer=optimizer_for(whole, torch.optim.AdamW, 1e-2), seed=5)
    expected = [private.step(batch) for batch in private.data_loader]

    assert losses == expected
    assert equal(adapter_of(whole), found)
    assert not any(torch.equal(start[name], found[name]) for name in found)


@pytest.mark.parametrize("gone", [0, 5])
def test_one_example_moves_the_step_by_no_more_than_the_clip(plain: Any, gone: int):
    """Taking an example away, long or short, moves the sum by at most the clip: its sensitivity."""
    # One long example and seven short ones, all alike: with transformers' mean over tokens, the
    # long one leaves and the gradients of all others, which point one way, grow together.
    (long,) = examples(1, tokens=48)
    batch = {name: value.repeat(8, 1) for name, value in long.items()}
    batch["attention_mask"][1:, 3:] = 0
    batch["labels"][1:, 3:] = -100
    private = private_of(plain)
    norms_B = sum(
        g.flatten(1).square().sum(1) for g in private.per_example_gradients(batch).values()
    )
    clip = float(norms_B.sqrt()[1]) * 1.01  # so that the short ones are not clipped
    private.close()
    start = trained(plain)
    moved = []
    for kept in (list(range(8)), [row for row in range(8) if row != gone]):
        plain.load_state_dict(start, strict=False)
        private = private_of(plain, seed=9, clip=clip, noise_multiplier=1e-3)
        private.step({name: value[kept] for name, value in batch.items()})
        private.close()
        moved.append(torch.cat([p.flatten() for p in trained(plain).values()]))

    # SGD with lr 1 subtracts the noisy sum over the batch size of the loader, 4.
    distance = float((moved[0] - moved[1]).norm()) * 4
    assert 0.5 * clip < distance <= clip * (1 + 1e-3)


def test_clipping_bites(plain: Any):
    """A batch whose gradients are far above the clip moves the parameters by no more than that."""
    start = trained(plain)
    private = private_of(plain, noise_multiplier=1e-4, clip=1e-2)
    private.step(batch_of(1))

    moved = torch.cat([(p - start[n]).flatten() for n, p in trained(plain).items()])
    assert float(moved.norm()) * 4 == pytest.approx(1e-2, rel=0.02)


def test_the_noise_added_is_the_noise_booked(plain: Any):
    """A step on an empty batch moves every parameter by noise of the booked width, no more."""
    start = trained(plain)
    private = private_of(plain, noise_multiplier=2.0)

    assert private.step({}) == 0.0

    moves = torch.cat([(p - start[n]).flatten() for n, p in trained(plain).items()])
    expected = 2.0 * CLIP / 4
    assert len(moves) > 5000
    torch.testing.assert_close(float(moves.std()), expected, rtol=0.05, atol=0)
    assert abs(float(moves.mean())) < 5 * expected / len(moves) ** 0.5
    assert private.guarantee().noise_multiplier == 2.0
    assert private.steps == 1


def test_noise_is_not_that_of_torchs_seed(plain: Any):
    """Whoever knows the training seed cannot draw the noise or the batches again."""
    start = trained(plain)
    runs = []
    for _ in range(2):
        torch.manual_seed(42)
        plain.load_state_dict(start, strict=False)
        private = private_of(plain)
        private.step({})
        runs.append((trained(plain), [b.tolist() for b in drawn(private)]))
        private.close()

    assert not equal(runs[0][0], runs[1][0])
    assert runs[0][1] != runs[1][1]


def drawn(private: PrivateTraining) -> list[Tensor]:
    """Return the first tokens of an epoch's batches."""
    return [batch.get("input_ids", torch.zeros(0, 1))[:, 0] for batch in private.data_loader]


def test_batches_are_poisson(plain: Any):
    """Each example is in each batch with probability B/N, so sizes vary and some are empty."""
    private = private_of(plain, data=loader(20, batch_size=2))
    sizes = [len(tokens) for _ in range(40) for tokens in drawn(private)]

    assert len(sizes) == 40 * 10
    # Binomial with 20 trials at 1/10: mean 2, variance 1.8, empty with probability .12.
    assert abs(sum(sizes) / 400 - 2) < 5 * (1.8 / 400) ** 0.5
    assert abs(sizes.count(0) / 400 - 0.9**20) < 5 * (0.12 * 0.88 / 400) ** 0.5
    assert max(sizes) > 4


def test_micro_batches_are_one_batch(plain: Any):
    """A batch in pieces is clipped and noised as one."""
    start, runs = trained(plain), []
    for micro_batch in (None, 1, 4):
        plain.load_state_dict(start, strict=False)
        private = private_of(plain, seed=2, micro_batch=micro_batch)
        private.step(batch_of())
        private.close()
        runs.append(trained(plain))

    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(runs[2], runs[0], rtol=1e-4, atol=1e-7)


def test_dropout_in_the_adapter_is_allowed(folder_of: Any):
    """A LoRA with dropout trains: every row has dropout of its own, which mixes nothing."""
    model = unsplit(folder_of("llama"), lora(lora_dropout=0.5))
    start = trained(model)

    private_of(model).step(batch_of())

    assert not any(torch.equal(start[name], p) for name, p in trained(model).items())


def test_a_classifier_trains(folder_of: Any):
    """Classes, one an example, and a head that is trained whole, are covered too."""
    task = "sequence-classification"
    model = unsplit(folder_of("llama", task=task), lora(task), task=task)
    data = [{**each, "labels": torch.tensor(i % 3)} for i, each in enumerate(examples())]
    batch = next(iter(DataLoader(data, batch_size=6)))
    private = private_of(model, data=DataLoader(data, batch_size=4))
    found = private.per_example_gradients(batch)
    private.close()

    expected = gradients_one_by_one(model, batch)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert any("score" in name for name in found)


# ------------------------------------------------------------------ epsilon


def test_epsilon_8_is_noise_of_4888(measured: Any):
    """T-D4: epsilon 8 for N 10000, B 64 and 3 epochs takes the noise multiplier .4888."""
    asked = {"sample_rate": 64 / 10_000, "steps": 468, "delta": 1e-5}

    found = noise_multiplier_for(8.0, **asked)
    measured(noise_multiplier=found)
    assert found == pytest.approx(0.4888, abs=1e-4)


def test_a_planned_epsilon_is_kept(plain: Any):
    """All epochs together spend no more than was asked for, and not a step more is done."""
    data = loader(12, batch_size=4)
    private = private_of(plain, data=data, epsilon=6.0, epochs=2, delta=1e-2)
    for _ in range(2):
        for batch in private.data_loader:
            private.step(batch)
    before = trained(plain)

    with pytest.raises(BudgetExhausted, match="step 7 is beyond the 6"):
        private.step({})

    assert equal(before, trained(plain))
    assert 5.9 < private.guarantee().epsilon <= 6.0


def test_steps_before_a_resume_are_counted(plain: Any):
    """A run that goes on books the steps of both sessions."""
    fresh = private_of(plain)
    fresh.step({})
    fresh.step({})
    fresh.close()
    resumed = private_of(plain, steps_done=2)
    resumed.step({})

    assert resumed.guarantee().steps == 3
    assert resumed.guarantee().epsilon > fresh.guarantee().epsilon


def test_the_guarantee_says_against_whom(plain: Any):
    """The text names unit, numbers, recipients, the honest server, and that it is not covered."""
    private = private_of(plain, unit="one discharge letter")
    private.step({})

    told = str(private.guarantee())

    for words in (
        "Adding or removing one discharge letter: epsilon",
        "delta 0.001",
        "dp-accounting",
        "Poisson sampling at rate 0.166667",
        "those who receive the client's adapter",
        "computes each row from that row alone",
        "does not hold against the server",
    ):
        assert words in told
    assert "—" not in told


def test_a_seeded_run_promises_nothing(plain: Any):
    """Noise that can be drawn again is no protection, and the guarantee says so."""
    private = private_of(plain, seed=1)
    private.step({})

    assert not private.guarantee().formal
    assert "no formal guarantee" in str(private.guarantee())
    assert "epsilon" not in str(private.guarantee())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"delta": 1 / 24}, r"delta=.* less than 1/24"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"noise_multiplier": None, "epsilon": None}, "give noise_multiplier, or epsilon"),
        ({"noise_multiplier": 1.0, "epsilon": 0.5, "epochs": 1}, r"spends epsilon 2\.\d+ over 6"),
        ({"epsilon": 8.0, "epochs": 2, "steps_done": 3}, "keeps the noise of its first steps"),
        ({"epsilon": 8.0}, "number of epochs or steps: give one"),
        ({"epsilon": -1.0, "epochs": 1}, "epsilon=-1.0"),
        ({"micro_batch": 0}, "micro_batch=0"),
    ],
)
def test_senseless_numbers_are_refused(plain: Any, settings: dict[str, Any], why: str):
    """Parameters under which a guarantee means nothing are named before anything is trained."""
    with pytest.raises(ConfigError, match=why):
        private_of(plain, **settings)


def test_a_model_whose_trunk_is_trained_is_refused(llama: Site):
    """The server would train its half without noise, and the whole adapter is given away."""
    with llama.connect() as split, pytest.raises(ConfigError, match=r"train=\('bottom', 'top'\)"):
        private_of(split)


def test_chunks_are_refused(llama: Site):
    """A batch in micro-chunks adds examples up before they can be clipped."""
    with (
        llama.connect(train=ENDS, chunks=2) as split,
        pytest.raises(ConfigError, match="set split_chunks to 1"),
    ):
        private_of(split)


def test_what_opacus_cannot_sample_is_refused(folder_of: Any):
    """An adapter on the embedding is no plain linear layer."""
    model = unsplit(folder_of("llama"), lora(target_modules=["embed_tokens", "q_proj"]))

    with pytest.raises(ConfigError, match=r"embed_tokens.* is trained and no plain nn.Linear"):
        private_of(model)


def test_an_optimizer_of_something_else_is_refused(plain: Any):
    """A parameter that is trained but not clipped would be outside of the guarantee."""
    some = [p for p in plain.parameters() if p.requires_grad][1:]

    with pytest.raises(ConfigError, match="not those that the model trains"):
        private_of(plain, optimizer=torch.optim.SGD(some, lr=1.0))


def test_layers_that_flatten_their_rows_are_refused(folder_of: Any):
    """An expert sees tokens, not examples: clipping by token is noticed, and nothing is trained."""
    model = unsplit(folder_of("qwen2_moe"), lora(target_modules=["gate_proj"]))
    private = private_of(model)
    start = trained(model)

    with pytest.raises(ConfigError, match="does not see one row an example"):
        private.step(batch_of())

    assert equal(start, trained(model))


def test_padding_at_the_left_is_refused(plain: Any):
    """Positions that depend on the other examples' lengths would leak from one to the other."""
    batch = batch_of()
    batch["attention_mask"] = batch["attention_mask"].flip(1)

    with pytest.raises(ConfigError, match="padding_side"):
        private_of(plain).step(batch)


def failing_with_nan(plain: Any, private: PrivateTraining, batch: dict[str, Tensor]) -> None:
    """Fail in the last piece of the batch, after the others were clipped and added up."""
    embedding = plain.get_input_embeddings().weight
    token = 90  # which occurs nowhere else
    batch = {**batch, "input_ids": batch["input_ids"].clone()}
    batch["input_ids"][5, 0] = token
    kept = embedding[token].clone()
    embedding[token] = float("nan")
    with pytest.raises(NotFinite, match="per-example gradient"):
        private.step(batch)
    embedding[token] = kept


def failing_between(_plain: Any, private: PrivateTraining, batch: dict[str, Tensor]) -> None:
    """Fail after a forward and before its backward."""
    with pytest.raises(KeyError):
        private.step({name: value for name, value in batch.items() if name != "labels"})


@pytest.mark.parametrize("failing", [failing_with_nan, failing_between])
def test_a_step_that_fails_changes_nothing_and_the_next_one_works(plain: Any, failing: Any):
    """After an error amid a batch, parameters are as before and the next step is as it would be."""
    batch, start = batch_of(), trained(plain)
    private = private_of(plain, micro_batch=2, seed=4)

    failing(plain, private, batch)

    assert equal(start, trained(plain))
    assert private.steps == 0
    private.step(batch_of(5))
    after = trained(plain)
    private.close()
    plain.load_state_dict(start, strict=False)
    private_of(plain, micro_batch=2, seed=4).step(batch_of(5))
    assert equal(after, trained(plain))


def test_a_loss_for_the_whole_batch_is_refused(plain: Any):
    """A loss of one's own must tell examples apart."""
    private = private_of(plain, example_loss=lambda output, batch: output.logits.mean())

    with pytest.raises(ConfigError, match="one loss an example"):
        private.step(batch_of())


def test_closed_it_leaves_an_ordinary_model(plain: Any, tmp_path: Path):
    """After `close` the model trains and saves as if nothing had been."""
    private = private_of(plain)
    private.step(batch_of())
    private.close()

    plain(**batch_of()).loss.backward()
    plain.save_pretrained(tmp_path)

    assert not any(hasattr(p, "grad_sample") for p in plain.parameters())
    assert (tmp_path / "adapter_model.safetensors").exists()
