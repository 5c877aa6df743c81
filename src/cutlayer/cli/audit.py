"""`cutlayer audit`: what the server can read, measured on one's own data; nothing is sent."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cutlayer.cli.main import add_format, report, settle
from cutlayer.cli.subject import Subject, rows_asked, subject_of_config, subject_of_run
from cutlayer.errors import ConfigError, DataError, StorageError

_NOT_MEASURED = (
    "lengths, timing, padding and who takes part: the server sees them whatever the defense",
    "attacks that will be found later, and attackers who know more than the public weights",
    "a joint reading of all positions, which may do better than one position after the other",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    add = parser.add_argument
    add("--config", help="the run's YAML, before training; --key value overrides")
    add("--run", help="a run's output_dir, trained with split_transcript above 0")
    add("--output", default="audit", help="folder of audit.json and audit.html (default: audit)")
    add("--samples", type=int, default=64, help="sequences to attack (default: 64)")
    add("--rows", help="which samples, such as 3,7,10-12, counted from 0 (default: the first)")
    add("--tokens", type=int, default=32, help="tokens of each that A1 reads (default: 32)")
    add("--attacks", default="A1,A4", help="of A1, A2, A4, A5 (default: A1,A4)")
    add("--public_text", help="JSON lines with 'text', or plain lines: not your data; for A2")
    add("--prior", choices=("model", "none"), default="none", help="guess with the whole model too")
    add("--show", type=int, default=2, help="sequences to show in the report (default: 2)")
    add(
        "--redact",
        action="store_true",
        help="show which tokens were read, not what they are, nor which samples",
    )
    add("--frontiers", action="store_true", help="repeat A1 by depth, codec and noise: slow")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Attack and report."""
    if bool(args.config) == bool(args.run):
        raise ConfigError("name one of --config (before training) and --run (after it)")
    if args.run and args.overrides:
        raise ConfigError(
            f"--{next(iter(args.overrides))} is no flag of an audit of --run, whose settings are "
            "those that it had: leave it out, or see 'cutlayer audit --help'"
        )
    if args.samples < 1 or args.tokens < 2 or args.show < 0:
        raise ConfigError("--samples must be at least 1, --tokens at least 2 and --show at least 0")
    settle(args.threads)
    from cutlayer.audit.battery import check_attacks
    from cutlayer.audit.report import verdict_lines, write_report

    check_attacks(_attacks(args))
    rows_asked(args.rows)
    audit = _audit(args, subject_of_config(args, _tell) if args.config else subject_of_run(args))
    folder = Path(args.output)
    write_report(audit, folder / "audit.html")
    kept = {name: value for name, value in audit.items() if name != "samples"}
    try:
        (folder / "audit.json").write_text(json.dumps(kept, indent=2) + "\n")
    except OSError as error:
        raise StorageError(
            f"'{folder / 'audit.json'}' could not be written ({error.strerror}): free space or "
            "name another --output"
        ) from error
    shutil.rmtree(folder / "unfinished", ignore_errors=True)
    failed = [control["name"] for control in audit["controls"] if not control["passed"]]
    lines = [*verdict_lines(audit), *(f"A CONTROL FAILED: {name}" for name in failed)]
    lines.append(f"the report is {folder / 'audit.html'}")
    report(args.format, kept, "\n".join(lines))
    return 0


def _attacks(args: argparse.Namespace) -> list[str]:
    return [name.strip() for name in args.attacks.split(",")]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _audit(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    from cutlayer.audit.battery import (
        FEWEST_TEXTS,
        Evidence,
        calibrate,
        channel_of,
        controls,
        run_attacks,
    )
    from cutlayer.audit.promise import promise_of
    from cutlayer.audit.unfinished import Unfinished, digest_of

    defenses, facts = subject.defenses, subject.facts
    noise = next((d for d in defenses if d.site == "lower cut"), None)
    evidence = Evidence.of(
        subject.public,
        subject.departures,
        tokens=args.tokens,
        public_rows=public_rows(args.public_text, subject.tokenizer, args.tokens),
        prior=_prior_of(facts["model"], facts["revision"]) if args.prior == "model" else None,
        defend=noise.apply if noise is not None else None,
        sigma=_sigma_of(noise, subject.departures),
    )
    asked = {"version": version("cutlayer"), "tokens": args.tokens, "prior": args.prior}
    public_ids = [ids_T for ids_T, _labels in evidence.public_rows]
    digest = digest_of({"subject": subject.digest, **asked}, public_ids)
    unfinished = Unfinished(Path(args.output) / "unfinished", digest, _tell)
    if "A2" in _attacks(args) and len(evidence.public_rows) < FEWEST_TEXTS:
        raise ConfigError(
            f"A2 learns from {FEWEST_TEXTS} public texts at least and there are "
            f"{len(evidence.public_rows)}: name more with --public_text, or leave A2 out"
        )
    _tell("calibrating on public text")
    calibration = unfinished.kept("calibration", lambda: calibrate(evidence))
    found_controls = unfinished.kept("controls", lambda: controls(evidence))
    findings = run_attacks(evidence, _attacks(args), _tell, unfinished.kept)
    recovery = (
        unfinished.kept("recovery", lambda: _recoveries(evidence, facts)) if args.frontiers else []
    )
    sends_gradients = any(d.gradient_BTD is not None for d in subject.departures)
    gradients = channel_of("gradients", findings)
    if not sends_gradients:
        gradients |= {"verdict": "not sent", "sentence": "No gradient leaves the client."}
    promise = promise_of(
        defenses,
        subject.releases,
        delta=subject.delta,
        sent=["activations", *(["gradients"] if sends_gradients else [])],
        trained=subject.trained,
        assumptions=subject.assumptions,
    )
    lengths = [len(text.ids_T) for text in evidence.texts]
    which = [{**one, "tokens": n} for one, n in zip(subject.which, lengths, strict=True)]
    return {
        "format": 1,
        "run": {
            **facts,
            "version": version("cutlayer"),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sequences": len(evidence.texts),
        },
        "audited": "redacted" if args.redact else which,
        "calibration": calibration,
        "controls": found_controls,
        "channels": [channel_of("activations", findings), gradients],
        "recovery": recovery,
        "samples": _samples(findings, subject.tokenizer, show=args.show, redact=args.redact),
        "guarantee": promise,
        "not_measured": [*_NOT_MEASURED],
    }


def _prior_of(model: str, revision: str) -> Any:
    """Return the public model's own guess at the next token; it loads the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(
        model, revision=revision or None, dtype=torch.float32
    ).eval()
    start = whole.config.bos_token_id or 0

    @torch.no_grad()
    def prior(before_T: Any) -> Any:
        ids_T = torch.cat([torch.tensor([start]), before_T]) if len(before_T) == 0 else before_T
        return whole(input_ids=ids_T[None]).logits[0, -1].log_softmax(-1)

    return prior


def _sigma_of(defense: Any, departures: Sequence[Any]) -> float:
    """Return the standard deviation of the noise, which an attacker is told."""
    if defense is None:
        return 0.0
    params = defense.describe()
    if "clip" in params:
        return float(params["sigma"] * params["clip"])
    strength = float(params.get("nsr", 0.0))
    # The noise is part of what was received: rms^2 = signal^2 (1 + nsr^2).
    received = float(departures[0].smashed_BTD.square().mean().sqrt())
    return received * strength / (1 + strength**2) ** 0.5


def public_rows(path: str | None, tokenizer: Any, tokens: int) -> list[tuple[Any, Any]]:
    """Return public texts as (ids, ids)."""
    import torch

    file = Path(path) if path else Path(__file__).parents[1] / "audit" / "public_text.txt"
    try:
        lines = file.read_text().splitlines()
        if file.suffix == ".jsonl":
            lines = [str(json.loads(line)["text"]) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--public_text '{file}' cannot be read ({error}): give JSON lines with 'text', or a "
            "text file"
        ) from error
    texts = [line for line in lines if line.strip()][:4096]
    ids = [tokenizer(text)["input_ids"][:tokens] for text in texts]
    return [(torch.tensor(i), torch.tensor(i)) for i in ids if len(i) > 1]


def _samples(
    findings: Sequence[Any], tokenizer: Any, *, show: int, redact: bool
) -> list[dict[str, Any]]:
    """Return the first sequences of each channel's strongest attack, token by token."""
    from cutlayer.audit.finding import worst

    shown = []
    for channel in ("activations", "gradients"):
        decides = worst([finding for finding in findings if finding.channel == channel])
        if decides is None:
            continue
        for recovered in decides.recovered[:show]:
            shown.append(
                {
                    "channel": channel,
                    "attack": decides.attack,
                    "redacted": redact,
                    "tokens": [
                        {
                            "truth": None if redact else tokenizer.decode([truth]),
                            "guess": None if redact else tokenizer.decode([max(guess, 0)]),
                            "hit": truth == guess,
                        }
                        for truth, guess in zip(recovered.truth, recovered.guess, strict=True)
                    ],
                }
            )
    return shown


def _recoveries(evidence: Any, facts: dict[str, Any]) -> list[dict[str, Any]]:
    from cutlayer.audit.frontiers import by_codec, by_depth, by_noise

    rows = [(text.ids_T, text.ids_T) for text in evidence.texts[:8]]
    lower = evidence.public.cut.lower
    layers = evidence.public.config.get_text_config().num_hidden_layers
    depths = {depth for depth in (lower, 2 * lower, 4 * lower) if 0 < depth < layers}
    _tell("A1 again by cut depth, codec and noise")
    return [
        by_depth(facts["model"], rows, sorted(depths), revision=facts["revision"] or None),
        by_codec(evidence.public, evidence.table, rows),
        by_noise(evidence.public, evidence.table, rows, evidence.prior),
    ]
