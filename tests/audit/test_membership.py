"""What a released adapter tells about its training data, and what that proves of its epsilon."""

# Shapes:  B batch   T tokens   V vocabulary   N texts   C canaries

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from peft import get_peft_model
from scipy.stats import beta, binom
from torch import Tensor
from torch.nn.functional import cross_entropy

from cutlayer.audit.membership import (
    Likelihood,
    canary_epsilon,
    epsilon_lower_bound,
    likelihoods,
    make_canaries,
    membership,
    membership_scores,
    separation,
    toss,
)
from cutlayer.errors import ConfigError, DataError, NotFinite
from tests.audit.victims import refusal
from tests.site import lora
from tests.tiny import FIRST_ORDINARY_ID, LAST_ORDINARY_ID, tiny_model

CANARIES, TOKENS = 128, 12
ORDINARY = range(FIRST_ORDINARY_ID, LAST_ORDINARY_ID)


def asked(model: Any) -> Any:
    """Return a model as `likelihoods` asks it."""
    return lambda ids_BT, mask_BT: model(input_ids=ids_BT, attention_mask=mask_BT).logits


def train(model: Any, texts: list[Tensor], *, epochs: int, batch: int, lr: float) -> None:
    """Train what of the model can be trained, with AdamW."""
    torch.manual_seed(0)
    rows = torch.stack(texts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    for _ in range(epochs):
        for ids_BT in rows[torch.randperm(len(rows))].split(batch):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def scores_of(model: Any, texts: list[Tensor], *, score: str = "ez") -> Tensor:
    """Return the membership scores of texts, the adapter's against its own base's."""
    model.eval()
    target = likelihoods(asked(model), texts)
    with model.disable_adapter():
        base = likelihoods(asked(model), texts)
    return membership_scores(target, base, score=score)


@pytest.fixture(scope="module")
def canaries() -> tuple[list[Tensor], Tensor]:
    """Canaries and the tosses that say which are trained on."""
    return make_canaries(CANARIES, tokens=TOKENS, ids=ORDINARY), toss(CANARIES, seed=1)


@pytest.fixture(scope="module")
def overfit(canaries: Any) -> Any:
    """A LoRA that was trained on the canaries by heart."""
    texts, included_C = canaries
    model = get_peft_model(tiny_model("llama", num_layers=2), lora(r=8))
    members = [text for text, into in zip(texts, included_C, strict=True) if into]
    train(model, members, epochs=60, batch=64, lr=1e-2)
    return model


@pytest.mark.parametrize("score", ["ez", "loss_ratio"])
def test_canaries_refute_epsilon_3_of_an_adapter_that_learned_them_by_heart(
    overfit: Any, canaries: Any, score: str, measured: Any
):
    """T-A7: without privacy the bound is 3 or more, by either score."""
    texts, included_C = canaries

    # Three quarters are guessed: all of them cannot be right, as the tosses are never even.
    audit = canary_epsilon(scores_of(overfit, texts, score=score), included_C, guesses=[96])

    measured(epsilon=audit.epsilon)
    assert audit.epsilon >= 3
    assert audit.correct == 96


def test_canaries_show_nothing_of_an_adapter_that_never_saw_them(canaries: Any):
    """An adapter trained as long on other texts gives no bound, and chance at guessing."""
    texts, included_C = canaries
    model = get_peft_model(tiny_model("llama", num_layers=2), lora(r=8))
    strangers = make_canaries(64, tokens=TOKENS, ids=ORDINARY, seed=9)
    train(model, strangers, epochs=30, batch=64, lr=1e-2)

    scores_C = scores_of(model, texts)

    assert canary_epsilon(scores_C, included_C).epsilon == 0
    assert 0.35 < separation(scores_C, included_C).auc < 0.65


def test_dp_sgd_of_epsilon_1_keeps_the_bound_under_its_claim(canaries: Any, measured: Any):
    """T-A7: the same canaries in an adapter that Opacus trained at epsilon 1 refute 1.3 at most."""
    texts, included_C = canaries
    model = get_peft_model(tiny_model("llama", num_layers=2), lora(r=8))
    members = torch.stack([text for text, into in zip(texts, included_C, strict=True) if into])
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimizer, loader = PrivacyEngine(accountant="prv").make_private_with_epsilon(
            module=model.train(),
            optimizer=torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0),
            data_loader=torch.utils.data.DataLoader(members, batch_size=16),
            target_epsilon=1.0,
            target_delta=1e-5,
            epochs=10,
            max_grad_norm=0.1,
        )
        for _, ids_BT in itertools.product(range(10), loader):
            optimizer.zero_grad()
            private(input_ids=ids_BT, labels=ids_BT).loss.backward()
            optimizer.step()

    audit = canary_epsilon(scores_of(model, texts), included_C, delta=1e-5)

    measured(epsilon=audit.epsilon)
    assert audit.epsilon <= 1.3


def test_full_fine_tuning_gives_members_away():
    """Ten epochs over all weights tell members from others by an AUC of .9 or more."""
    texts = make_canaries(128, tokens=TOKENS, ids=ORDINARY, seed=2)
    whole, base = (tiny_model("llama", num_layers=2) for _ in range(2))
    train(whole, texts[:64], epochs=10, batch=8, lr=5e-3)

    said = [likelihoods(asked(model.eval()), texts) for model in (whole, base)]

    assert separation(membership_scores(*said), torch.arange(128) < 64).auc >= 0.9


@pytest.mark.parametrize(("correct", "guesses"), [(60, 100), (95, 100), (62, 62), (511, 512)])
def test_the_pure_bound_is_the_exact_interval_of_a_proportion(correct: int, guesses: int):
    """At delta 0 it is the log-odds of Clopper and Pearson's one-sided lower limit."""
    limit = beta.ppf(0.05, correct, guesses - correct + 1)
    expected = max(0.0, math.log(limit / (1 - limit)))

    found = epsilon_lower_bound(correct, guesses, 1000)

    assert found == pytest.approx(expected, abs=1e-6)


def test_known_values_of_the_bound():
    """All right of r guesses refute log(p / (1 - p)) with p the r-th root of .05, none refute 0."""
    assert epsilon_lower_bound(100, 100, 100) == pytest.approx(3.4925, abs=1e-3)
    assert epsilon_lower_bound(61, 61, 61) < 3 < epsilon_lower_bound(62, 62, 62)
    assert epsilon_lower_bound(50, 100, 100) == 0
    assert epsilon_lower_bound(0, 0, 100) == 0


def test_delta_costs_what_the_theorem_says():
    """The chance at the bound is beta + 2 m delta alpha, summed here term by term."""
    correct, guesses, total, delta = 80, 90, 500, 1e-4

    epsilon = epsilon_lower_bound(correct, guesses, total, delta=delta)

    right = 1 / (1 + math.exp(-epsilon))
    chance = [binom.pmf(k, guesses, right) for k in range(guesses + 1)]
    alpha = max(sum(chance[correct - i : correct]) / i for i in range(1, correct + 1))
    assert sum(chance[correct:]) + 2 * total * delta * alpha == pytest.approx(0.05, abs=1e-6)
    assert epsilon < epsilon_lower_bound(correct, guesses, total)


def test_the_bound_holds_for_a_mechanism_whose_epsilon_is_known():
    """Randomised response of epsilon 1 is accused of more in 5% of runs, and not in vain."""
    draw, found = np.random.default_rng(0), []
    for _ in range(300):
        included_C = torch.from_numpy(draw.integers(0, 2, 400).astype(bool))
        honest_C = torch.from_numpy(draw.random(400) < math.e / (1 + math.e))
        scores_C = torch.where(honest_C, included_C, ~included_C).double()
        found.append(canary_epsilon(scores_C, included_C, guesses=[400]).epsilon)

    assert np.mean(np.array(found) > 1) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
    assert np.median(found) > 0.6


def test_trying_several_numbers_of_guesses_does_not_break_the_bound():
    """Scores of pure chance are accused of a positive epsilon in at most 5% of runs."""
    draw = np.random.default_rng(1)
    accused = [
        canary_epsilon(torch.from_numpy(draw.random(200)), toss(200, seed=seed)).epsilon > 0
        for seed in range(300)
    ]

    assert np.mean(accused) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_separation_is_exact_on_a_case_counted_by_hand():
    """AUC counts ties half, and the rate at 1% lets one of a hundred others through."""
    scores_N = torch.cat([torch.tensor([math.inf, 200.0, 99.0, 50.5]), torch.arange(100.0)])
    is_member_N = torch.arange(104) < 4

    told = separation(scores_N, is_member_N)

    assert told.auc == pytest.approx((100 + 100 + 99.5 + 51) / 400)
    assert told.tpr[0.01][0] == 0.75
    assert told.tpr[0.01][2]
    assert told.tpr[0.001][0] == 0.5
    assert not told.tpr[0.001][2]  # a hundred others cannot resolve one in a thousand


def test_likelihoods_are_those_of_the_models_own_loss():
    """Their mean is the loss of each text alone, however it is padded; a mask leaves tokens out."""
    model = tiny_model("llama", num_layers=2)
    texts = [torch.arange(12, 12 + length) for length in (5, 9, 2)]
    counted = [torch.arange(len(text)) >= 3 for text in texts]

    found = likelihoods(asked(model), texts)
    late = likelihoods(asked(model), texts[:2], counted=counted[:2])

    for text, of in zip(texts, found, strict=True):
        with torch.no_grad():
            logits_TV = model(input_ids=text[None]).logits[0, :-1]
        assert float(-of.logprob_T.mean()) == pytest.approx(
            float(cross_entropy(logits_TV, text[1:])), rel=1e-4
        )
        assert torch.equal(of.missed_T, logits_TV.argmax(-1) != text[1:])
    for of, whole in zip(late, found, strict=False):
        torch.testing.assert_close(of.logprob_T, whole.logprob_T[2:])


def test_the_error_zone_looks_at_errors_only():
    """Where the tuned model errs, gains are divided by losses; without errors all tokens count."""
    base = Likelihood(torch.tensor([-3.0, -3.0, -3.0]), torch.tensor([True] * 3))
    tuned = torch.tensor([-0.1, -1.0, -4.0])

    erring = Likelihood(tuned, torch.tensor([False, True, True]))
    flawless = Likelihood(tuned, torch.tensor([False] * 3))
    found = membership_scores([erring, flawless, base], [base] * 3)

    assert found.tolist() == pytest.approx([2.0, 4.9, 1.0])


def test_a_finding_says_what_was_told(overfit: Any, canaries: Any):
    """Its rate is the share of right answers, its prior that of the commoner one."""
    texts, included_C = canaries
    scores_C = scores_of(overfit, texts)
    audit = canary_epsilon(scores_C, included_C)

    finding = membership(scores_C, included_C, seconds=1.0, canaries=audit)

    share = float(included_C.float().mean())
    assert finding.prior_trr == pytest.approx(max(share, 1 - share))
    assert finding.trr > 0.9
    assert finding.facts()["extra"]["canaries"]["epsilon"] == audit.epsilon
    assert finding.extra["auc"] > 0.99


def test_what_makes_no_sense_is_refused_in_one_sentence(canaries: Any):
    """Impossible counts, unknown scores, missing members and NaN each end in a named error."""
    fine = Likelihood(torch.zeros(3), torch.tensor([True] * 3))
    broken = Likelihood(torch.full((3,), math.nan), torch.tensor([True] * 3))
    cases: list[tuple[type[Exception], Any]] = [
        (ConfigError, lambda: epsilon_lower_bound(5, 4, 10)),
        (ConfigError, lambda: epsilon_lower_bound(3, 4, 10, delta=1.0)),
        (ConfigError, lambda: membership_scores([fine], [fine], score="lira")),
        (DataError, lambda: membership_scores([fine], [fine, fine])),
        (NotFinite, lambda: membership_scores([broken], [fine])),
        (DataError, lambda: separation(torch.zeros(3), torch.ones(3).bool())),
        (DataError, lambda: canary_epsilon(torch.zeros(3), torch.ones(4).bool())),
        (DataError, lambda: likelihoods(lambda *_: torch.zeros(0), [torch.tensor([5])])),
    ]
    for kind, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert refusal(caught.value)
