"""A5: a few known tokens undo a secret bottom or rotation; without knowledge nothing is undone."""

# Shapes:  B texts   T tokens   N known tokens   D model width

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.audit.alignment import align, aligned_search
from cutlayer.audit.candidates import CandidateTable
from cutlayer.audit.forward_search import SearchSettings, forward_search
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError
from tests.audit.victims import (
    DATA,
    clinical_ids,
    public_of,
    random_ids,
    refusal,
    rotation,
    sent,
    smollm2,
    write_gpt2,
)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> PublicModel:
    """A random model of GPT-2's shape with 1,024 tokens, cut above the second layer."""
    return public_of(write_gpt2(tmp_path_factory.mktemp("models") / "gpt2"))


@pytest.fixture(scope="module")
def table(public: PublicModel) -> CandidateTable:
    """Its table of candidates, made once."""
    return CandidateTable(public)


@pytest.fixture(scope="module")
def ids_BT(public: PublicModel) -> Tensor:
    """Texts of random tokens to read."""
    return random_ids(public.vocabulary, 4, 10)


@pytest.fixture(scope="module")
def known_BT(public: PublicModel) -> Tensor:
    """Texts of random tokens that the attacker knows."""
    return random_ids(public.vocabulary, 16, 16, seed=1)


def test_256_known_tokens_undo_a_rotation(
    public: PublicModel,
    table: CandidateTable,
    ids_BT: Tensor,
    known_BT: Tensor,
    measured: Callable[..., None],
):
    """T-A5: a secret rotation, unreadable before, is read after 256 known tokens."""
    secret_DD = rotation(public.head_VD.shape[1])
    hidden = [rows_TD @ secret_DD for rows_TD in sent(public, ids_BT)]
    hidden_known = [rows_TD @ secret_DD for rows_TD in sent(public, known_BT)]

    before = forward_search(public, hidden, list(ids_BT), SearchSettings(eps=0.0), table=table)
    after = aligned_search(public, hidden, list(ids_BT), hidden_known, list(known_BT), table=table)

    measured(before=before.trr, after=after.trr)
    assert before.trr <= 0.05
    assert after.trr >= 0.95
    assert after.attack == "A5"
    assert after.params["fit"] == "rotation"


def test_knowledge_of_other_tokens_undoes_nothing(
    public: PublicModel, table: CandidateTable, ids_BT: Tensor, known_BT: Tensor
):
    """Pairs that do not belong together teach nothing: the harness adds nothing of its own.

    Nor do their places in the text belong together: those alone would show some directions.
    """
    secret_DD = rotation(public.head_VD.shape[1])
    order = torch.randperm(known_BT.numel(), generator=torch.Generator().manual_seed(2))
    others_BT = known_BT.flatten()[order].reshape(known_BT.shape)
    hidden = [rows_TD @ secret_DD for rows_TD in sent(public, ids_BT)]
    hidden_known = [rows_TD @ secret_DD for rows_TD in sent(public, others_BT)]

    found = aligned_search(public, hidden, list(ids_BT), hidden_known, list(known_BT), table=table)

    assert found.trr <= 0.05


def test_a_public_bottom_stays_readable(
    public: PublicModel, table: CandidateTable, ids_BT: Tensor, known_BT: Tensor
):
    """Where nothing was secret, an alignment spoils nothing."""
    found = aligned_search(
        public,
        sent(public, ids_BT),
        list(ids_BT),
        sent(public, known_BT),
        list(known_BT),
        table=table,
    )

    assert found.trr == 1.0


def test_64_known_tokens_undo_a_secret_adapter(
    public: PublicModel,
    table: CandidateTable,
    ids_BT: Tensor,
    known_BT: Tensor,
    measured: Callable[..., None],
):
    """T-A5: where a secret change of rank 1 hides most tokens from A1, A5 reads four of five."""
    generator, secret = torch.Generator().manual_seed(7), {}

    def moved(name: str, value: Tensor) -> Tensor:
        if value.dim() != 2 or ".h." not in name:
            return value
        if name not in secret:  # once: it is asked for with every call
            left, right = (torch.randn(n, generator=generator) for n in value.shape)
            change = torch.outer(left, right)
            secret[name] = value + 3 * change * value.norm() / change.norm()
        return secret[name]

    with public.weights_changed(moved):
        hidden, hidden_known = sent(public, ids_BT), sent(public, known_BT)
    settings = SearchSettings(eps=0.0, rungs=(256,))

    before = forward_search(public, hidden, list(ids_BT), settings, table=table)
    after = aligned_search(
        public,
        hidden,
        list(ids_BT),
        hidden_known,
        list(known_BT),
        settings,
        known_tokens=64,
        table=table,
    )

    measured(before=before.extra["forced"]["trr"], after=after.extra["forced"]["trr"])
    assert before.extra["forced"]["trr"] <= 0.6
    assert after.extra["forced"]["trr"] >= 0.8


def tuned_bottom(texts_BT: Tensor) -> dict[str, Tensor]:
    """Train SmolLM2's first two layers on these texts, as a client might in secret.

    Only the ends' layers take part, which is quick and moves the bottom far.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(DATA / "smollm2", dtype=torch.float32)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([*layers[:2], *layers[-2:]])
    model.config.num_hidden_layers = 4
    model.requires_grad_(False)
    bottom = model.model.layers[:2].requires_grad_(True)
    optimizer = torch.optim.AdamW(bottom.parameters(), lr=1e-3)
    for batch_BT in texts_BT:
        model(batch_BT, labels=batch_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {f"model.layers.{name}": p.detach() for name, p in bottom.named_parameters()}


def diagnoses() -> Tensor:
    """Return the demo's texts as one row of tokens, (T,)."""
    lines = (DATA / "icd10/train.jsonl").read_text().splitlines()[:6000]
    names = [json.loads(line)["prompt"][-1]["content"] for line in lines]
    return clinical_ids(". ".join(names))


@pytest.mark.slow
def test_64_known_tokens_undo_a_secret_training_of_real_weights(measured: Callable[..., None]):
    """T-A5: where training moved the bottom so far that A1 fails, A5 reads four of five tokens."""
    ids_T, public = diagnoses(), smollm2()
    weights = tuned_bottom(ids_T[: 40 * 128].reshape(40, 4, 32))
    texts = [clinical_ids()[:24], ids_T[-24:]]
    known = list(ids_T[-1000:][: 4 * 32].reshape(4, 32))
    with public.weights_changed(lambda name, value: weights.get(name, value)):
        hidden = [sent(public, one_T[None])[0] for one_T in texts]
        hidden_known = [sent(public, one_T[None])[0] for one_T in known]
    settings, table = SearchSettings(eps=0.0, rungs=(256,)), CandidateTable(public)

    before = forward_search(public, hidden, texts, settings, table=table)
    after = aligned_search(
        public, hidden, texts, hidden_known, known, settings, known_tokens=64, table=table
    )

    measured(before=before.extra["forced"]["trr"], after=after.extra["forced"]["trr"])
    assert before.extra["forced"]["trr"] <= 0.6
    assert after.extra["forced"]["trr"] >= 0.8
    assert after.params["fit"] == "residual"


def test_what_makes_no_alignment_is_refused(public: PublicModel, known_BT: Tensor):
    """Unknown fits, too few tokens and pairs that do not match are refused in one sentence."""
    rows, texts = sent(public, known_BT[:2]), list(known_BT[:2])

    with pytest.raises(ConfigError, match="best or one of") as unknown:
        align(rows[0], rows[0], "guess")
    with pytest.raises(DataError, match="8 at least") as few:
        align(rows[0][:4], rows[0][:4])
    with pytest.raises(DataError, match="without padding") as apart:
        aligned_search(public, rows, texts, rows, [texts[0]])
    with pytest.raises(ConfigError, match="leave release") as release:
        aligned_search(public, rows, texts, rows, texts, SearchSettings(sigma=1.0))
    for error in (unknown, few, apart, release):
        refusal(error.value)
