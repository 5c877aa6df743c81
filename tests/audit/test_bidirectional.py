"""The published attacks by descent recover what they are said to, and nothing from nothing."""

# Shapes:  T tokens   D model width   V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from cutlayer.audit.bidirectional import (
    PUBLISHED,
    BisrSettings,
    Descent,
    bidirectional_recovery,
    bisr,
    embedding_inversion,
    gradient_matching,
    smashed_matching,
)
from cutlayer.audit.embedding import embedding_table, replay
from cutlayer.audit.inverter import InverterSettings, learned_inversion, train_inverter
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError
from tests.audit.victims import (
    DATA,
    public_of,
    random_ids,
    refusal,
    smollm2,
    write_gpt2,
)

SHORT = BisrSettings(
    embedding=Descent(250, 0.09), forward=Descent(80, 5e-3, 0.02), backward=Descent(18, 0.09)
)
ONCE = InverterSettings(epochs=1, least_steps=0, head="linear")
TOKENS = 12


@dataclass
class Messages:
    """What crosses the cuts for one text, the trunk being left out."""

    ids_T: Tensor
    smashed_TD: Tensor
    trunk_out_TD: Tensor
    gradient_TD: Tensor


def gradient_of(public: PublicModel, trunk_out_TD: Tensor, labels_T: Tensor) -> Tensor:
    """Return the gradient of the mean loss over these labels, as a client sends it up."""
    point_1TD = trunk_out_TD.detach()[None].clone().requires_grad_()
    loss = cross_entropy(public.head(public.top(point_1TD))[0, :-1], labels_T[1:])
    return torch.autograd.grad(loss, point_1TD)[0][0]


def share(found_T: Tensor, ids_T: Tensor) -> float:
    """Return the share of tokens that are right."""
    return float((found_T == ids_T).float().mean())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PublicModel:
    """A GPT-2 drawn at random."""
    return public_of(write_gpt2(tmp_path_factory.mktemp("gpt2")))


@pytest.fixture(scope="module")
def sent(small: PublicModel) -> Messages:
    """One text's messages."""
    ids_T = random_ids(small.vocabulary, 1, TOKENS, seed=3)[0]
    with torch.no_grad():
        smashed_TD = small.bottom(ids_T[None])[0]
    drawn = torch.randn(smashed_TD.shape, generator=torch.Generator().manual_seed(0))
    trunk_out_TD = smashed_TD + 0.1 * drawn
    return Messages(ids_T, smashed_TD, trunk_out_TD, gradient_of(small, trunk_out_TD, ids_T))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_replaying_the_embeddings_of_a_text_sends_what_the_text_sends(
    folder_of: Callable[..., Path], model_type: str
):
    """Whatever a family does behind its embedding is done to a guess as well."""
    public = public_of(folder_of(model_type))
    ids_T = random_ids(60, 1, 9)[0] + 12

    expected = public.bottom(ids_T[None])[0]

    torch.testing.assert_close(replay(public, embedding_table(public)[ids_T]), expected)
    torch.testing.assert_close(public.bottom(ids_T[None])[0], expected)  # and nothing stays behind


def test_forward_matching_needs_no_good_start(small: PublicModel, sent: Messages):
    """BiSR(f) recovers every token even from a start in which none is right."""
    start_T = (sent.ids_T + 1) % small.vocabulary

    found_T = smashed_matching(small, sent.smashed_TD, start_T, settings=SHORT)

    assert torch.equal(found_T, sent.ids_T)


def test_embedding_inversion_needs_no_start_at_all(small: PublicModel, sent: Messages):
    """EIA recovers nine tokens in ten or more from a random mixture, among those that it tries."""
    tried_K = torch.cat([torch.arange(0, small.vocabulary, 4), sent.ids_T]).unique()

    found_T = embedding_inversion(small, sent.smashed_TD, settings=SHORT, tried_K=tried_K)

    assert share(found_T, sent.ids_T) >= 0.9


def test_backward_matching_gives_the_labels_back(small: PublicModel, sent: Messages):
    """BiSR(b) repairs a start that is half wrong, TAG needs none; neither gives the first token."""
    start_T = torch.where(torch.arange(TOKENS) % 2 == 0, sent.ids_T, 7)
    start_TV = 8.0 * one_hot(start_T, small.vocabulary)
    messages = (sent.trunk_out_TD, sent.gradient_TD)

    repaired_TV = gradient_matching(small, *messages, start_TV=start_TV, settings=SHORT)
    tag = BisrSettings(backward=Descent(60, 0.09))
    from_nothing_TV = gradient_matching(small, *messages, settings=tag)

    assert share(repaired_TV.argmax(-1), sent.ids_T) >= 0.8
    assert share(from_nothing_TV.argmax(-1)[1:], sent.ids_T[1:]) >= 0.9


def test_backward_matching_follows_the_gradient_and_not_the_text(
    small: PublicModel, sent: Messages
):
    """Control: the gradient of shuffled labels gives back the shuffled labels."""
    shuffled_T = sent.ids_T.flip(0)
    gradient_TD = gradient_of(small, sent.trunk_out_TD, shuffled_T)
    tag = BisrSettings(backward=Descent(60, 0.09))

    found_T = gradient_matching(small, sent.trunk_out_TD, gradient_TD, settings=tag).argmax(-1)

    assert share(found_T[1:], shuffled_T[1:]) >= 0.9
    assert share(found_T[1:], sent.ids_T[1:]) <= 0.1


def test_the_number_of_labels_in_a_batchs_mean_is_undone(small: PublicModel, sent: Messages):
    """A text in a batch of eight is read as it is alone, if the number of labels is known."""
    alone_TV = gradient_matching(small, sent.trunk_out_TD, sent.gradient_TD, settings=SHORT)

    labels = 8 * (TOKENS - 1)
    in_batch_TV = gradient_matching(
        small, sent.trunk_out_TD, sent.gradient_TD / 8, labels=labels, settings=SHORT
    )

    torch.testing.assert_close(alone_TV, in_batch_TV, rtol=1e-3, atol=1e-4)


def test_noise_in_place_of_messages_is_read_at_chance(small: PublicModel, sent: Messages):
    """Of activations and a gradient that never met the text, hardly a token is hit."""
    drawn = torch.Generator().manual_seed(1)
    noise_TD = torch.randn(sent.smashed_TD.shape, generator=drawn) * sent.smashed_TD.std()
    start_T = (sent.ids_T + 1) % small.vocabulary

    forward_T = smashed_matching(small, noise_TD, start_T, settings=SHORT)
    backward_TV = gradient_matching(
        small, noise_TD, noise_TD * sent.gradient_TD.std(), settings=SHORT
    )

    assert share(forward_T, sent.ids_T) <= 0.1
    assert share(backward_TV.argmax(-1), sent.ids_T) <= 0.1


def test_each_stage_improves_on_a_poor_inverter(small: PublicModel):
    """Published order, in kind: BiSR(b+f) and (f) read more than the inverter they start from."""
    aux = list(random_ids(small.vocabulary, 60, TOKENS, seed=8))
    inverter = train_inverter(small, aux, settings=ONCE)
    truth = list(random_ids(small.vocabulary, 2, TOKENS, seed=9))
    with torch.no_grad():
        smashed = list(small.bottom(torch.stack(truth)))
    gradients = [gradient_of(small, s_TD, t_T) for s_TD, t_T in zip(smashed, truth, strict=True)]

    sip = learned_inversion(inverter, smashed, truth)
    both, forward = (
        bidirectional_recovery(
            small, inverter, smashed, truth, trunk_out=smashed, gradients=gradients,
            stages=stages, settings=SHORT,
        )
        for stages in (("b", "f"), ("f",))
    )  # fmt: skip

    assert sip.trr < 0.5
    assert min(both.trr, forward.trr) >= 0.9
    assert [both.channel, forward.channel] == ["gradients", "activations"]


def test_settings_are_the_published_ones():
    """Steps, rates and decays stand as in the authors' scripts."""
    llama, gpt2 = PUBLISHED["llama-2"], PUBLISHED["gpt2-large"]

    assert llama.embedding == gpt2.embedding == Descent(72_000, 0.09, 0.01)
    assert (llama.forward, llama.backward) == (Descent(800, 5e-3, 0.02), Descent(18, 0.09, 0.01))
    assert (gpt2.forward, gpt2.backward) == (Descent(800, 1e-2, 0.01), Descent(32, 0.09, 0.01))


def test_what_cannot_be_matched_is_refused_in_one_sentence(small: PublicModel, sent: Messages):
    """A stage without its message, an unknown one, a vain descent and unlike texts are refused."""
    start_TV = one_hot(sent.ids_T, small.vocabulary).float()
    inverter: Any = None
    cases: list[tuple[type[Exception], Any]] = [
        (ConfigError, lambda: bisr(small, sent.smashed_TD, start_TV, stages=("b",))),
        (ConfigError, lambda: bisr(small, sent.smashed_TD, start_TV, stages=("x",))),  # type: ignore
        (ConfigError, lambda: Descent(0, 0.1)),
        (ConfigError, lambda: Descent(5, float("nan"))),
        (DataError, lambda: bidirectional_recovery(small, inverter, [], [])),
        (
            DataError,
            lambda: bidirectional_recovery(small, inverter, [sent.smashed_TD], [sent.ids_T[1:]]),
        ),
    ]
    for kind, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert refusal(caught.value)


@pytest.mark.slow
def test_the_published_order_holds_on_real_weights():
    """On SmolLM2 both BiSR(f) and BiSR(b) read more than the inverter that they start from."""
    from tests.audit.test_inverter import sent_of, wordings

    public, truth = smollm2(), wordings(DATA / "icd10/test.jsonl")[:8]
    inverter = train_inverter(public, wordings(DATA / "icd10/train.jsonl")[:150])
    smashed = sent_of(public, truth)
    gradients = [gradient_of(public, s_TD, t_T) for s_TD, t_T in zip(smashed, truth, strict=True)]
    settings = BisrSettings(forward=Descent(200, 5e-3, 0.02))

    sip = learned_inversion(inverter, smashed, truth)
    forward, backward = (
        bidirectional_recovery(
            public, inverter, smashed, truth, trunk_out=smashed, gradients=gradients,
            stages=(stage,), settings=settings,
        )
        for stage in ("f", "b")
    )  # fmt: skip

    assert forward.rouge["L"] >= sip.rouge["L"] + 0.1
    assert backward.rouge["L"] >= sip.rouge["L"] + 0.1
