"""From `split_privacy_profile` and its like to defenses, a ledger and a transcript."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.cli.config import Run, fit, say
from cutlayer.errors import ConfigError

__all__ = ["cost_of", "defenses_of", "ledger_of", "parts_of", "transcript_of"]

_OF_A_LEDGER = ("budget", "budget_raised_by", "ledger")


def defenses_of(run: Run) -> list[Any]:
    """Return the defenses of a run: those of its profile, or those that it names itself.

    Raises:
        ConfigError: If a name or a parameter makes no sense, or a part is trained that the profile
            does not allow, or there is no policy for the evidence that it asks for.
    """
    from cutlayer.privacy.defenses import DEFENSES, check_together, settable_defense_of
    from cutlayer.privacy.profiles import profile_of

    split = run.split
    profile = profile_of(split.privacy_profile, split.privacy)
    if profile.attestation and not split.attestation_policy:
        raise ConfigError(
            f"split_privacy_profile '{profile.name}' needs split_attestation_policy, a JSON file "
            "that says what the server must prove: docs/privacy.md shows one"
        )
    parts_of(run)
    left = set(split.privacy)
    made = []
    for named in split.defenses or profile.defenses.values():
        params = dict(named)
        name = str(params.pop("name", ""))
        if name == "adv_mi_bottom":
            params.setdefault("vocabulary", _vocabulary_of(run))
        takes = inspect.signature(DEFENSES[name]).parameters if name in DEFENSES else {}
        # The user's word goes before the profile's own numbers.
        kept = params if split.defenses else {}
        own = {k: v for k, v in split.privacy.items() if k in takes and k not in kept}
        made.append(settable_defense_of(name, **_typed(name, params | own)))
        left -= own.keys()
    check_together(made)
    if left:
        raise ConfigError(
            f"split_privacy has {', '.join(sorted(left))}, which no defense of this run takes: "
            "leave it out, or choose another profile"
        )
    if split.transcript < 0:
        raise ConfigError(f"split_transcript = {split.transcript} must be 0 or more sequences")
    return made


def _typed(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a defense's parameters as it takes them; YAML takes `1e-6` for text.

    Raises:
        ConfigError: Naming those that are of another type.
    """
    from cutlayer.privacy.defenses import DEFENSES

    kind = DEFENSES.get(name)
    hints = typing.get_type_hints(kind) if isinstance(kind, type) else {}
    fitting, faults = dict(params), []
    for key in params.keys() & hints.keys():
        try:
            fitting[key] = fit(params[key], hints[key])
        except (TypeError, ValueError):
            faults.append(f"{key} = {params[key]!r} is no {say(hints[key])}")
    if faults:
        raise ConfigError(f"'{name}': " + "; ".join(sorted(faults)))
    return fitting


def _vocabulary_of(run: Run) -> int:
    from cutlayer.split.loading import open_checkpoint

    revision = None if run.model.model_revision == "main" else run.model.model_revision
    config = open_checkpoint(run.model.model_name_or_path, revision=revision).config
    return int(config.get_text_config().vocab_size)


def parts_of(run: Run) -> list[str]:
    """Return the parts that get a LoRA: the run's own choice within what its profile allows.

    Raises:
        ConfigError: If the profile does not allow them.
    """
    from cutlayer.privacy.profiles import profile_of
    from cutlayer.split.adapters import PARTS

    allowed = profile_of(run.split.privacy_profile).train
    if run.split.dp_sgd is not None:
        # The server would train the trunk's half without noise.
        allowed = tuple(part for part in allowed if part != "trunk")
        if "trunk" in (run.split.train or ()):
            raise ConfigError(
                "split_dp_sgd covers what the client trains and split_train asks for trunk, which "
                "the server trains without noise: leave trunk out"
            )
    if run.split.train is None:
        return list(allowed)
    unknown = [part for part in run.split.train if part not in PARTS]
    if unknown:
        raise ConfigError(
            f"split_train asks for '{unknown[0]}', which is no part: give a list, such as "
            f"[{', '.join(PARTS)}]"
        )
    beyond = [part for part in run.split.train if part not in allowed]
    if beyond:
        raise ConfigError(
            f"split_privacy_profile '{run.split.privacy_profile}' trains {', '.join(allowed)} only "
            f"and split_train asks for {', '.join(beyond)}: leave split_train out"
        )
    return run.split.train


def ledger_of(run: Run, defenses: list[Any], records: int) -> Any:
    """Return the ledger of a run's data set, `None` if nothing formal is released.

    It stands beside a local data set and not in the run's folder: another run on the same data
    spends the same budget.

    Raises:
        ConfigError: If a budget is asked for that nothing would keep, or that would not be of each
            sample.
        DataError: If the ledger was altered.
        StorageError: If it cannot be written, or another process has it.
    """
    from cutlayer.privacy.ledger import Ledger

    formal = [defense for defense in defenses if defense.formal and hasattr(defense, "epsilon")]
    asked = [name for name in _OF_A_LEDGER if getattr(run.split, name) is not None]
    if not formal and asked:
        raise ConfigError(
            f"split_{asked[0]} is of a ledger, and nothing in this run has an epsilon to be booked "
            "there: leave it out, or use split_privacy_profile formal"
        )
    if not formal:
        return None
    _refuse_what_has_no_epsilon(run, formal[0].name, defenses)
    # Without a slash at its end: a folder has one ledger, however it is written.
    name = str(Path(str(run.data.dataset_name)))
    home = Path(f"{name}.ledger.jsonl")
    path = home if Path(name).exists() else Path(run.sft.output_dir) / "ledger.jsonl"
    budget = run.split.budget
    return Ledger(
        Path(run.split.ledger or path),
        epsilon=formal[0].epsilon if budget is None else budget,
        delta=formal[0].delta,
        records=records,
        raised_by=run.split.budget_raised_by or "",
    )


def _refuse_what_has_no_epsilon(run: Run, formal: str, defenses: list[Any]) -> None:
    """Refuse what would take the number away, before anything is spent on it."""
    informal = [
        d.name for d in defenses if not d.formal and d.site != "embedding" and d.releases(1)
    ]
    if informal:
        raise ConfigError(
            f"'{formal}' has an epsilon and '{informal[0]}' has none, so nothing would be promised "
            "of the two: leave one of them out of split_defenses"
        )
    mixing = [name for name in ("packing", "padding_free") if getattr(run.sft, name)]
    if mixing:
        raise ConfigError(
            f"{mixing[0]} puts several samples into one sequence, and '{formal}' promises its "
            f"epsilon to a sequence: set {mixing[0]} to false"
        )


def cost_of(defenses: list[Any], tokens: int, width: int) -> list[str]:
    """Return what to read before noise on whole sequences is used: how large it is.

    Args:
        defenses: Those of the run.
        tokens: The longest sequence's.
        width: The model's.
    """
    from cutlayer.privacy.accountant import noise_table
    from cutlayer.privacy.mechanisms import LdpSequence, NoisyGrad

    lines = []
    for defense in defenses:
        if not isinstance(defense, LdpSequence | NoisyGrad):
            continue
        pool = getattr(defense, "pool", None)
        shape = (1, pool) if pool else (max(tokens, 1), width)
        rows = noise_table(
            sorted({1.0, 8.0, 64.0, defense.epsilon}),
            delta=defense.delta,
            releases=defense.planned,
            shapes=[shape],
        )
        lines.append(
            f"{defense.name}: what {defense.planned} releases of {shape[0]} x {shape[1]} numbers a "
            f"sequence cost at delta {defense.delta:g}"
        )
        lines += [
            f"  epsilon {row.epsilon:<6g} noise of {row.noise_over_signal:.3g} times the signal"
            + (" (this run)" if row.epsilon == defense.epsilon else "")
            for row in rows
        ]
    return lines


def transcript_of(
    run: Run,
    given: dict[str, Any],
    checkpoint: Any,
    num_layers: int,
    ledger: Any,
    *,
    resume: bool = False,
) -> Any:
    """Return the writer of a run's transcript, `None` if none is wanted."""
    from cutlayer.privacy.transcript import TranscriptWriter
    from cutlayer.wire.codecs import codec_words, codecs_of

    if not run.split.transcript:
        return None
    facts = {
        "model": given["model"],
        "revision": checkpoint.revision,
        "task": given["task"],
        "num_layers": num_layers,
        "lower": given["bottom_layers"],
        "upper": num_layers - given["top_layers"],
        "codec": codec_words(codecs_of(given["codec"])),
        "dtype": given["dtype"],
        "profile": run.split.privacy_profile,
        "train": parts_of(run),
        "defenses": [_parameters(defense) for defense in given["defenses"]],
    }
    if ledger is not None:
        facts["ledger"] = str(ledger.path.resolve())
    folder = Path(run.sft.output_dir) / "transcript"
    return TranscriptWriter(folder, facts, sequences=run.split.transcript, anew=not resume)


def _parameters(defense: Any) -> dict[str, Any]:
    """Return what makes the same defense again."""
    from cutlayer.privacy.defenses import DEFENSES

    facts = defense.describe()
    takes = inspect.signature(DEFENSES[defense.name]).parameters
    return {"name": defense.name, **{k: v for k, v in facts.items() if k in takes}}
