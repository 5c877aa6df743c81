"""A made-up audit, with the shape and the magnitudes of a real one, for the report's tests."""

from __future__ import annotations

from typing import Any

from cutlayer.audit.finding import Finding

TEXT = [
    *("Patient", " Maria", " Oak", "wood", ",", " born", " ", "1", "4", "/", "0", "3", "/"),
    *("1", "9", "6", "2", ",", " admitted", " with", " acute", " peric", "arditis", " and"),
    *(" a", " history", " of", " atrial", " fibr", "illation", ".", "\n", "Discharged", " on"),
    *(" col", "chic", "ine", " and", " api", "x", "aban", ";", " review", " in", " two"),
    *(" weeks", "."),
]
MISREAD = {2: " Joan", 3: "ham", 11: "8", 22: "itis", 36: "oc", 40: "ro"}


def finding(attack: str, channel: str, trr: float, prior: float, **more: Any) -> dict[str, Any]:
    """Return the facts of a finding with this recovery rate."""
    half = 0.0 if trr in {0.0, 1.0} else 0.021
    made = Finding(
        attack=attack,
        channel=channel,
        params=more.get("params", {}),
        sequences=64,
        tokens=2048,
        trr=trr,
        trr_ci=(max(trr - half, 0), min(trr + half, 1)),
        exact=1.0 if trr == 1 else max(trr - 0.55, 0) / 2,
        exact_ci=(0.944, 1.0) if trr == 1 else (0.0, 0.24),
        prior_trr=prior,
        advantage=(trr - prior) / (1 - prior),
        rouge={"1": trr, "2": max(trr - 0.1, 0), "L": trr},
        seconds=more.get("seconds", 41.5),
        extra=more.get("extra", {}),
    )
    return made.facts()


def tokens_of(*, exact: bool = False, redacted: bool = False) -> list[dict[str, Any]]:
    """Return a sample's tokens, some of them misread."""
    wrong = {} if exact else MISREAD
    guesses = [wrong.get(k, token) for k, token in enumerate(TEXT)]
    return [
        {
            "truth": None if redacted else truth,
            "guess": None if redacted else guess,
            "hit": truth == guess,
        }
        for truth, guess in zip(TEXT, guesses, strict=True)
    ]


def points(axis: list[Any], rates: list[float]) -> list[dict[str, Any]]:
    """Return the points of a recovery plot."""
    return [
        {
            "x": x,
            "trr": rate,
            "low": max(rate - 0.03, 0) if rate < 1 else 1.0,
            "high": min(rate + 0.03, 1),
            "prior": 0.043,
            "sequences": 64,
            "tokens": 2048,
        }
        for x, rate in zip(axis, rates, strict=True)
    ]


def frontier() -> list[dict[str, Any]]:
    """Return a frontier of four defenses at five strengths."""
    settings = {
        "clipped_gaussian": [
            (0.1, 0.96, 0.81),
            (0.3, 0.95, 0.80),
            (0.75, 0.8, 0.74),
            (1.5, 0.53, 0.55),
            (3.0, 0.25, 0.31),
        ],
        "metric_embedding": [
            (400, 0.98, 0.81),
            (200, 0.91, 0.79),
            (100, 0.72, 0.7),
            (50, 0.41, 0.48),
            (25, 0.2, 0.27),
        ],
        "quantised": [("int8", 1.0, 0.815), ("int4", 0.953, 0.80), ("int3", 0.6, 0.72)],
        "no_backward": [("top 2", 1.0, 0.78)],
    }
    return [
        {
            "defense": defense,
            "strength": strength,
            "utility": utility,
            "utility_interval": (utility - 0.035, utility + 0.035),
            "utility_name": "held-out accuracy",
            "recovery": recovery,
            "recovery_interval": (max(recovery - 0.03, 0), min(recovery + 0.03, 1)),
            "sequences": 64,
            "this_run": (defense, strength) == ("clipped_gaussian", 0.3),
        }
        for defense, each in settings.items()
        for strength, recovery, utility in each
    ]


def guarantee(**more: Any) -> dict[str, Any]:
    """Return a guarantee block without a guarantee, in the form of `privacy.guarantee`."""
    block = {
        "mechanisms": [
            {
                "mechanism": "clipped_gaussian",
                "channel": "activations",
                "neighbour_relation": "any two sequences of the same padded length",
                "clip": 24.0,
                "noise": 0.3,
                "sigma": 0.0125,
                "noise_multiplier": 0.00625,
                "releases": 3,
                "formal": True,
            }
        ],
        "unit": "one sequence",
        "releases": 3,
        "accountant": "dp-accounting 0.6.0: PLDAccountant, checked against RdpAccountant",
        "epsilon": None,
        "epsilon_rdp": None,
        "delta": 1e-5,
        "guarantee": "no formal guarantee",
        "why": "gradients leave without a mechanism",
        "reconstruction_bound": None,
        "assumptions": [
            "every release of a sequence is booked, with retries, evaluation and inference",
            "padded lengths, masks, timing and who takes part are not covered",
        ],
        "against": "the server",
        "lower_bound": None,
    }
    return {**block, **more}


FORMAL = {
    "epsilon": 8.001,
    "epsilon_rdp": 8.55,
    "guarantee": "(8.01, 1e-05)-differential privacy",
    "why": "",
    "lower_bound": {"epsilon": 7.14, "delta": 1e-5, "trials": 1000},
}


def audit() -> dict[str, Any]:
    """Return a whole audit of a run with some noise on its activations."""
    plain = {"score": "map", "candidates": 2048, "beam": 4}
    activations = [
        finding("A1", "activations", 0.951, 0.043, params=plain, extra={"examined": 0.0417}),
        finding("A2", "activations", 0.624, 0.043, params={"network": "GRU 256"}, seconds=9.3),
        finding("A5", "activations", 0.887, 0.043, params={"known_tokens": 256}, seconds=64.0),
    ]
    gradients = [
        finding("A4", "gradients", 1.0, 0.043, params={"top_blocks": 2, "iterations": 100}),
    ]
    adapter = [
        finding("A7", "adapter", 0.512, 0.5, params={"score": "EZ-MIA"}, extra={"auc": 0.514}),
    ]
    return {
        "format": 1,
        "run": {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "cut": "2:28",
            "codec": "raw",
            "defense": "clipped_gaussian, noise 0.3",
            "version": "0.2.0",
            "commit": "87c46d4",
            "date": "2026-11-23",
            "source": "transcript",
            "steps_recorded": 8,
        },
        "calibration": {
            "trr": 1.0,
            "exact": 1.0,
            "sequences": 16,
            "tokens": 512,
            "passed": True,
        },
        "controls": [
            {
                "name": "Gradients of shuffled labels give back the shuffled labels",
                "expected": "at least 98%",
                "found": 1.0,
                "passed": True,
                "tokens": 512,
            },
            {
                "name": "Noise in place of activations gives chance",
                "expected": "0.002% (0% to 0.7%)",
                "found": 0.0,
                "passed": True,
                "tokens": 512,
            },
            {
                "name": "A canary sentence that was put in is found",
                "expected": "found",
                "found": "found",
                "passed": True,
                "tokens": 24,
            },
        ],
        "channels": [
            {
                "channel": "activations",
                "verdict": "plaintext",
                "decided_by": "A1",
                "sentence": "From the activations alone, the server reads 95 of 100 tokens of the "
                "text, noise and all.",
                "findings": activations,
            },
            {
                "channel": "gradients",
                "verdict": "plaintext",
                "decided_by": "A4",
                "sentence": "From the gradients alone, the server reads every label; for a "
                "language model the labels are the text.",
                "findings": gradients,
            },
            {
                "channel": "adapter",
                "verdict": "near prior",
                "decided_by": "A7",
                "sentence": "From the trained adapter, a recipient tells members of the training "
                "data from others hardly better than by tossing a coin.",
                "findings": adapter,
            },
        ],
        "recovery": [
            {
                "axis": "cut depth",
                "points": points([1, 2, 4, 8, 12], [0.96, 0.951, 0.95, 0.94, 0.92]),
            },
            {
                "axis": "codec",
                "points": points(["raw", "bf16", "int8", "int4"], [1.0, 1.0, 1.0, 0.953]),
            },
            {
                "axis": "noise",
                "points": points([0, 0.1, 0.3, 0.75, 1.5, 3], [1.0, 0.97, 0.951, 0.8, 0.53, 0.25]),
                "note": "Noise is given relative to the size of the activations.",
            },
        ],
        "frontier": frontier(),
        "samples": [
            {"channel": "activations", "attack": "A1", "redacted": False, "tokens": tokens_of()},
            {
                "channel": "gradients",
                "attack": "A4",
                "redacted": False,
                "tokens": tokens_of(exact=True),
            },
            {
                "channel": "activations",
                "attack": "A1",
                "redacted": True,
                "tokens": tokens_of(redacted=True),
            },
        ],
        "guarantee": guarantee(),
        "utility": {
            "name": "held-out accuracy",
            "value": 0.80,
            "interval": (0.738, 0.853),
            "n": 200,
            "undefended": 0.815,
        },
        "not_measured": [
            "What lengths, padding, timing and the number of requests give away.",
            "Attacks that nobody has published yet. A verdict can only get worse.",
            "Decoders that use later tokens to correct earlier ones; they can only do better.",
            "A server that departs from the protocol, beyond the checks named above.",
        ],
    }
