"""`cutlayer audit`, before a run and on what a run really sent."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cutlayer.audit.unfinished import Unfinished
from cutlayer.cli.config import read_run
from cutlayer.cli.main import main
from cutlayer.cli.privacy import defenses_of, ledger_of
from tests.cli.test_by_hand import one_sentence, saved_tiny, write_rows, write_run
from tests.site import Site
from tests.tokens import dataset


@pytest.fixture
def prepared(llama: Site, folder_of: Any, tmp_path: Path) -> Any:
    """A run's YAML over a served model, its samples, and public text beside it."""
    model = saved_tiny(folder_of, tmp_path, "llama")
    write_rows(tmp_path, [{"text": text} for text in dataset(12)["text"]])
    write_rows(tmp_path, [{"text": text} for text in dataset(24, seed=9)["text"]], "public.jsonl")

    def config(**settings: Any) -> str:
        asked = {
            "split_ca": str(llama.certs / "ca.pem"),
            "split_cert": None,
            "split_key": None,
            "split_bottom_layers": 2,
            **settings,
        }
        return str(write_run(tmp_path, model, llama.server.port, **asked))

    return config


SHORT = ("--attacks", "A1", "--samples", "4", "--tokens", "6")


def audited(folder: Path, *words: str) -> dict[str, Any]:
    """Run the command, and return what it wrote."""
    asked = ["audit", "--output", str(folder / "audit"), "--samples", "8", "--tokens", "12"]
    assert main([*asked, "--public_text", str(folder / "public.jsonl"), *words]) == 0
    found: dict[str, Any] = json.loads((folder / "audit" / "audit.json").read_text())
    return found


def test_before_a_run_the_text_is_plaintext(prepared: Any, tmp_path: Path, capsys: Any):
    """Without a defense both channels are plaintext, the checks pass, and the report says so."""
    audit = audited(tmp_path, "--config", prepared(), "--attacks", "A1,A4,A5")

    verdicts = {channel["channel"]: channel["verdict"] for channel in audit["channels"]}
    assert verdicts == {"activations": "plaintext", "gradients": "plaintext"}
    assert audit["calibration"]["trr"] == 1.0
    assert all(control["passed"] for control in audit["controls"])
    assert audit["guarantee"]["guarantee"] == "no formal guarantee"
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "plaintext" in page
    assert "no formal guarantee" in page
    assert "samples" not in audit
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "plaintext" in line]) == 2


def test_what_a_run_sent_is_audited(prepared: Any, tmp_path: Path):
    """The transcript of a run, codec and trained adapter included, is attacked."""
    config = prepared(split_transcript=6, split_codec="bf16", max_steps=2, learning_rate=1e-4)
    assert main(["train", "--config", config]) == 0

    audit = audited(tmp_path, "--run", str(tmp_path / "out"), "--rows", "3,0-1")

    assert [(one["row"], one["step"]) for one in audit["audited"]] == [(0, 0), (1, 0), (3, 1)]
    assert audit["run"]["source"] == "transcript"
    assert audit["run"]["codec"] == "bf16"
    assert audit["run"]["sequences"] == 3
    found = {channel["channel"]: channel["findings"][0]["trr"] for channel in audit["channels"]}
    assert found["activations"] > 0.9
    assert found["gradients"] > 0.9


def test_forward_only_sends_no_gradient(prepared: Any, tmp_path: Path):
    """In the profile `forward_only` a run trains its top, and no gradient leaves."""
    config = prepared(split_transcript=4, split_privacy_profile="forward_only", max_steps=2)
    assert main(["train", "--config", config]) == 0

    assert not list((tmp_path / "out" / "transcript").glob("*-gradient.safetensors"))
    audit = audited(tmp_path, "--run", str(tmp_path / "out"))
    assert audit["channels"][1]["verdict"] == "not sent"


@pytest.mark.parametrize("damage", ["a tensor", "a line", "the end"])
def test_an_altered_transcript_is_refused(prepared: Any, tmp_path: Path, damage: str, capsys: Any):
    """One changed bit, one changed line or a missing end, and the audit says so."""
    assert main(["train", "--config", prepared(split_transcript=4, max_steps=1)]) == 0
    folder = tmp_path / "out" / "transcript"
    index = folder / "index.jsonl"
    if damage == "a tensor":
        file = next(folder.glob("*-activations.safetensors"))
        body = bytearray(file.read_bytes())
        body[-1] ^= 1
        file.write_bytes(body)
    elif damage == "a line":
        index.write_text(index.read_text().replace('"step": 0', '"step": 1', 1))
    else:
        index.write_text("".join(index.read_text().splitlines(keepends=True)[:-2]))

    words = ["audit", "--run", str(tmp_path / "out"), "--output", str(tmp_path / "audit")]
    assert one_sentence(words, capsys, "cut off or altered") == 3
    assert not (tmp_path / "audit" / "audit.html").exists()


def test_the_report_draws_depth_codec_and_noise(prepared: Any, tmp_path: Path):
    """With --frontiers A1 is repeated by each, and the page has a plot of each."""
    audit = audited(tmp_path, "--config", prepared(), *SHORT, "--frontiers")

    rates = {
        one["axis"]: [(point["x"], point["trr"]) for point in one["points"]]
        for one in audit["recovery"]
    }
    assert rates["layers below the cut"] == [(2, 1.0), (4, 1.0)]
    assert dict(rates["codec"])["raw"] == 1.0
    assert rates["noise over signal"][0][1] > rates["noise over signal"][-1][1]
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert all(f"Tokens read back against {axis}" in page for axis in rates)


def test_samples_are_picked_and_named_unless_redacted(prepared: Any, tmp_path: Path, capsys: Any):
    """`--rows` says which samples are attacked; audit.json names them, unless they are redacted."""
    config = prepared()
    words = ["--config", config, "--rows", "5,1-2", *SHORT]

    named = audited(tmp_path, *words)
    redacted = audited(tmp_path, *words, "--redact")

    assert [one["row"] for one in named["audited"]] == [1, 2, 5]
    assert (
        sum(one["tokens"] for one in named["audited"])
        == (named["channels"][0]["findings"][0]["tokens"])
    )
    assert (redacted["audited"], redacted["run"]["sequences"]) == ("redacted", 3)
    for rows_asked, told in (("2-1", "smaller number"), ("x", "no list"), ("99", "row 99")):
        words = ["audit", "--config", config, "--rows", rows_asked]
        assert one_sentence(words, capsys, told) == 2


FORMAL = {
    "split_privacy_profile": "formal",
    "split_privacy": {"clip": 1.0, "epsilon": 8.0, "delta": 1e-3, "planned": 4},
}


def test_a_formal_run_has_its_number_and_its_lower_bound(
    prepared: Any, tmp_path: Path, capsys: Any
):
    """Before it runs, what is planned; after, what the ledger booked; the game bounds both."""
    config = prepared(**FORMAL, split_transcript=4, max_steps=3)
    planned = audited(tmp_path, "--config", config, *SHORT)["guarantee"]
    cost = capsys.readouterr().err
    assert main(["train", "--config", config]) == 0
    assert "epsilon 8      noise of" in capsys.readouterr().err
    booked = audited(tmp_path, "--run", str(tmp_path / "out"), *SHORT)["guarantee"]

    assert "epsilon 8      noise of" in cost
    assert (planned["releases"], planned["guarantee"]) == (
        4,
        "(8.00, 0.001)-differential privacy",
    )
    assert booked["releases"] == 1  # three steps of two: half of the samples, once each
    assert 0 < booked["epsilon"] < planned["epsilon"]
    assert booked["delta"] == 1e-3
    for block in (planned, booked):
        bound = block["lower_bound"]["epsilon"]
        assert 0.5 * block["epsilon"] <= bound <= block["epsilon"]


def test_an_audit_that_was_killed_goes_on(prepared: Any, tmp_path: Path, capsys: Any):
    """After SIGKILL amid A2 the next call takes A1 over, and leaves nothing unfinished."""
    write_rows(tmp_path, [{"text": text} for text in dataset(80, seed=9)["text"]], "public.jsonl")
    words = ["--config", prepared(), "--attacks", "A1,A2", "--threads", "1"]
    asked = ["audit", *words, "--output", str(tmp_path / "audit"), "--samples", "8"]
    asked += ["--tokens", "12", "--public_text", str(tmp_path / "public.jsonl")]
    unfinished = tmp_path / "audit" / "unfinished"
    killed = subprocess.Popen([sys.executable, "-m", "cutlayer.cli.main", *asked])
    while not (unfinished / "A1.json").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    kept = json.loads((unfinished / "A1.json").read_text())["found"]
    assert stat.S_IMODE((unfinished / "A1.json").stat().st_mode) == 0o600
    assert not (unfinished / "A2.json").exists()
    assert not (tmp_path / "audit" / "audit.json").exists()

    findings = audited(tmp_path, *words)["channels"][0]["findings"]

    told = capsys.readouterr().err
    assert "A1 was done before" in told
    assert "A2 was done before" not in told
    assert [found["attack"] for found in findings] == ["A1", "A2"]
    assert findings[0]["seconds"] == kept["seconds"]
    assert not unfinished.exists()


def test_noise_at_the_embedding_is_audited_with_the_noise(prepared: Any, tmp_path: Path):
    """What is attacked has passed the run's defense, wherever it stands."""
    config = prepared(split_defenses=[{"name": "metric_dp_embed", "eta": 0.01}])

    (activations, _gradients) = audited(tmp_path, "--config", config, *SHORT)["channels"]

    assert activations["findings"][0]["trr"] < 0.5


def test_an_attack_that_cannot_be_run_is_told(prepared: Any, tmp_path: Path, capsys: Any):
    """A2 without enough to learn from is refused; A5 without enough that is known says so."""
    words = ["--config", prepared(), "--samples", "2", "--tokens", "6"]

    assert one_sentence(["audit", *words, "--attacks", "A1,A2"], capsys, "64 public texts") == 2
    audited(tmp_path, *words, "--attacks", "A1, A5")
    assert "A5 was not run: it needs 64 tokens" in capsys.readouterr().err


def test_what_was_found_of_something_else_is_not_taken_over(tmp_path: Path):
    """A part of another digest, and one that is torn, are found again."""
    told: list[str] = []
    first, other = (Unfinished(tmp_path / "u", digest, told.append) for digest in "ab")

    assert first.kept("A1", lambda: [1, None]) == [1, None]
    assert first.kept("A1", lambda: [2]) == [1, None]
    assert other.kept("A1", lambda: [3]) == [3]
    assert first.kept("A1", lambda: [4]) == [4]
    (tmp_path / "u" / "A1.json").write_text('{"digest": "a", "fou')
    assert first.kept("A1", lambda: [5]) == [5]
    assert told == ["A1 was done before this audit was interrupted"]


BAD = {
    "both": (["--config", "run.yaml", "--run", "out"], "name one of"),
    "neither": ([], "name one of"),
    "no transcript": (["--run", "nowhere"], "holds no transcript"),
    "no samples": (["--run", "out", "--samples", "0"], "at least 1"),
    "fewer than none to show": (["--run", "out", "--show", "-1"], "--show at least 0"),
    "a misspelt flag": (["--run", "out", "--atacks", "A2"], "--atacks is no flag"),
    "a key of a run that is over": (["--run", "out", "--max_length", "9"], "those that it had"),
    "an unknown attack": (["--run", "nowhere", "--attacks", "A1, A9"], "attack 'A9' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_ends_in_one_sentence(name: str, capsys: Any):
    """Each says what to name."""
    words, told = BAD[name]

    assert one_sentence(["audit", *words], capsys, told) in (2, 3)


PROFILES = {
    "unknown": ({"split_privacy_profile": "opne"}, "did you mean open"),
    "a part that it forbids": (
        {"split_privacy_profile": "forward_only", "split_train": ["trunk"]},
        "trains top only",
    ),
    "a part that is none": ({"split_train": "trunk,top"}, "'trunk,top', which is no part"),
    "an epsilon that it has not": (
        {"split_privacy_profile": "empirical", "split_privacy": {"epsilon": 8.0}},
        "which has none",
    ),
    "a formal one without numbers": ({"split_privacy_profile": "formal"}, "needs clip"),
    "no policy for evidence": (
        {"split_privacy_profile": "attested"},
        "needs split_attestation_policy",
    ),
    "a refused defense": (
        {"split_defenses": [{"name": "rotation"}]},
        "not offered as a defense",
    ),
    "a name in place of a list": ({"split_defenses": "gaussian"}, "is no list of names with"),
    "a list of names": ({"split_defenses": ["gaussian"]}, "such as [{name: gaussian"),
    "two in one place": (
        {"split_defenses": [{"name": "gaussian", "nsr": 1.0}, {"name": "gaussian", "nsr": 3.0}]},
        "'gaussian' and 'gaussian' both stand at the lower cut",
    ),
    "words for numbers": (
        {"split_privacy_profile": "empirical", "split_privacy": {"nsr": "big"}},
        "'gaussian': nsr = 'big' is no number",
    ),
    "half a release": (
        {
            "split_privacy_profile": "formal",
            "split_privacy": {"clip": 1.0, "epsilon": 8.0, "delta": 1e-6, "planned": 4.5},
        },
        "planned = 4.5 is no whole number",
    ),
    "a budget that nothing keeps": ({"split_budget": 3.0}, "split_budget is of a ledger"),
    "no budget": ({**FORMAL, "split_budget": 0}, "epsilon = 0.0 must be a number above 0"),
    "an epsilon for half of what leaves": (
        {
            "split_defenses": [
                {"name": "ldp_sequence", "clip": 1.0, "epsilon": 8.0, "delta": 1e-3},
                {"name": "gaussian", "nsr": 3.0, "channel": "gradients"},
            ]
        },
        "'ldp_sequence' has an epsilon and 'gaussian' has none",
    ),
    "samples that share a sequence": ({**FORMAL, "packing": True}, "packing puts several samples"),
    "delta beyond 1/n": (
        {
            "split_privacy_profile": "formal",
            "split_privacy": {"clip": 1.0, "epsilon": 8.0, "delta": 0.5, "planned": 4},
        },
        "delta",
    ),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_that_makes_no_sense_is_refused(
    name: str, prepared: Any, tmp_path: Path, capsys: Any
):
    """Before anything is sent, in one sentence."""
    settings, told = PROFILES[name]
    config = prepared(**settings)

    assert one_sentence(["train", "--config", config], capsys, told) in (2, 9)
    assert not (tmp_path / "out").exists()


def test_numbers_of_a_profile_can_be_named(prepared: Any):
    """What is named goes before the profile's own number, and `1e-6` is a number."""
    asked = {"clip": 1, "epsilon": 8, "delta": "1e-6", "planned": 4, "pool": 8}
    for profile, privacy, found in (
        ("empirical", {"nsr": 2}, [("gaussian", 2.0), ("gaussian", 2.0)]),
        ("formal", asked, [("ldp_sequence", 8), ("no_backward", None)]),
    ):
        run = read_run(prepared(split_privacy_profile=profile, split_privacy=privacy), {})
        made = defenses_of(run)
        strengths = [getattr(one, "nsr", getattr(one, "pool", None)) for one in made]
        assert [(one.name, n) for one, n in zip(made, strengths, strict=True)] == found


def test_a_folder_has_one_ledger_however_it_is_written(prepared: Any, tmp_path: Path):
    """A slash at the end of a folder's name begins no second budget."""
    paths = []
    for end in ("", "/"):
        run = read_run(prepared(**FORMAL, dataset_name=f"{tmp_path}{end}"), {})
        with ledger_of(run, defenses_of(run), 12) as ledger:
            paths.append(ledger.path)

    assert paths[0] == paths[1] == Path(f"{tmp_path}.ledger.jsonl")


def test_a_spent_budget_sends_nothing_more(prepared: Any, tmp_path: Path, capsys: Any):
    """In the profile `formal` a second epoch on a budget for one is refused, in any run."""
    settings = {
        "split_privacy_profile": "formal",
        "split_privacy": {"clip": 1.0, "epsilon": 8.0, "delta": 1e-3, "planned": 1},
        "max_steps": 20,
    }
    words = ["train", "--config", prepared(**settings)]
    ledger = tmp_path / "train.jsonl.ledger.jsonl"

    assert one_sentence(words, capsys, "budget") == 9
    booked = ledger.read_text().count('"release"')
    assert booked == 12  # each sample once

    assert one_sentence([*words, "--output_dir", str(tmp_path / "two")], capsys, "budget") == 9
    assert ledger.read_text().count('"release"') == booked

    more = [*words[:2], prepared(**{**settings, "max_steps": 2}), "--split_budget", "20"]
    assert one_sentence(more, capsys, "") in (2, 9)  # nobody has decided on it
    assert main([*more, "--split_budget_raised_by", "the data protection officer"]) == 0
    assert "the data protection officer" in ledger.read_text()
