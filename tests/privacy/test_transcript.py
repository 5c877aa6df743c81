"""What a run sent is kept as it was, through a resumed run and a crash, and for its owner alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from cutlayer.errors import DataError
from cutlayer.privacy.transcript import TranscriptWriter, read_transcript

FACTS = {"model": "m", "revision": "", "defenses": [{"name": "gaussian", "nsr": 1.0}]}


def recorded(folder: Path, first: int, *, step: int = 0, anew: bool = False) -> None:
    """Record one forward of a process that counts from 1, its tokens `first` and the next."""
    writer = TranscriptWriter(folder, FACTS, sequences=8, anew=anew)
    ids_BT = torch.tensor([[first, first + 1]])
    smashed_BTD = torch.full((1, 2, 3), float(first))
    writer.activations(1, step, smashed_BTD, {}, {"input_ids": ids_BT})
    writer.trunk_out(1, step, smashed_BTD)
    writer.gradient(1, step, smashed_BTD)


def test_forwards_of_a_resumed_run_keep_their_own_tokens(tmp_path: Path):
    """A resumed run counts from 1 again, and each forward is told with what it was."""
    recorded(tmp_path, 10)
    recorded(tmp_path, 20, step=4)

    departures = list(read_transcript(tmp_path)[1])

    assert [(one.number, one.step) for one in departures] == [(1, 0), (2, 4)]
    for one in departures:
        first = float(one.truth["input_ids"][0, 0])
        assert one.trunk_out_BTD is not None
        assert one.gradient_BTD is not None
        for tensor in (one.smashed_BTD, one.trunk_out_BTD, one.gradient_BTD):
            assert bool((tensor == first).all())


def test_a_run_from_its_first_step_takes_the_place_of_an_earlier_one(tmp_path: Path):
    """What an audit reads is of the run whose adapter stands there."""
    recorded(tmp_path, 10)
    recorded(tmp_path, 20, anew=True)

    assert [int(one.truth["input_ids"][0, 0]) for one in read_transcript(tmp_path)[1]] == [20]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_facts_are_part_of_the_chain(tmp_path: Path):
    """Who takes the defense out of the head, and leaves the rest, is found out."""
    recorded(tmp_path, 10)
    head = tmp_path / "head.json"
    head.write_text(head.read_text().replace('"nsr": 1.0', '"nsr": 2.0'))

    with pytest.raises(DataError, match="cut off or altered"):
        read_transcript(tmp_path)


@pytest.mark.parametrize("line", ["[]", "null", "5"])
def test_a_line_that_is_none_is_refused_in_a_sentence(tmp_path: Path, line: str):
    """An index that was overwritten ends in no error of Python's own."""
    recorded(tmp_path, 10)
    index = tmp_path / "index.jsonl"
    index.write_text("\n".join([line, *index.read_text().splitlines()[1:]]) + "\n")

    with pytest.raises(DataError, match="line 1 of its index"):
        read_transcript(tmp_path)


def test_a_forward_without_its_tokens_is_left_out(tmp_path: Path):
    """A client that was killed between two lines leaves what can be audited without that one."""
    recorded(tmp_path, 10)
    writer = TranscriptWriter(tmp_path, FACTS, sequences=8)
    writer._add("activations", 1, 2, {"smashed": torch.zeros(1, 2, 3)})

    assert len(list(read_transcript(tmp_path)[1])) == 1


def test_only_the_owner_reads_it_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files are made closed to others, and not closed afterwards."""
    monkeypatch.setattr(os, "chmod", lambda *_: None)
    recorded(tmp_path, 10)

    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
