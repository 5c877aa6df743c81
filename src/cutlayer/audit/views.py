"""What the report's page shows, part by part, made from an audit's dict.

The template only lays out what stands here. Text that is to stay hidden does not get past here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from cutlayer.audit import plots, wording
from cutlayer.audit.finding import VERDICTS
from cutlayer.audit.plots import Axis, Point, Series

__all__ = ["NO_GUARANTEE", "deciding", "guarantees", "page_of"]

NO_GUARANTEE = "no formal guarantee"

_HEADLINES = {
    "plaintext": "The server can read this data.",
    "severe": "The server can read most of this data.",
    "partial": "The server can read part of this data.",
    "near prior": "The attacks that were run learned little more than a blind guess.",
    "": "No channel was measured.",
}


def page_of(audit: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the template names.

    Raises:
        KeyError: If the audit lacks something that is not optional.
    """
    samples = [_sample(sample) for sample in audit.get("samples") or []]
    utility = audit.get("utility")
    return {
        "run": _filled(audit["run"], "source"),
        "format": audit["format"],
        "calibration": _calibration(audit["calibration"]),
        "controls": [_filled(control, "tokens") for control in audit["controls"]],
        "controls_failed": [c["name"] for c in audit["controls"] if not c["passed"]],
        "headline": _HEADLINES[_worst(c for c in audit["channels"] if c["channel"] != "adapter")],
        "worst": _worst(audit["channels"]),
        "worst_at_server": _worst(c for c in audit["channels"] if c["channel"] != "adapter"),
        "channels": [_channel(channel, k) for k, channel in enumerate(audit["channels"])],
        "findings": [_row(one) for channel in audit["channels"] for one in channel["findings"]],
        "samples": samples,
        "holds_text": any(not sample["redacted"] for sample in samples),
        "recovery": [_recovery(one, k) for k, one in enumerate(audit.get("recovery") or [])],
        "frontier": _frontier(audit.get("frontier") or []),
        "guarantees": guarantees(audit),
        "utility": _filled(utility, "interval", "n", "undefended") if utility else None,
        "not_measured": audit["not_measured"],
        "verdicts": VERDICTS,
    }


def deciding(channel: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the finding that a channel's verdict rests on, if there is one."""
    findings: Sequence[Mapping[str, Any]] = channel.get("findings", ())
    named = [finding for finding in findings if finding["attack"] == channel.get("decided_by")]
    return min(
        named or findings,
        key=lambda f: (VERDICTS.index(f["verdict"]), -f["advantage"], -f["trr"]),
        default=None,
    )


def guarantees(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each guarantee with its promise in words: a number only if the mechanism has one."""
    found = audit["guarantee"]
    return [_guarantee(one) for one in (found if isinstance(found, list) else [found])]


def _guarantee(guarantee: Mapping[str, Any]) -> dict[str, Any]:
    one = _filled(guarantee, "lower_bound", "against", "epsilon_rdp", "reconstruction_bound", "why")
    epsilon, bound = one["epsilon"], one["lower_bound"]
    if bound is not None:
        stated = bound if isinstance(bound, Mapping) else {"epsilon": bound}
        bound = _filled(stated, "delta", "trials")
    # Words never promise what has no number behind it.
    formal = isinstance(epsilon, int | float) and one["guarantee"] != NO_GUARANTEE
    refuted = formal and bound is not None and bound["epsilon"] > epsilon
    promise = one["guarantee"] if formal else NO_GUARANTEE
    return {**one, "promise": promise, "formal": formal, "refuted": refuted, "bound": bound}


def _filled(part: Mapping[str, Any], *optional: str) -> dict[str, Any]:
    return {**dict.fromkeys(optional), **part}


def _calibration(stated: Mapping[str, Any]) -> dict[str, Any]:
    needed = {key: stated[key] for key in ("trr", "exact", "sequences")}
    return {**needed, "tokens": stated.get("tokens")}


def _worst(channels: Iterable[Mapping[str, Any]]) -> str:
    found = [channel["verdict"] for channel in channels if channel["verdict"] in VERDICTS]
    return min(found, key=VERDICTS.index, default="")


def _shared_n(points: Sequence[Mapping[str, Any]], *units: str) -> str:
    """Return n in words if it is the same for all points, to be said once; else nothing."""
    first = [points[0][unit] for unit in units]
    if any([point[unit] for unit in units] != first for point in points):
        return ""
    words = [f"{wording.count(n)} {unit}" for n, unit in zip(first, units, strict=True) if n]
    return f"n = {' in '.join(words)} for each" if words else "n is not stated"


def _channel(channel: Mapping[str, Any], number: int) -> dict[str, Any]:
    heading, about = wording.channel_words(channel["channel"])
    found = deciding(channel)
    seen = {**channel, "heading": heading, "about": about, "found": found}
    if found is None:
        return seen
    attack, does = wording.attack_words(found["attack"])
    measure, unit = wording.measure_words(found["attack"])
    description = (
        f"{wording.percent(found['trr'])}, 95% interval {wording.interval(found['trr_ci'])}; "
        f"without the traffic {wording.percent(found['prior_trr'])}."
    )
    drawn = plots.strip(
        f"strip-{number}",
        title=f"{heading}: share {measure}",
        description=description,
        rate=found["trr"],
        interval=found["trr_ci"],
        prior=found["prior_trr"],
    )
    return {
        **seen,
        "attack": attack,
        "does": does,
        "measure": measure,
        "unit": unit,
        "strip": drawn,
    }


def _row(finding: Mapping[str, Any]) -> dict[str, Any]:
    """Return a finding for the table of attacks; of `extra` only numbers, which hold no text."""
    more = {
        key: value
        for key, value in finding.get("extra", {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {
        **finding,
        "name": wording.attack_words(finding["attack"])[0],
        "heading": wording.channel_words(finding["channel"])[0],
        "rouge_l": finding["rouge"].get("L"),
        "more": more,
        "each": finding["seconds"] / max(finding["sequences"], 1),
        "unit": wording.measure_words(finding["attack"])[1],
        "rank": VERDICTS.index(finding["verdict"]),
    }


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample in runs of tokens that were read back or not."""
    tokens = sample["tokens"]
    hits = [bool(token["hit"]) for token in tokens]
    seen = {
        "heading": wording.channel_words(sample["channel"])[0],
        "attack": wording.attack_words(sample["attack"])[0],
        "redacted": bool(sample["redacted"]),
        "hits": sum(hits),
        "total": len(hits),
        "rate": sum(hits) / max(len(hits), 1),
    }
    if sample["redacted"]:
        return {**seen, "runs": list(_runs(hits, hits))}
    truth, guess = ([_shown(token, side) for token in tokens] for side in ("truth", "guess"))
    return {**seen, "truth": list(_runs(hits, truth)), "guess": list(_runs(hits, guess))}


def _shown(token: Mapping[str, Any], side: str) -> str | None:
    """Return a token's text; None where the truth is hidden, for the guess may give it away."""
    if token["truth"] is None:
        return None
    return wording.visible(token[side] or "")


def _runs(hits: Sequence[bool], tokens: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for hit, run in groupby(zip(hits, tokens, strict=True), key=lambda pair: pair[0]):
        yield {"hit": hit, "tokens": [token for _, token in run]}


def _recovery(one: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a plot of recovery over one setting: a line over numbers, a row for each name."""
    points = [_filled(point, "sequences", "tokens") for point in one["points"]]
    named = any(isinstance(point["x"], str) for point in points)
    least, *_, most = sorted([*points, *points], key=lambda point: point["trr"])
    description = (
        f"Between {wording.percent(least['trr'])} at {wording.plain(least['x'])} and "
        f"{wording.percent(most['trr'])} at {wording.plain(most['x'])}. The table has every number."
    )
    share, xs = Axis.percent("tokens read back"), [point["x"] for point in points]
    found, prior = [], []
    for place, point in zip(reversed(range(len(points))), points, strict=True):
        ends = (point["low"], point["high"])
        if named:
            found.append(Point(point["trr"], place, x_interval=ends))
            prior.append(Point(point["prior"], place))
        else:
            found.append(Point(point["x"], point["trr"], y_interval=ends))
            prior.append(Point(point["x"], point["prior"]))
    drawn = plots.plot(
        f"recovery-{number}",
        title=f"Tokens read back against {one['axis']}",
        description=description,
        x=share if named else Axis.over(one["axis"], xs),
        y=Axis.of_names(one["axis"], xs) if named else share,
        series=[
            Series("read back, with 95% interval", tuple(found), joined=not named),
            Series("best guess without the traffic", tuple(prior), joined=not named, baseline=True),
        ],
        height=30.0 * len(points) if named else 190,
    )
    shared = _shared_n(points, "tokens", "sequences")
    return {
        **_filled(one, "note"),
        "points": points,
        "plot": drawn,
        "named": named,
        "n": shared,
    }


def _frontier(given: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    optional = ("utility_interval", "recovery_interval", "sequences", "this_run")
    points = [_filled(point, *optional) for point in given]
    if not points:
        return None
    name = points[0]["utility_name"]
    values = [point["utility"] for point in points]
    values += [end for point in points for end in point["utility_interval"] or ()]
    shares = all(0 <= value <= 1 for value in values)
    by_defense: dict[str, list[Point]] = {}
    for point in points:
        mark = Point(
            point["recovery"],
            point["utility"],
            point["recovery_interval"],
            point["utility_interval"],
            ringed=bool(point["this_run"]),
        )
        by_defense.setdefault(wording.spaced(point["defense"]), []).append(mark)
    drawn = plots.plot(
        "frontier",
        title=f"{name[:1].upper()}{name[1:]} against tokens read back",
        description=f"{len(points)} settings of {len(by_defense)} defenses. Further left, the "
        "server reads less. The table has every number.",
        x=Axis.percent("tokens read back by the strongest attack"),
        y=Axis.over(name, values, shares=shares),
        series=[Series(defense, tuple(marks)) for defense, marks in by_defense.items()],
        height=230,
    )
    ringed = any(point["this_run"] for point in points)
    shown = {"points": points, "name": name, "shares": shares, "plot": drawn, "ringed": ringed}
    return {**shown, "n": _shared_n(points, "sequences")}
