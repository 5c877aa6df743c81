"""A1: what forward search reads from activations, and that it reads nothing where nothing is."""

# Shapes:  B texts   T tokens   D model width   V vocabulary

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.audit.candidates import CandidateTable
from cutlayer.audit.forward_search import (
    SearchSettings,
    estimate_sigma,
    forward_search,
    search,
)
from cutlayer.audit.metrics import clopper_pearson
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError, NotFinite
from tests.audit.victims import (
    clinical_ids,
    noisy,
    public_of,
    quantiser,
    random_ids,
    refusal,
    rotation,
    sent,
    smollm2,
    write_gpt2,
)

TEXTS, TOKENS = 16, 16
FEW = (64, 256, None)  # candidates, of a vocabulary of 1,024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of GPT-2's shape with 1,024 tokens."""
    return write_gpt2(tmp_path_factory.mktemp("models") / "gpt2", layers=5)


@pytest.fixture(scope="module")
def public(folder: Path) -> PublicModel:
    """Its ends at a cut above the third layer."""
    return public_of(folder, bottom=3)


@pytest.fixture(scope="module")
def table(public: PublicModel) -> CandidateTable:
    """Its table of candidates, made once."""
    return CandidateTable(public)


@pytest.fixture(scope="module")
def ids_BT(public: PublicModel) -> Tensor:
    """Texts of random tokens."""
    return random_ids(public.vocabulary, TEXTS, TOKENS)


@pytest.mark.parametrize("cut", [1, 3])
def test_clean_activations_are_the_text(
    folder: Path, ids_BT: Tensor, cut: int, measured: Callable[..., None]
):
    """T-A1: whatever the cut, every token of every text is read back, on few candidates."""
    public = public_of(folder, bottom=cut)

    found = forward_search(public, sent(public, ids_BT), list(ids_BT), SearchSettings(rungs=FEW))

    measured(trr=found.trr)
    assert found.trr == found.exact == found.extra["forced"]["trr"] == 1.0
    assert found.verdict == "plaintext"
    assert json.loads(json.dumps(found.facts()))["verdict"] == "plaintext"
    assert found.extra["candidates_median"] <= 0.1 * public.vocabulary
    assert found.extra["margin_median"] > 1000


def test_embeddings_alone_are_the_text(folder: Path, ids_BT: Tensor):
    """Below the first layer rows of public tables are sent, for the token and for its place."""
    public = public_of(folder, bottom=0)

    found = forward_search(public, sent(public, ids_BT[:4]), list(ids_BT[:4]))

    assert found.exact == 1.0


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "mistral", "opt", "bloom", "gpt_neox", "phi3", "qwen3_moe"]
)
def test_families_are_read_at_every_position(folder_of: Callable[..., Path], family: str):
    """Windows, offsets, biases and experts are the family's own: cached steps are the client's."""
    public = public_of(folder_of(family), bottom=3)
    ids_T = random_ids(public.vocabulary, 1, 14)[0]

    found = search(public, sent(public, ids_T[None])[0], SearchSettings(rungs=(16, None)))

    assert found.ids == tuple(ids_T.tolist())
    assert min(found.margins) > 100


def permuted_rows(rows_TD: Tensor) -> Tensor:
    """Return each row with its elements in an order of its own."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack(
        [row_D[torch.randperm(len(row_D), generator=generator)] for row_D in rows_TD]
    )


def permuted_text(rows_TD: Tensor) -> Tensor:
    """Return the rows in a secret order."""
    return rows_TD[torch.randperm(len(rows_TD), generator=torch.Generator().manual_seed(4))]


def rotated(rows_TD: Tensor) -> Tensor:
    """Return the rows secretly rotated."""
    return rows_TD @ rotation(rows_TD.shape[1])


def projected(rows_TD: Tensor) -> Tensor:
    """Return the rows on eight directions that are public."""
    generator = torch.Generator().manual_seed(5)
    return rows_TD @ torch.randn(rows_TD.shape[1], 8, generator=generator)


CASES = [
    pytest.param(permuted_rows, SearchSettings(score="sorted_l1"), 0.99, id="permutation"),
    pytest.param(permuted_text, SearchSettings(score="any_row"), 0.99, id="order"),
    pytest.param(rotated, SearchSettings(score="gram"), 0.99, id="rotation"),
    pytest.param(
        quantiser(8), SearchSettings(score="quant", release=quantiser(8)), 0.99, id="int8"
    ),
    pytest.param(
        quantiser(4), SearchSettings(score="quant", release=quantiser(4)), 0.90, id="int4"
    ),
    pytest.param(projected, SearchSettings(release=projected), 0.99, id="projection"),
]


@functools.cache
def real_table() -> CandidateTable:
    """Return SmolLM2's table of candidates, made once."""
    return CandidateTable(smollm2())


@pytest.mark.parametrize(("hide", "settings", "least"), CASES)
def test_cheap_obfuscation_is_read_through(
    public: PublicModel,
    table: CandidateTable,
    ids_BT: Tensor,
    hide: Callable[[Tensor], Tensor],
    settings: SearchSettings,
    least: float,
    measured: Callable[..., None],
):
    """T-A1b: permutation, rotation, rounding and projection leave the text where it was."""
    texts = ids_BT[:6]
    hidden = [hide(rows_TD) for rows_TD in sent(public, texts)]

    found = forward_search(public, hidden, list(texts), replace(settings, rungs=FEW), table=table)

    measured(trr=found.trr)
    assert found.trr >= least


def test_a_rotation_stops_only_who_does_not_expect_it(
    public: PublicModel, table: CandidateTable, ids_BT: Tensor
):
    """Plain distances read nothing of rotated activations: the scores do differ."""
    hidden = [rotated(rows_TD) for rows_TD in sent(public, ids_BT[:2])]

    found = forward_search(public, hidden, list(ids_BT[:2]), table=table)

    assert found.trr <= 0.05


@pytest.mark.parametrize("score", ["l2", "map", "sorted_l1", "any_row", "gram"])
def test_noise_in_place_of_activations_gives_chance(
    public: PublicModel,
    table: CandidateTable,
    ids_BT: Tensor,
    score: str,
    measured: Callable[..., None],
):
    """T-A1c: the harness, which holds the truth, hands none of it to the search."""
    settings, texts = SearchSettings(score=score, rungs=FEW), ids_BT[:3]
    generator = torch.Generator().manual_seed(6)
    hidden = [
        rows_TD.square().mean().sqrt() * torch.randn(rows_TD.shape, generator=generator)
        for rows_TD in sent(public, texts)
    ]

    found = forward_search(public, hidden, list(texts), settings, table=table)

    measured(trr=found.trr)
    for rate in (found.trr, found.extra["forced"]["trr"]):
        low, high = clopper_pearson(round(rate * found.tokens), found.tokens)
        assert low <= 1 / public.vocabulary <= high
    assert found.verdict == "near prior"


def zipf(vocabulary: int) -> Tensor:
    """Return the log-probabilities of a language in which each token has its frequency, (V,)."""
    return torch.log_softmax(-1.5 * torch.log1p(torch.arange(vocabulary).float()), 0)


def test_noise_is_read_through_until_it_is_large(public: PublicModel, table: CandidateTable):
    """More noise, fewer tokens; what a prior knows helps where noise leaves a doubt."""
    log_prior_V = zipf(public.vocabulary)
    generator = torch.Generator().manual_seed(7)
    ids_BT = torch.multinomial(log_prior_V.exp(), 5 * 10, replacement=True, generator=generator)
    texts = list(ids_BT.reshape(5, 10))
    clean = sent(public, torch.stack(texts))

    def rate(ratio: float, prior: Any) -> float:
        """Return the share of tokens that are read, each after the true ones before it."""
        right = 0
        for seed, (rows_TD, ids_T) in enumerate(zip(clean, texts, strict=True)):
            hidden_TD, sigma = noisy(rows_TD, ratio, seed=seed)
            settings = SearchSettings(score="map", sigma=sigma, rungs=FEW)
            found = search(public, hidden_TD, settings, truth=ids_T, prior=prior, table=table)
            right += sum(a == b for a, b in zip(found.ids, ids_T.tolist(), strict=True))
        return right / sum(map(len, texts))

    informed = [rate(ratio, lambda _: log_prior_V) for ratio in (0.1, 2.0, 4.0)]
    blind = [rate(ratio, None) for ratio in (0.1, 2.0, 4.0)]

    assert informed[0] == blind[0] == 1.0
    assert informed == sorted(informed, reverse=True)
    assert blind == sorted(blind, reverse=True)
    assert blind[-1] < 0.5
    assert all(a >= b for a, b in zip(informed, blind, strict=True))
    assert informed[-1] >= blind[-1] + 0.1


def test_the_baseline_is_what_the_prior_says_without_the_traffic(
    public: PublicModel, table: CandidateTable
):
    """The advantage counts only what the best guess after the true prefix would not get."""
    log_prior_V = zipf(public.vocabulary)
    ids_T = torch.tensor([0, 0, 5, 0])

    found = forward_search(
        public,
        sent(public, ids_T[None]),
        [ids_T],
        SearchSettings(score="map", sigma=1e-3),
        prior=lambda _: log_prior_V,
        table=table,
    )

    assert found.prior_trr == 0.75
    assert found.trr == found.advantage == 1.0


def test_a_beam_reads_more_than_one_path(public: PublicModel, table: CandidateTable):
    """Where noise misleads at one position, the later ones set it right."""
    ids_BT = random_ids(public.vocabulary, 4, 8, seed=8)
    hidden = [
        noisy(rows_TD, 1.2, seed=seed)[0] for seed, rows_TD in enumerate(sent(public, ids_BT))
    ]

    rates = []
    for beams in (1, 4):
        settings = SearchSettings(score="map", beams=beams, rungs=FEW)
        found = forward_search(public, hidden, list(ids_BT), settings, table=table)
        rates.append(found.trr)

    assert rates[1] >= rates[0]


def test_a_proof_ends_the_doubt(public: PublicModel, table: CandidateTable, ids_BT: Tensor):
    """Where a match is exact no other text is kept in mind, so that a beam costs nothing."""
    clean_TD = sent(public, ids_BT[:1])[0]

    one, four = (
        search(public, clean_TD, SearchSettings(beams=beams, rungs=FEW), table=table)
        for beams in (1, 4)
    )

    assert one.ids == four.ids == tuple(ids_BT[0].tolist())
    assert one.candidates == four.candidates


def test_a_search_says_whether_its_matches_were_exact(
    public: PublicModel, table: CandidateTable, ids_BT: Tensor
):
    """Noise that nobody spoke of is noticed, and the text is read all the same."""
    clean_TD = sent(public, ids_BT[:1])[0]
    noisy_TD, _sigma = noisy(clean_TD, 0.05)

    clean, disturbed = (
        search(public, rows_TD, SearchSettings(rungs=FEW), table=table)
        for rows_TD in (clean_TD, noisy_TD)
    )

    assert clean.exact
    assert not disturbed.exact
    assert clean.ids == disturbed.ids


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_the_noise_is_estimated_from_the_traffic(
    public: PublicModel, table: CandidateTable, ids_BT: Tensor, ratio: float
):
    """An attacker who is not told the noise's strength finds it within a tenth."""
    pairs = [noisy(rows_TD, ratio, seed=seed) for seed, rows_TD in enumerate(sent(public, ids_BT))]
    expected = sum(sigma for _, sigma in pairs) / len(pairs)

    found = estimate_sigma(public, [rows_TD for rows_TD, _ in pairs], table=table)

    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_policy_loses_nothing(
    public: PublicModel, table: CandidateTable, ids_BT: Tensor, ratio: float
):
    """Trying the likely candidates first finds what trying all of them finds."""
    texts = ids_BT[:2]
    pairs = [noisy(rows_TD, ratio, seed=seed) for seed, rows_TD in enumerate(sent(public, texts))]

    few, every = (
        [
            search(public, rows_TD, SearchSettings(rungs=rungs), table=table).ids
            for rows_TD, _ in pairs
        ]
        for rungs in ((32, 128, None), (None,))
    )

    assert few == every


def test_a_model_that_reads_both_ways_is_refused(folder_of: Callable[..., Path]):
    """In an encoder each activation depends on later tokens: there is nothing to search along."""
    folder = folder_of("bert", task="sequence-classification")
    public = public_of(folder, bottom=2, top=1, task="sequence-classification")
    ids_BT = random_ids(80, 1, 6)

    with pytest.raises(ConfigError, match="left to right") as error:
        forward_search(public, sent(public, ids_BT), list(ids_BT))
    assert "'bert'" in refusal(error.value)


def test_an_encoders_embeddings_alone_are_read(folder_of: Callable[..., Path]):
    """Below its first layer an encoder has not looked around yet, and is read like any other."""
    folder = folder_of("bert", task="sequence-classification")
    public = public_of(folder, bottom=0, top=1, task="sequence-classification")
    ids_BT = random_ids(80, 2, 6)

    found = forward_search(public, sent(public, ids_BT), list(ids_BT))

    assert found.exact == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "l3"},
        {"score": "quant"},
        {"beams": 0},
        {"rungs": (256, 16)},
        {"rungs": ()},
        {"sigma": -1.0},
        {"eps": float("nan")},
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(settings: dict[str, Any]):
    """A setting that cannot be meant is refused in one sentence."""
    with pytest.raises(ConfigError) as error:
        SearchSettings(**settings)
    refusal(error.value)


def test_traffic_that_does_not_fit_is_refused(public: PublicModel, ids_BT: Tensor):
    """Another width, another length and numbers that are none are refused in one sentence."""
    rows_TD, ids_T = sent(public, ids_BT[:1])[0], ids_BT[0]

    with pytest.raises(ConfigError, match="the model and the cut of the run") as width:
        search(public, rows_TD[:, 1:])
    with pytest.raises(NotFinite, match="NaN") as finite:
        search(public, rows_TD.masked_fill(rows_TD > 0, float("nan")))
    with pytest.raises(DataError, match="without padding") as length:
        forward_search(public, [rows_TD], [ids_T[1:]])
    for error in (width, finite, length):
        refusal(error.value)


SENTENCE = (
    "Patient Maria Oberholzer of Lucerne was admitted with acute appendicitis and diabetes; she "
    "is afraid of the surgery."
)


def test_real_weights_give_a_clinical_sentence_away():
    """SmolLM2, 2 of 30 layers at the client: the sentence comes back whole, on 1% of the tokens."""
    public, ids_T = smollm2(), clinical_ids(SENTENCE)

    found = forward_search(public, sent(public, ids_T[None]), [ids_T])

    assert len(ids_T) >= 24
    assert found.trr == found.exact == 1.0
    assert found.extra["candidates_median"] <= 0.01 * public.vocabulary


@pytest.mark.slow
def test_real_weights_give_names_and_dates_away():
    """Digits, which no line through the embeddings foresees, cost one full search at most."""
    public, ids_T = smollm2(), clinical_ids()

    found = forward_search(public, sent(public, ids_T[None]), [ids_T])

    assert found.exact == 1.0
    assert found.extra["candidates_mean"] <= 0.05 * public.vocabulary


@pytest.mark.slow
@pytest.mark.parametrize(("hide", "settings", "least"), CASES)
def test_cheap_obfuscation_of_real_weights_is_read_through(
    hide: Callable[[Tensor], Tensor],
    settings: SearchSettings,
    least: float,
    measured: Callable[..., None],
):
    """T-A1b: on SmolLM2 as well, over the whole vocabulary."""
    public, ids_T = smollm2(), clinical_ids(SENTENCE)[:10]
    hidden = [hide(rows_TD) for rows_TD in sent(public, ids_T[None])]

    found = forward_search(public, hidden, [ids_T], settings, table=real_table())

    measured(trr=found.trr)
    assert found.trr >= least


@pytest.mark.slow
def test_noise_on_real_weights_is_read_through_until_it_is_large():
    """On SmolLM2 as well: more noise, fewer tokens."""
    public, ids_T = smollm2(), clinical_ids(SENTENCE)[:10]
    rates = []
    for ratio in (0.1, 2.0, 6.0):
        rows_TD, sigma = noisy(sent(public, ids_T[None])[0], ratio)
        settings = SearchSettings(score="map", sigma=sigma)
        found = forward_search(public, [rows_TD], [ids_T], settings, table=real_table())
        rates.append(found.extra["forced"]["trr"])

    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5
