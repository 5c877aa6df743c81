"""The table of attacks, and the order in which an audit runs them: calibrate, control, attack.

An audit that cannot read undefended text is broken and must not report. One that reads text out of
noise is broken too. Only then do the attacks run, and a channel's verdict is that of the strongest.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutlayer.audit.alignment import aligned_search
from cutlayer.audit.candidates import CandidateTable
from cutlayer.audit.finding import Finding, worst
from cutlayer.audit.forward_search import SearchSettings, forward_search
from cutlayer.audit.inverter import InverterSettings, learned_inversion, train_inverter
from cutlayer.audit.labels import label_inversion
from cutlayer.audit.public import PublicModel
from cutlayer.audit.search import Prior
from cutlayer.audit.traffic import Text, made_here, texts_of
from cutlayer.errors import ConfigError, DataError, PrivacyError
from cutlayer.privacy.transcript import Departure

__all__ = [
    "ATTACKS",
    "FEWEST_TEXTS",
    "Attack",
    "Evidence",
    "calibrate",
    "channel_of",
    "check_attacks",
    "controls",
    "run_attacks",
]

FEWEST_TEXTS = 64
"""Public texts without which A2 learns nothing."""

Rows = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evidence:
    """All that an attack of the battery may use.

    Attributes:
        public: The public model at the run's cut.
        departures: What the server got.
        public_rows: Public texts as (ids, labels), none of them the client's.
        prior: A language model's next-token log-probabilities, if there is one.
        defend: What is known to be done to activations, fresh each time; `None` for nothing.
        sigma: The standard deviation of noise that is known to be on them, 0 for none.
        table: Candidates at this cut, shared by the searches.
    """

    public: PublicModel
    departures: Sequence[Departure]
    public_rows: Rows = ()
    prior: Prior | None = None
    defend: Callable[[Tensor], Tensor] | None = None
    sigma: float = 0.0
    table: CandidateTable | None = None
    texts: Sequence[Text] = field(default_factory=tuple)

    @classmethod
    def of(
        cls, public: PublicModel, departures: Sequence[Departure], *, tokens: int, **more: Any
    ) -> Evidence:
        """Return the evidence of some departures, of which A1 reads the first `tokens` a text."""
        texts = [
            Text(text.ids_T[:tokens], text.smashed_TD[:tokens]) for text in texts_of(departures)
        ]
        return cls(public, departures, table=CandidateTable(public), texts=texts, **more)


@dataclass(frozen=True)
class Attack:
    """One entry of the table."""

    name: str
    channel: str
    what: str
    """What it does, in a sentence for a reader who is no engineer."""
    run: Callable[[Evidence], Finding | None]
    """`None` where it does not apply."""
    needs: str = "texts"
    """What is missing where it does not apply."""


def _forward_search(evidence: Evidence) -> Finding | None:
    noisy = evidence.sigma > 0
    settings = SearchSettings(
        score="map" if noisy else "l2",
        beams=4 if noisy else 1,
        rungs=(256, 4096) if noisy else (256, 4096, None),
        sigma=evidence.sigma or None,
    )
    return forward_search(
        evidence.public,
        [text.smashed_TD for text in evidence.texts],
        [text.ids_T for text in evidence.texts],
        settings,
        prior=evidence.prior,
        baseline=_unigram(evidence) if evidence.prior is None else None,
        samples=[ids for ids, _labels in evidence.public_rows][:4],
        table=evidence.table,
        params={"score": settings.score},
    )


def _learned(evidence: Evidence) -> Finding | None:
    if len(evidence.public_rows) < FEWEST_TEXTS:
        return None  # too little public text to learn from
    inverter = train_inverter(
        evidence.public,
        [ids for ids, _labels in evidence.public_rows],
        defend=evidence.defend,
        settings=InverterSettings(),
    )
    smashed = [text.smashed_TD for text in evidence.texts]
    return learned_inversion(inverter, smashed, [text.ids_T for text in evidence.texts])


def _labels(evidence: Evidence) -> Finding | None:
    return _inverted(evidence.public, evidence.departures)


def _inverted(public: PublicModel, departures: Sequence[Departure]) -> Finding | None:
    # What came down is recorded wherever a gradient went up.
    pairs = [
        (departure, departure.trunk_out_BTD)
        for departure in departures
        if departure.gradient_BTD is not None and departure.trunk_out_BTD is not None
    ]
    if not pairs:
        return None
    return label_inversion(public, [d for d, _out in pairs], [out for _d, out in pairs])


def _known_plaintext(evidence: Evidence) -> Finding | None:
    """Take the first half of the texts for known, and read the second."""
    half = len(evidence.texts) // 2
    known = evidence.texts[:half]
    if sum(len(text.ids_T) for text in known) < 64:
        return None
    rest = evidence.texts[half:]
    return aligned_search(
        evidence.public,
        [text.smashed_TD for text in rest],
        [text.ids_T for text in rest],
        [text.smashed_TD for text in known],
        [text.ids_T for text in known],
        baseline=_unigram(evidence)[half:],
    )


ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack(
            "A1",
            "activations",
            "tries the whole vocabulary token by token and keeps what fits",
            _forward_search,
        ),
        Attack(
            "A2",
            "activations",
            "learns from public text to turn activations back into tokens",
            _learned,
            f"{FEWEST_TEXTS} public texts",
        ),
        Attack(
            "A4",
            "gradients",
            "solves for the labels, in which the gradient is linear",
            _labels,
            "gradients, and none leave",
        ),
        Attack(
            "A5",
            "activations",
            "learns from a few known texts what was changed secretly, then tries the vocabulary",
            _known_plaintext,
            "64 tokens in the first half of the samples",
        ),
    )
}


def check_attacks(names: Sequence[str]) -> None:
    """Refuse names that are none of the table.

    Raises:
        ConfigError: Naming the first.
    """
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ConfigError(f"attack '{unknown[0]}' is unknown: one of {', '.join(ATTACKS)}")


def run_attacks(
    evidence: Evidence,
    names: Sequence[str],
    tell: Callable[[str], None] = lambda _line: None,
    kept: Callable[[str, Callable[[], Any]], Any] = lambda _name, find: find(),
) -> list[Finding]:
    """Run some attacks of the table and return what each found.

    Args:
        evidence: What they may use.
        names: Which.
        tell: Is told what goes on.
        kept: Given an attack's name and how to run it, returns what it found as JSON has it, be it
            from before; by default it is run.

    Raises:
        ConfigError: If there is no such attack.
    """
    check_attacks(names)
    findings = []
    for name in names:
        tell(f"{name} {ATTACKS[name].what}")
        facts = kept(name, functools.partial(_facts_of, ATTACKS[name], evidence))
        if facts is not None:
            found = Finding.of(facts)
            findings.append(found)
            tell(f"{name} gave back {found.trr:.1%} of {found.tokens} in {found.seconds:.0f} s")
        else:
            tell(f"{name} was not run: it needs {ATTACKS[name].needs}")
    return findings


def _facts_of(attack: Attack, evidence: Evidence) -> dict[str, Any] | None:
    found = attack.run(evidence)
    return None if found is None else dataclasses.asdict(found)


def calibrate(evidence: Evidence) -> dict[str, Any]:
    """Read undefended public texts; whoever cannot has no right to report.

    Raises:
        PrivacyError: If not every token is given back.
        DataError: If there is no public text.
    """
    rows = evidence.public_rows[:16]
    if not rows:
        raise DataError("there is no public text to calibrate on: name some with --public_text")
    plain = made_here(evidence.public, rows, gradients=False)
    found = _forward_search(
        dataclasses.replace(evidence, departures=plain, texts=texts_of(plain), sigma=0.0)
    )
    assert found is not None
    if found.trr < 1 or found.exact < 1:
        raise PrivacyError(
            f"the audit gave back {found.trr:.1%} of undefended public text and must give back all "
            "of it, so its figures would mean nothing: report this with the model's name"
        )
    return {
        "trr": found.trr,
        "exact": found.exact,
        "sequences": found.sequences,
        "tokens": found.tokens,
        "passed": True,
    }


def controls(evidence: Evidence, *, seed: int = 0) -> list[dict[str, Any]]:
    """Check that the attacks read traffic and nothing else: noise, other labels, a canary."""
    generator = torch.Generator().manual_seed(seed)
    found = [_noise_control(evidence, generator), _canary_control(evidence, generator)]
    if any(departure.gradient_BTD is not None for departure in evidence.departures):
        found.append(_shuffled_control(evidence, generator))
    return found


def _noise_control(evidence: Evidence, generator: torch.Generator) -> dict[str, Any]:
    """Noise in place of activations must give chance."""
    texts = [
        dataclasses.replace(
            text,
            smashed_TD=torch.randn(text.smashed_TD.shape, generator=generator)
            * text.smashed_TD.square().mean().sqrt(),
        )
        for text in evidence.texts[:4]
    ]
    found = forward_search(
        evidence.public,
        [text.smashed_TD for text in texts],
        [text.ids_T for text in texts],
        SearchSettings(rungs=(256,)),
        table=evidence.table,
    )
    low = found.trr_ci[0]
    return {
        "name": "noise in place of the activations",
        "expected": "chance",
        "found": found.trr,
        "tokens": found.tokens,
        "passed": low <= 1 / evidence.public.vocabulary or found.trr < 0.02,
    }


def _canary_control(evidence: Evidence, generator: torch.Generator) -> dict[str, Any]:
    """A text of random tokens, which no language model could guess, must be found."""
    ids_T = torch.randint(evidence.public.vocabulary, (12,), generator=generator)
    sent = texts_of(made_here(evidence.public, [(ids_T, ids_T)], gradients=False))
    found = forward_search(
        evidence.public, [sent[0].smashed_TD], [ids_T], SearchSettings(), table=evidence.table
    )
    return {
        "name": "a random text sent without defense",
        "expected": 1.0,
        "found": found.trr,
        "tokens": found.tokens,
        "passed": found.trr == 1,
    }


def _shuffled_control(evidence: Evidence, generator: torch.Generator) -> dict[str, Any]:
    """Gradients of shuffled labels must give back the shuffled labels."""
    rows = []
    for ids_T, _labels in evidence.public_rows[:8]:
        rows.append((ids_T, ids_T[torch.randperm(len(ids_T), generator=generator)]))
    found = _inverted(evidence.public, made_here(evidence.public, rows))
    assert found is not None
    return {
        "name": "gradients of shuffled labels give the shuffled labels",
        "expected": 1.0,
        "found": found.trr,
        "tokens": found.tokens,
        "passed": found.trr >= 0.9,
    }


def channel_of(name: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return one channel's part of the report."""
    mine = [finding for finding in findings if finding.channel == name]
    decides = worst(mine)
    if decides is None:
        return {"channel": name, "verdict": "not measured", "sentence": "", "findings": []}
    return {
        "channel": name,
        "verdict": decides.verdict,
        "sentence": _SENTENCES[name][decides.verdict],
        "decided_by": decides.attack,
        "findings": [finding.facts() for finding in mine],
    }


_SENTENCES = {
    "activations": {
        "plaintext": "The server can read your text: treat it as having a copy.",
        "severe": "The server can read most of your text.",
        "partial": "The server can read parts of your text that it could not have guessed.",
        "near prior": "These attacks read hardly more of your text than guessing would.",
    },
    "gradients": {
        "plaintext": "The server can read your labels: treat it as having a copy.",
        "severe": "The server can read most of your labels.",
        "partial": "The server can read labels that it could not have guessed.",
        "near prior": "These attacks read hardly more of your labels than guessing would.",
    },
}


def _unigram(evidence: Evidence) -> list[Tensor]:
    counted = torch.cat([ids for ids, _labels in evidence.public_rows] or [torch.zeros(1).long()])
    commonest = int(counted.mode().values)
    return [torch.full_like(text.ids_T, commonest) for text in evidence.texts]
