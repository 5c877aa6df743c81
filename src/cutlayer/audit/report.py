"""The audit's report: one HTML file for a security officer, and three lines for a terminal.

Both are made from one dict, the content of `audit.json`. Rates are shares from 0 to 1, intervals
are pairs (low, high) of 95%. What is marked ? may be missing or null; the page then says so, or
leaves the part out.

    format        1
    run           {model, cut, codec, defense, version, date, source?, revision?, commit?, ...}
                  cut: "lower:upper"; source: "samples" before training, "transcript" after;
                  whatever else stands here is listed too
    calibration   {trr, exact, sequences, tokens?, passed}
    controls      [{name, expected, found, passed, tokens?}]; expected, found: a share, or words
    channels      [{channel, verdict, sentence, decided_by?, findings: [Finding.facts(), ...]}]
                  verdict: one of VERDICTS, or "not sent" or "not measured" without findings
    recovery?     [{axis, points: [{x, trr, low, high, prior, sequences?, tokens?}], note?}]
                  x: all numbers, or all names
    frontier?     [{defense, strength, utility, utility_name, recovery, utility_interval?,
                  recovery_interval?, sequences?, this_run?}]
    samples?      [{channel, attack, redacted, tokens: [{truth, guess, hit}]}]
                  truth, guess: text, or null where it is not to be shown
    guarantee     what `cutlayer.privacy.guarantee.guarantee` returns, or a list of such, each with
                  against?: text, and
                  lower_bound?: a number, or {epsilon, delta?, trials?}
    utility?      {name, value, interval?, n?, undefended?}
    not_measured  [text]

The page loads nothing: style and script are inline, and a content security policy that names
their digests keeps any other from running, even if text of a sample were to escape its place.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from cutlayer.audit import views, wording
from cutlayer.audit.finding import VERDICTS
from cutlayer.errors import DataError, StorageError

__all__ = ["verdict_lines", "write_report"]

_HERE = Path(__file__).parent
_REQUIRED = ("run", "calibration", "controls", "channels", "guarantee", "not_measured")
_FILTERS = (
    *("ceiled", "count", "interval", "measured", "number"),
    *("percent", "plain", "seconds", "spaced", "titled"),
)
_FIRST = ("activations", "gradients")


def write_report(audit: Mapping[str, Any], path: Path) -> None:
    """Write the report as one HTML file that only its owner can read.

    It is written aside and then renamed, so that what stands there is always whole.

    Args:
        audit: What `audit.json` holds; see the head of this file.
        path: Where it goes.

    Raises:
        DataError: If the audit is of another format, incomplete, failed its calibration, or
            states another verdict than that of its strongest attack.
        StorageError: If the disk says no.
    """
    _check(audit)
    try:
        page = _render(audit).encode("utf-8", "xmlcharrefreplace")
    except (KeyError, TypeError, UndefinedError) as error:
        raise DataError(f"the audit is incomplete ({error}): make the audit again") from error
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        if aside.is_file():
            aside.unlink()
        raise StorageError(
            f"the report could not be written to '{path}' ({error.strerror}): free space or name "
            "another folder; what was there before is untouched"
        ) from error


def verdict_lines(audit: Mapping[str, Any]) -> list[str]:
    """Return three lines for a terminal: activations, gradients, and what is promised.

    Raises:
        DataError: As `write_report` does.
    """
    _check(audit)
    channels = {channel["channel"]: channel for channel in audit["channels"]}
    others = [_verdict_line(channel) for name, channel in channels.items() if name not in _FIRST]
    promises = ", ".join(
        one["promise"] + (f" against {one['against']}" if one["against"] else "")
        for one in views.guarantees(audit)
    )
    return [
        *(_verdict_line(channels.get(name, {"channel": name})) for name in _FIRST),
        "; ".join([*others, f"guarantee    {promises}"]),
    ]


def _verdict_line(channel: Mapping[str, Any]) -> str:
    line = f"{channel['channel']:<12} {channel.get('verdict', 'not measured')}"
    found = views.deciding(channel)
    if found is None:
        return line
    measure, unit = wording.measure_words(found["attack"])
    if unit == "tokens":  # the interval is over sequences, whose tokens stand and fall together
        unit = f"tokens in {wording.count(found['sequences'])} sequences"
    return (
        f"{line}: {wording.percent(found['trr'])} {measure} (95% interval "
        f"{wording.interval(found['trr_ci'])}, n = {wording.count(found['tokens'])} {unit}, prior "
        f"{wording.percent(found['prior_trr'])}) by {wording.attack_words(found['attack'])[0]}"
    )


def _check(audit: Mapping[str, Any]) -> None:
    if audit.get("format") != 1:
        raise DataError(
            f"the audit's format is {audit.get('format')!r}, not 1: make the audit again with "
            "this version"
        )
    missing = [repr(key) for key in _REQUIRED if key not in audit]
    if missing:
        raise DataError(f"the audit lacks {', '.join(missing)}: make the audit again")
    calibration = audit["calibration"]
    if not calibration["passed"]:
        raise DataError(
            f"the audit's calibration recovered {wording.percent(calibration['trr'])} of "
            "undefended public text instead of all of it, so its figures mean nothing and are "
            "not reported: check that model, revision and cut are those of the run"
        )
    for channel in audit["channels"]:
        found = [finding["verdict"] for finding in channel["findings"]]
        strongest = min(found, key=VERDICTS.index, default=channel["verdict"])
        if strongest != channel["verdict"]:
            raise DataError(
                f"the audit states the verdict '{channel['verdict']}' for {channel['channel']}, "
                f"but its strongest attack found '{strongest}': make the audit again"
            )


def _render(audit: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(wording, name) for name in _FILTERS})
    style, script = (
        Markup((_HERE / f"report.{kind}").read_text("utf-8"))  # noqa: S704  our own files
        for kind in ("css", "js")
    )
    return environment.get_template("report.html.j2").render(
        **views.page_of(audit),
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
