"""The gradient at the upper cut gives the labels back, and nothing that it does not carry."""

# Shapes:  B batch   T tokens   D model width   V vocabulary   N samples

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedModel,
)

from cutlayer.audit.class_labels import (
    class_label_leak,
    direction_scores,
    leak_auc,
    leak_auc_over_batches,
    norm_scores,
    spectral_labels,
)
from cutlayer.audit.labels import Inverted, invert_labels, label_inversion
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError
from cutlayer.privacy.transcript import Departure
from cutlayer.split.cut import anatomy_of
from tests.audit.victims import DATA, clinical_ids, noisy, random_ids, refusal, write_gpt2
from tests.tiny import NUM_LABELS, VOCABULARY

NO_LABEL = -100
TASKS = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class Message:
    """What crosses the upper cut in one step, and what should be read from it."""

    public: PublicModel
    trunk_out_BTD: Tensor
    grad_BTD: Tensor
    carried_BT: Tensor
    """The label of each position, of a classifier each row."""
    carried: dict[str, Tensor]

    def inverted(self, grad_BTD: Tensor | None = None, **settings: Any) -> Inverted:
        """Attack it."""
        grad_BTD = self.grad_BTD if grad_BTD is None else grad_BTD
        return invert_labels(self.public, self.trunk_out_BTD, grad_BTD, **self.carried, **settings)


def whole_model(folder: Path, task: str = "causal-lm") -> PreTrainedModel:
    """Return the unsplit model, whose kernels are not those that the attacker uses."""
    return TASKS[task].from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def sent(
    model: PreTrainedModel,
    folder: Path,
    ids_BT: Tensor,
    labels: Tensor,
    *,
    top: int,
    task: str = "causal-lm",
    bottom: int = 1,
    scale: float = 1.0,
    **carried: Tensor,
) -> Message:
    """Train the unsplit model one step on labels, and note what would cross the upper cut."""
    anatomy = anatomy_of(model)
    seen: list[Tensor] = []

    def cut(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.detach().requires_grad_())
        return (seen[0], *output[1:]) if isinstance(output, tuple) else seen[0]

    layer = anatomy.layers(model)[anatomy.num_layers - top - 1]
    handle = layer.register_forward_hook(cut)
    loss = model(input_ids=ids_BT, labels=labels, **carried).loss * scale
    handle.remove()
    (grad_BTD,) = torch.autograd.grad(loss, seen)
    public = PublicModel.load(str(folder), bottom_layers=bottom, top_layers=top, task=task)
    if task == "causal-lm":
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
    return Message(public, seen[0].detach(), grad_BTD, labels, carried)


def share_found(truth: Tensor, found: Tensor) -> float:
    """Return the share of the labels that were found."""
    there = truth != NO_LABEL
    return float((truth == found)[there].float().mean())


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random GPT-2."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> Callable[..., Message]:
    """Return a function that makes a random GPT-2 send 8 texts of 32 tokens."""
    model = whole_model(gpt2_folder)

    def send(*, top: int, ids_BT: Tensor | None = None, labels: Tensor | None = None, **more: Any):
        ids_BT = random_ids(1024, 8, 32) if ids_BT is None else ids_BT
        return sent(
            model, gpt2_folder, ids_BT, ids_BT if labels is None else labels, top=top, **more
        )

    return send


@pytest.fixture(scope="module")
def smollm2() -> Callable[..., Message]:
    """Return a function that makes SmolLM2, with its real weights, send the clinical sentence."""
    model = whole_model(DATA / "smollm2")

    def send(*, top: int) -> Message:
        ids_BT = clinical_ids().unsqueeze(0)
        return sent(model, DATA / "smollm2", ids_BT, ids_BT, top=top)

    return send


@pytest.mark.parametrize(
    ("top", "iterations", "goal"), [(0, 10, 0.98), (1, 10, 0.95), (2, 30, 0.93)]
)
def test_labels_come_back_in_few_iterations(
    gpt2: Callable[..., Message],
    top: int,
    iterations: int,
    goal: float,
    measured: Callable[..., None],
):
    """T-A4: 8 texts of 32 tokens, with no, one and two layers at the client's top."""
    message = gpt2(top=top)

    found = message.inverted(iterations=iterations)

    measured(share=share_found(message.carried_BT, found.labels_BT))
    assert share_found(message.carried_BT, found.labels_BT) >= goal


@pytest.mark.parametrize("top", [0, 1, 2])
def test_shuffled_labels_come_back_shuffled(
    gpt2: Callable[..., Message], top: int, measured: Callable[..., None]
):
    """T-A4c: what is read is the gradient's labels, not the text's tokens."""
    ids_BT = random_ids(1024, 8, 32)
    labels = ids_BT.flip(0)[:, torch.randperm(32, generator=torch.Generator().manual_seed(3))]

    found = (message := gpt2(top=top, ids_BT=ids_BT, labels=labels)).inverted()

    measured(share=share_found(message.carried_BT, found.labels_BT))
    assert share_found(message.carried_BT, found.labels_BT) >= 0.98
    assert (
        share_found(
            torch.where(message.carried_BT >= 0, ids_BT.roll(-1, 1), NO_LABEL), found.labels_BT
        )
        <= 0.05
    )


@pytest.mark.parametrize("top", [0, 1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_clinical_sentence_comes_back_from_real_weights(
    smollm2: Callable[..., Message], top: int
):
    """Every token of the sentence is read from SmolLM2's gradient, and proves itself."""
    message = smollm2(top=top)

    found = message.inverted()

    assert torch.equal(message.carried_BT, found.labels_BT)
    assert found.residual < 1e-4
    assert found.scale == pytest.approx(1 / int((message.carried_BT >= 0).sum()), rel=1e-3)


@pytest.mark.parametrize("top", [0, 2])
def test_answers_come_back_where_only_they_are_labelled(top: int):
    """Of padded texts whose loss is on the last words only, weighted as a chunk of a batch is."""
    words_T = clinical_ids()
    ids_BT = torch.stack([words_T, words_T.roll(9)])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, -6:] = 0
    labels = torch.full_like(ids_BT, NO_LABEL)
    labels[0, -4:] = ids_BT[0, -4:]
    labels[1, -11:-6] = ids_BT[1, -11:-6]

    message = sent(
        whole_model(DATA / "smollm2"),
        DATA / "smollm2",
        ids_BT,
        labels,
        top=top,
        scale=9 / 49,
        attention_mask=mask_BT,
    )
    found = message.inverted(iterations=100)

    assert share_found(message.carried_BT, found.labels_BT) == 1
    assert found.residual < 1e-2
    assert found.scale == pytest.approx(1 / 49, rel=1e-3)


def test_the_clinical_sentence_survives_a_codec_and_noise(smollm2: Callable[..., Message]):
    """Rounding to bfloat16 hides no label, and noise as large as the gradient hides few."""
    message = smollm2(top=1)
    rounded = message.grad_BTD.bfloat16().float()
    drowned = noisy(message.grad_BTD, 1.0)[0]

    assert share_found(message.carried_BT, message.inverted(rounded).labels_BT) == 1
    assert (
        share_found(message.carried_BT, message.inverted(drowned, iterations=15).labels_BT) >= 0.9
    )


def test_a_prior_helps_where_noise_drowns_the_gradient(smollm2: Callable[..., Message]):
    """With noise of five times the gradient, the model's own guess adds to what is left of it."""
    message = smollm2(top=0)
    drowned = noisy(message.grad_BTD, 5.0)[0]

    without = message.inverted(drowned, iterations=5)
    given = message.inverted(drowned, iterations=5, prior="model")
    log_probs_BTV = message.public.head(message.public.top(message.trunk_out_BTD)).log_softmax(-1)
    same = message.inverted(drowned, iterations=5, prior=log_probs_BTV.detach())

    truth = message.carried_BT
    assert share_found(truth, given.labels_BT) > share_found(truth, without.labels_BT)
    assert share_found(truth, given.labels_BT) > share_found(truth, given.likely_BT)
    assert torch.equal(given.labels_BT, same.labels_BT)


def test_noise_in_place_of_a_gradient_gives_chance(gpt2: Callable[..., Message]):
    """The attack reads the gradient, not the truth."""
    message = gpt2(top=1)
    noise_BTD = torch.randn(message.grad_BTD.shape, generator=torch.Generator().manual_seed(1))

    found = message.inverted(noise_BTD, iterations=20)

    assert share_found(message.carried_BT, found.labels_BT) <= 0.02
    assert found.residual > 0.5


@pytest.mark.parametrize("top", [0, 2])
def test_a_row_comes_back_alike_alone_and_in_a_batch(gpt2: Callable[..., Message], top: int):
    """Rows do not help or hinder each other."""
    message = gpt2(top=top)
    together = message.inverted()

    for row in (0, 5):
        only = slice(row, row + 1)
        alone = invert_labels(message.public, message.trunk_out_BTD[only], message.grad_BTD[only])
        assert torch.equal(together.labels_BT[only], alone.labels_BT)


@pytest.mark.parametrize("factor", [2.0**16, 1 / 7, 1e-12])
def test_the_scale_of_the_loss_hides_nothing(gpt2: Callable[..., Message], factor: float):
    """A scaler, accumulated steps or an unknown number of labels change the found scale only."""
    message = gpt2(top=1)

    plain, scaled = message.inverted(), message.inverted(message.grad_BTD * factor)

    assert torch.equal(plain.labels_BT, scaled.labels_BT)
    assert scaled.scale == pytest.approx(plain.scale * factor, rel=1e-3)


@pytest.mark.parametrize("top", [0, 1, 2])
def test_positions_without_a_label_are_found_out(gpt2: Callable[..., Message], top: int):
    """Labels of the last part of each text only: the others are told apart from them."""
    ids_BT = random_ids(1024, 4, 24)
    labels = ids_BT.clone()
    for row, start in enumerate((5, 9, 14, 20)):
        labels[row, :start] = NO_LABEL
    labels[1, 15:17] = NO_LABEL

    message = gpt2(top=top, ids_BT=ids_BT, labels=labels)

    assert torch.equal(message.carried_BT, message.inverted().labels_BT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_come_back(gpt2: Callable[..., Message], side: str):
    """With the mask and positions that were sent along, padding changes nothing."""
    ids_BT = random_ids(1024, 4, 24)
    mask_BT = torch.ones_like(ids_BT)
    for row, padding in enumerate((0, 3, 7, 11)):
        mask_BT[row, :padding] = 0
    mask_BT = mask_BT if side == "left" else mask_BT.flip(1)
    carried = {
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp_min(0),
    }
    labels = ids_BT.masked_fill(mask_BT == 0, NO_LABEL)

    message = gpt2(top=2, ids_BT=ids_BT, labels=labels, **carried)

    assert torch.equal(message.carried_BT, message.inverted().labels_BT)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "cohere", "granite", "qwen3", "gpt_neox", "opt"]
)
def test_families_give_their_labels_back(folder_of: Callable[..., Path], family: str):
    """Soft caps and scales behind the head, windows and biases change nothing."""
    folder = folder_of(family)
    ids_BT = random_ids(VOCABULARY, 3, 14)

    message = sent(whole_model(folder), folder, ids_BT, ids_BT, top=2)
    found = message.inverted()

    assert share_found(message.carried_BT, found.labels_BT) >= 0.95
    assert found.residual < 1e-3


@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_classes_come_back(folder_of: Callable[..., Path], family: str, top: int):
    """Of classifiers too, whether they pool before their head or after it."""
    task = "sequence-classification"
    folder = folder_of(family, task=task)
    ids_BT = random_ids(68, 9, 11).add(12)
    labels_B = torch.arange(9) % NUM_LABELS

    message = sent(whole_model(folder, task), folder, ids_BT, labels_B, top=top, task=task)
    found = message.inverted()

    assert torch.equal(labels_B, found.labels_BT)
    assert found.likely_BT.shape == labels_B.shape
    assert found.residual < 1e-3


def departure_of(message: Message, ids_BT: Tensor, labels: Tensor) -> Departure:
    """Return a message as the client's transcript has it."""
    return Departure(
        number=1,
        step=0,
        smashed_BTD=torch.zeros_like(message.trunk_out_BTD),
        carried=message.carried,
        truth={"input_ids": ids_BT, "labels": labels},
        gradient_BTD=message.grad_BTD,
    )


def test_a_run_is_told_what_its_gradients_gave_away(gpt2: Callable[..., Message]):
    """The finding counts labels only, holds them against the model's guess, and says how sure."""
    ids_BT = random_ids(1024, 4, 24)
    labels = ids_BT.clone()
    labels[:, :8] = NO_LABEL
    message = gpt2(top=2, ids_BT=ids_BT, labels=labels)

    finding = label_inversion(
        message.public, [departure_of(message, ids_BT, labels)] * 2, [message.trunk_out_BTD] * 2
    )

    assert (finding.attack, finding.channel, finding.verdict) == ("A4", "gradients", "plaintext")
    assert (finding.sequences, finding.tokens, finding.trr) == (8, 8 * 16, 1.0)
    assert finding.prior_trr < 0.1
    assert finding.extra["sequences_proven"] == 1
    assert finding.extra["labels_invented"] == 0
    assert finding.params["top_layers"] == 2
    assert finding.recovered[0].truth == tuple(ids_BT[0, 8:].tolist())


def test_what_does_not_fit_is_refused(gpt2: Callable[..., Message], folder_of: Callable[..., Path]):
    """A gradient of other texts, one that is not finite, or none: one sentence says so."""
    message = gpt2(top=1)
    public, z_BTD, grad_BTD = message.public, message.trunk_out_BTD, message.grad_BTD
    broken_BTD = grad_BTD.clone()
    broken_BTD[0, 0, 0] = torch.nan

    with pytest.raises(DataError, match="both of the same forward") as unlike:
        invert_labels(public, z_BTD, grad_BTD[:, :5])
    with pytest.raises(DataError, match="not of this model") as foreign:
        invert_labels(public, z_BTD[..., :50], grad_BTD[..., :50])
    with pytest.raises(DataError, match="not finite") as endless:
        invert_labels(public, z_BTD, broken_BTD)
    with pytest.raises(DataError, match="labels at the client") as nothing:
        label_inversion(public, [], [])

    for error in (unlike, foreign, endless, nothing):
        refusal(error.value)


def test_a_regression_is_refused(tmp_path: Path):
    """A model with a single output has no classes."""
    model = AutoModelForSequenceClassification.from_config(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, num_labels=1)
    )
    model.save_pretrained(tmp_path)
    public = PublicModel.load(
        str(tmp_path), bottom_layers=1, top_layers=1, task="sequence-classification"
    )

    with pytest.raises(ConfigError, match="single output") as error:
        invert_labels(public, torch.randn(2, 3, 16), torch.randn(2, 3, 16))

    refusal(error.value)


def test_a_gradient_of_nothing_has_no_labels(gpt2: Callable[..., Message]):
    """Where no position carries a label nothing is made up."""
    message = gpt2(top=1)

    found = message.inverted(torch.zeros_like(message.grad_BTD))

    assert (found.labels_BT == NO_LABEL).all()
    assert found.iterations == 0


# Class labels without weights


@pytest.fixture(scope="module")
def class_batches(folder_of: Callable[..., Path]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of gradients of a classifier, in which one class of two is rare."""
    task = "sequence-classification"
    folder = folder_of("bert", task=task)
    model = whole_model(folder, task)
    batches = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        labels_B = (torch.rand(32, generator=generator) < 0.2).long()
        ids_BT = random_ids(68, 32, 11, seed=seed).add(12)
        batches.append((sent(model, folder, ids_BT, labels_B, top=0, task=task).grad_BTD, labels_B))
    return batches


def test_gradients_alone_tell_classes_apart(class_batches: list[tuple[Tensor, Tensor]]):
    """Without any weights, one known sample of each class betrays the others."""
    finding = class_label_leak(class_batches)

    assert finding.trr >= 0.95
    assert finding.extra["leak_auc_direction"] >= 0.95
    assert finding.extra["leak_auc_spectral"] >= 0.95


def test_shuffled_classes_are_not_told_apart(class_batches: list[tuple[Tensor, Tensor]]):
    """The control: labels that the gradients do not have are found no better than by chance."""
    shuffled = [
        (grad_BTD, labels_B[torch.randperm(32, generator=torch.Generator().manual_seed(seed))])
        for seed, (grad_BTD, labels_B) in enumerate(class_batches)
    ]

    finding = class_label_leak(shuffled)

    assert finding.advantage <= 0.1
    assert (
        leak_auc(direction_scores(shuffled[0][0], shuffled[0][0][0].sum(0)), shuffled[0][1]) < 0.8
    )


def test_leak_auc_is_the_chance_that_a_positive_scores_higher():
    """Counted by hand over all pairs, ties half; undefined without both kinds."""
    scores_N = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.9])
    positive_N = torch.tensor([0, 1, 0, 0, 1])

    pairs = [
        float(p > n) + 0.5 * float(p == n)
        for p in scores_N[positive_N == 1]
        for n in scores_N[positive_N == 0]
    ]

    assert leak_auc(scores_N, positive_N) == pytest.approx(sum(pairs) / len(pairs))
    assert leak_auc(scores_N, torch.zeros(5)) != leak_auc(scores_N, torch.zeros(5))
    assert leak_auc_over_batches([0.5] * 19 + [1.0, float("nan")]) == pytest.approx(0.525)


def test_a_larger_gradient_betrays_the_rarer_class():
    """The norm and the first singular direction part a few large gradients from many small ones."""
    generator = torch.Generator().manual_seed(0)
    direction_D = torch.randn(16, generator=generator)
    positive_B = torch.arange(20) % 7 == 0
    grad_BTD = torch.randn(20, 3, 16, generator=generator) * 0.05
    grad_BTD[positive_B, 0] += 3 * direction_D
    grad_BTD[~positive_B, 0] -= 0.4 * direction_D

    found_B, _scores = spectral_labels(grad_BTD)

    assert torch.equal(positive_B, found_B)
    assert leak_auc(norm_scores(grad_BTD), positive_B) == 1


def test_one_class_alone_is_refused():
    """There is nothing to tell apart."""
    with pytest.raises(DataError, match="one class") as error:
        class_label_leak([(torch.randn(4, 3, 8), torch.zeros(4, dtype=torch.long))])

    refusal(error.value)
