"""An adversarial bottom is attacked anew once it is frozen; else no finished adapter is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run
from cutlayer.errors import ConfigError, StorageError

__all__ = ["REATTACK_FILE", "adversary_of", "reattack", "refuse_what_cannot_be_attacked"]

REATTACK_FILE = "reattack.json"
_TOKENS, _SEQUENCES, _FEWEST_TEXTS = 32, 32, 64


def adversary_of(model: Any) -> Any:
    """Return the adversarial bottom among a model's defenses, `None` if there is none."""
    from cutlayer.privacy.adversarial import AdversarialBottom

    defenses = model.remote_trunk.departures.defenses
    return next((each for each in defenses if isinstance(each, AdversarialBottom)), None)


def refuse_what_cannot_be_attacked(run: Run) -> None:
    """Refuse an adversarial run that could not be attacked at its end, or would train nothing.

    Raises:
        ConfigError: Naming all that is in the way.
    """
    from cutlayer.cli.audit import public_rows
    from cutlayer.cli.data import load_tokenizer
    from cutlayer.cli.privacy import parts_of

    if not any(params.get("name") == "adv_mi_bottom" for params in run.split.defenses):
        return
    faults = []
    if "bottom" not in parts_of(run):
        faults.append("split_train must have bottom, which is what learns")
    if run.split.task != "causal-lm":
        faults.append("split_task must be causal-lm, which is what the attacks read")
    if run.split.dp_sgd is not None:
        faults.append("split_dp_sgd must go: the inverter learns from rows without noise")
    if run.split.public_text is None:
        faults.append("split_public_text must name text to attack with that is not your data")
    elif (texts := len(public_rows(run.split.public_text, load_tokenizer(run), 32))) < 64:
        faults.append(f"split_public_text has {texts} texts and {_FEWEST_TEXTS} are needed")
    if faults:
        raise ConfigError("with adv_mi_bottom " + "; ".join(faults))


def reattack(run: Run, trainer: Any, model: Any) -> dict[str, Any]:
    """Attack the frozen bottom with noise and all, write `reattack.json`, and return it.

    The attacker has the adapter (worst case): A1 searches with it and A2 learns anew from public
    text run through it. A5 has only the public weights and half of the texts. The same is done to
    the bottom as it was before the run.

    Raises:
        StorageError: If it cannot be written.
    """
    from cutlayer.audit.battery import channel_of
    from cutlayer.privacy.adversarial import AdversarialBottom
    from cutlayer.split.adapters import ends_config

    file = Path(run.sft.output_dir) / REATTACK_FILE
    _write(file, None)
    defense = adversary_of(model)
    assert isinstance(defense, AdversarialBottom)
    rows = _rows_of(trainer)
    known, unknown = _public(run), _public(run)
    known.take_adapter(ends_config(model.plan), model.own_adapter())
    attacked = [
        *_attack(run, trainer, defense, known, known, rows, ("A1", "A2")),
        *_attack(run, trainer, defense, unknown, known, rows, ("A5",)),
    ]
    after = channel_of("activations", attacked)
    before = channel_of(
        "activations", _attack(run, trainer, defense, unknown, unknown, rows, ("A1", "A2", "A5"))
    )
    facts = {
        "format": 1,
        "guarantee": "no formal guarantee",
        "defense": defense.describe(),
        "inverter_in_training_nats": defense.loss,
        "after": after,
        "before": before,
    }
    _write(file, facts)
    return facts


def _write(file: Path, facts: dict[str, Any] | None) -> None:
    """Write a run's findings; `None` takes those of an earlier run away."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        if facts is not None:
            file.write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write '{file}' ({error.strerror})") from error


def _public(run: Run) -> Any:
    from cutlayer.audit.public import PublicModel

    revision = run.model.model_revision
    return PublicModel.load(
        run.model.model_name_or_path,
        bottom_layers=run.split.bottom_layers,
        top_layers=run.split.top_layers,
        revision=None if revision == "main" else revision,
    )


def _rows_of(trainer: Any) -> list[tuple[Any, Any]]:
    import torch

    found = trainer.train_dataset[:_SEQUENCES]["input_ids"]
    return [(torch.tensor(ids[:_TOKENS]),) * 2 for ids in found]  # type: ignore[misc]


def _attack(
    run: Run,
    trainer: Any,
    defense: Any,
    attackers: Any,
    victims: Any,
    rows: list[tuple[Any, Any]],
    names: tuple[str, ...],
) -> list[Any]:
    """Run attacks by one who has `attackers`' weights on what `victims`' weights send."""
    from cutlayer.audit.battery import Evidence, run_attacks
    from cutlayer.audit.traffic import made_here
    from cutlayer.cli.audit import public_rows

    departures = made_here(victims, rows, defenses=[defense], gradients=False)
    received = float(departures[0].smashed_BTD.square().mean().sqrt())
    evidence = Evidence.of(
        attackers,
        departures,
        tokens=_TOKENS,
        public_rows=public_rows(run.split.public_text, trainer.processing_class, _TOKENS),
        defend=defense.apply,
        # The noise is part of what was received: rms^2 = signal^2 (1 + nsr^2).
        sigma=received * defense.nsr / (1 + defense.nsr**2) ** 0.5,
    )
    return run_attacks(evidence, list(names))
