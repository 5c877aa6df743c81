"""What a network trained on public text reads from activations, clean and defended."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.audit.inverter import (
    PUBLISHED_INVERTER,
    InverterSettings,
    add_gaussian,
    invert,
    learned_inversion,
    train_inverter,
    train_mixture,
)
from cutlayer.audit.inverter_networks import LinearHead, MixtureInverter
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError, NotFinite
from tests.audit.victims import (
    DATA,
    noisy,
    public_of,
    random_ids,
    refusal,
    smollm2,
    tokenizer_of_smollm2,
    write_gpt2,
)

RECIPES = Path(__file__).parents[2] / "recipes"
FEW = InverterSettings(epochs=8, gate_epochs=3, joint_epochs=2, batch=16, lr=5e-3)
ONCE = InverterSettings(epochs=1, least_steps=0, width=16)


def wordings(path: Path) -> list[Tensor]:
    """Return the tokens of the diagnosis wordings of a file, without the chat around them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return encoded([row["prompt"][1]["content"] for row in rows])


def encoded(texts: list[str]) -> list[Tensor]:
    """Return their tokens for SmolLM2."""
    return [torch.tensor(ids) for ids in tokenizer_of_smollm2()(texts).input_ids]


def docstrings(count: int) -> list[Tensor]:
    """Return sentences of another domain: what Python's own library says of itself."""
    found: dict[str, None] = {}
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                sentence = text.splitlines()[0]
                found |= {sentence: None} if 12 <= len(sentence) <= 64 else {}
        if len(found) >= count:
            break
    return encoded(list(found)[:count])


@torch.no_grad()
def sent_of(public: PublicModel, texts: list[Tensor]) -> list[Tensor]:
    """Return what a client sends for each text, (T, D)."""
    return [public.bottom(text[None])[0] for text in texts]


def noise_of(strength: float) -> Callable[[Tensor], Tensor]:
    """Return a defense that adds noise of this strength."""
    return lambda smashed_BTD: add_gaussian(smashed_BTD, strength)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PublicModel:
    """A GPT-2 drawn at random."""
    return public_of(write_gpt2(tmp_path_factory.mktemp("gpt2")))


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    """Random texts of 64 tokens, of several lengths."""
    rows = random_ids(64, 200, 12, seed=5)
    return [row[: 4 + i % 9] for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def victims() -> list[Tensor]:
    """Texts of the same kind that no inverter is trained on."""
    return list(random_ids(64, 40, 12, seed=6))


def test_in_domain_wordings_are_read_back(measured: Callable[..., None]):
    """T-A2: 500 public wordings let 100 others be read, at SmolLM2's cut 2 (reduced)."""
    public, held = smollm2(), wordings(DATA / "icd10/test.jsonl")[:100]
    inverter = train_inverter(public, wordings(DATA / "icd10/train.jsonl")[:500])

    finding = learned_inversion(inverter, sent_of(public, held), held)

    measured(rouge_l=finding.rouge["L"])
    assert finding.rouge["L"] >= 0.8
    assert finding.prior_trr < 0.05
    assert finding.trr > finding.extra["seen_tokens_share"] + 0.1  # it reads tokens it never saw


def test_text_of_another_domain_helps_as_well(measured: Callable[..., None]):
    """T-A2: an inverter that saw 500 docstrings only reads much of the diagnoses (reduced)."""
    public, held = smollm2(), wordings(DATA / "icd10/test.jsonl")[:100]
    inverter = train_inverter(public, docstrings(500))

    finding = learned_inversion(inverter, sent_of(public, held), held)

    measured(rouge_l=finding.rouge["L"])
    assert finding.rouge["L"] >= 0.35


def test_an_inverter_taught_shuffled_labels_reads_nothing(measured: Callable[..., None]):
    """T-A2: as a control, of tokens dealt anew among the public texts ROUGE-L is .10 at most."""
    public, held = smollm2(), wordings(DATA / "icd10/test.jsonl")[:100]
    aux = wordings(DATA / "icd10/train.jsonl")[:200]
    order = torch.randperm(sum(map(len, aux)), generator=torch.Generator().manual_seed(0))
    labels = list(torch.cat(aux)[order].split([*map(len, aux)]))
    inverter = train_inverter(public, aux, labels=labels)

    found = learned_inversion(inverter, sent_of(public, held), held).rouge["L"]
    measured(rouge_l=found)
    assert found <= 0.1


def test_a_linear_head_answers_with_tokens_of_the_public_text_only(small: Any):
    """As published, what was not seen is not read; a comparison with the embedding reads it."""
    aux = list(2 * random_ids(512, 300, 12, seed=7))
    strangers = list(2 * random_ids(512, 40, 12, seed=8) + 1)
    found = {}
    for head in ("linear", "embedding"):
        inverter = train_inverter(small, aux, settings=replace(FEW, head=head))
        found[head] = learned_inversion(inverter, sent_of(small, strangers), strangers)

    assert found["linear"].trr == found["embedding"].extra["seen_tokens_share"] == 0
    assert found["embedding"].trr >= 0.5


def test_noise_in_place_of_activations_is_read_at_chance(small: Any, texts: Any, victims: Any):
    """The harness leaks nothing: of activations that never met the text, 1 token in 64 is hit."""
    inverter = train_inverter(small, texts, settings=FEW)
    smashed = sent_of(small, victims)
    scale = torch.cat(smashed).std()

    real = learned_inversion(inverter, smashed, victims)
    drawn = [scale * torch.randn_like(rows) for rows in smashed]
    blind = learned_inversion(inverter, drawn, victims)

    assert real.trr >= 0.95
    assert blind.trr <= 0.05


def test_training_on_the_defense_reads_through_it(small: Any, texts: Any, victims: Any):
    """An inverter that saw the noise reads more under it than one that was trained clean."""
    blurred = [noise_of(1.5)(rows[None])[0] for rows in sent_of(small, victims)]

    clean = train_inverter(small, texts, settings=FEW)
    adapted = train_inverter(small, texts, defend=noise_of(1.5), settings=FEW)

    found = [learned_inversion(inverter, blurred, victims).trr for inverter in (clean, adapted)]
    assert found[1] >= found[0] + 0.05


def test_the_defense_is_drawn_anew_for_every_epoch(small: Any, texts: Any):
    """No text is seen twice under the same noise."""
    seen: list[float] = []

    def defend(smashed_BTD: Tensor) -> Tensor:
        noisy_BTD = add_gaussian(smashed_BTD, 0.5)
        seen.append(float(noisy_BTD.sum()))
        return noisy_BTD

    train_inverter(small, texts[:40], defend=defend, settings=replace(ONCE, epochs=3))

    assert len(seen) >= 3 * 38
    assert len(set(seen)) == len(seen)


def test_a_defense_may_change_the_width(small: Any, texts: Any, victims: Any):
    """A public projection to 24 dimensions is learned like anything else."""
    projection = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
    inverter = train_inverter(small, texts, defend=lambda h: h @ projection, settings=FEW)

    found = learned_inversion(inverter, [h @ projection for h in sent_of(small, victims)], victims)

    assert found.trr >= 0.9


def test_a_mixture_reads_through_noise_that_a_clean_gru_does_not(
    small: Any, texts: Any, victims: Any, measured: Callable[..., None]
):
    """T-A2n: the mixture is ahead by .05 ROUGE-L where noise hurts at all (reduced)."""
    smashed, repeated = sent_of(small, victims), victims * 8  # so many that chance decides nothing
    blurred = [noise_of(1.5)(rows[None])[0] for rows in smashed * 8]

    gru = train_inverter(small, texts, settings=FEW)
    mixture = train_mixture(small, texts, strengths=(0.5, 1.0, 2.0), settings=FEW)

    ahead = [learned_inversion(one, blurred, repeated).rouge["L"] for one in (mixture, gru)]
    measured(ahead=ahead[0] - ahead[1])
    assert ahead[0] - ahead[1] >= 0.05
    assert learned_inversion(mixture, smashed, victims).trr >= 0.9  # and clean it is no worse


def test_a_text_is_read_alike_alone_and_among_others():
    """The mixture's gate looks at one text: others in the batch, and padding, change nothing."""
    torch.manual_seed(0)
    head = LinearHead(32, torch.arange(10))
    network = MixtureInverter(16, head, 3, width=32, dropout=0.1).eval()
    alone_BTD, others_BTD = torch.randn(1, 5, 16), torch.randn(3, 9, 16)
    padded_BTD = torch.cat([torch.nn.functional.pad(alone_BTD, (0, 0, 0, 4)), others_BTD])
    mask_BT = torch.ones(4, 9, dtype=torch.bool)
    mask_BT[0, 5:] = False

    with torch.no_grad():
        alone = network(alone_BTD, mask_BT[:1, :5])
        together = network(padded_BTD, mask_BT)[:1, :5]

    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_what_is_read(small: Any, texts: Any):
    """A batch of texts of several lengths is read as each text is."""
    inverter = train_inverter(small, texts[:40], settings=ONCE)
    smashed = sent_of(small, texts[:6])
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in smashed], True)

    together = invert(inverter, torch.nn.utils.rnn.pad_sequence(smashed, True), mask_BT)

    for rows, ids_T in zip(smashed, together, strict=True):
        assert torch.equal(invert(inverter, rows[None])[0], ids_T[: len(rows)])


def test_a_seed_decides_everything_and_nothing_else_is_touched(small: Any, texts: Any):
    """The same seed gives the same inverter, and torch's own generator is left as it was."""
    settings = replace(ONCE, epochs=2)
    before = torch.random.get_rng_state()

    found = [
        train_inverter(small, texts[:60], defend=noise_of(0.3), settings=settings, seed=seed)
        for seed in (3, 3, 4)
    ]

    weights = [inverter.network.head.query.weight for inverter in found]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_logits_are_over_the_whole_vocabulary(small: Any, texts: Any):
    """Tokens that a linear head does not know stand at -inf, the others as the network says."""
    settings = replace(ONCE, head="linear")
    inverter = train_inverter(small, texts[:40], settings=settings)
    smashed_BTD = small.bottom(texts[0][None])

    logits_BTV = inverter.logits(smashed_BTD)

    assert logits_BTV.shape == (1, len(texts[0]), small.vocabulary)
    assert int(logits_BTV[0, 0].isfinite().sum()) == len(inverter.seen_K) <= 64
    assert torch.equal(logits_BTV.argmax(-1), invert(inverter, smashed_BTD))


def test_what_cannot_be_learned_from_is_refused_in_one_sentence(small: Any, texts: Any):
    """No text, foreign tokens, empty texts, odd settings and widths each end in a named error."""
    inverter = train_inverter(small, texts[:40], settings=ONCE)
    cases: list[tuple[type[Exception], Any]] = [
        (DataError, lambda: train_inverter(small, [])),
        (DataError, lambda: train_inverter(small, [torch.tensor([9999])] * 20)),
        (DataError, lambda: train_inverter(small, [torch.tensor([], dtype=torch.long)] * 20)),
        (DataError, lambda: train_inverter(small, texts[:20], labels=texts[1:21])),
        (ConfigError, lambda: train_inverter(small, texts[:20], defend=lambda h: h[:, :1])),
        (ConfigError, lambda: train_mixture(small, texts[:20], strengths=(0.0, 1.0))),
        (ConfigError, lambda: train_mixture(small, texts[:20], strengths=())),
        (ConfigError, lambda: InverterSettings(epochs=0, lr=-1.0)),
        (NotFinite, lambda: train_inverter(small, texts[:20], defend=lambda h: h * torch.nan)),
        (DataError, lambda: invert(inverter, torch.zeros(1, 3, 7))),
        (DataError, lambda: learned_inversion(inverter, [torch.zeros(3, 96)], [texts[0]])),
        (DataError, lambda: learned_inversion(inverter, [], [])),
    ]
    for kind, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert refusal(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 3])
def test_twelve_thousand_wordings_and_the_published_network(
    cut: int, tmp_path: Path, measured: Callable[..., None]
):
    """T-A2: in full, a GRU of 256 with a linear layer reads held-out wordings at ROUGE-L .80."""
    command = [sys.executable, RECIPES / "prepare_icd10.py", "--output", tmp_path]
    command += ["--train", "12600", "--max-chars", "64"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    public, aux = smollm2(bottom=cut), wordings(tmp_path / "train.jsonl")
    held = wordings(tmp_path / "test.jsonl")
    settings = replace(PUBLISHED_INVERTER, epochs=4, batch=32, lr=3e-3, standardise=True)

    inverter = train_inverter(public, aux, settings=settings)

    assert len(aux) >= 12_000
    found = learned_inversion(inverter, sent_of(public, held), held).rouge["L"]
    measured(rouge_l=found)
    assert found >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 3])
def test_text_of_another_domain_does_nearly_as_well(cut: int, measured: Callable[..., None]):
    """T-A2: in full, 1,500 docstrings are enough to read diagnoses at ROUGE-L .65."""
    public, held = smollm2(bottom=cut), wordings(DATA / "icd10/test.jsonl")
    inverter = train_inverter(public, docstrings(1500))

    found = learned_inversion(inverter, sent_of(public, held), held).rouge["L"]
    measured(rouge_l=found)
    assert found >= 0.65


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 3])
def test_a_mixture_is_ahead_under_noise_on_real_weights(cut: int, measured: Callable[..., None]):
    """T-A2n: in full, at noise of half the rms of what is sent it leads by .05 ROUGE-L."""
    public, held = smollm2(bottom=cut), wordings(DATA / "icd10/test.jsonl")
    aux = wordings(DATA / "icd10/train.jsonl")[:800]
    smashed = [noisy(rows, 0.5, seed=i)[0] for i, rows in enumerate(sent_of(public, held))]

    gru = train_inverter(public, aux)
    mixture = train_mixture(public, aux, strengths=(0.5, 1.0, 2.0))

    ahead = [learned_inversion(one, smashed, held).rouge["L"] for one in (mixture, gru)]
    measured(ahead=ahead[0] - ahead[1])
    assert ahead[0] - ahead[1] >= 0.05
