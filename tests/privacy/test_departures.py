"""What leaves a connected client is booked under the record that it is about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cutlayer.client.departures import Departures
from cutlayer.errors import BudgetExhausted
from cutlayer.privacy.defenses import defense_of
from cutlayer.privacy.ledger import Ledger
from cutlayer.split.entry import Entry

DELTA = 1e-3


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger in which each record has a budget of epsilon 8."""
    with Ledger(tmp_path / "ledger.jsonl", epsilon=8, delta=DELTA) as opened:
        yield opened


def departures(ledger: Ledger, *, planned: int = 1) -> Departures:
    """Return what books, behind clipped noise."""
    noise = defense_of("ldp_sequence", clip=1.0, epsilon=8.0, delta=DELTA, planned=planned)
    return Departures([noise], ledger)


def entry(ids: list[int], *, padding: int = 0, left: bool = False) -> Entry:
    """Return a call of one sequence, padded."""
    zeros, ones = [0] * padding, [1] * len(ids)
    ids_BT = torch.tensor([zeros + ids if left else ids + zeros])
    mask_BT = torch.tensor([zeros + ones if left else ones + zeros])
    return Entry({"attention_mask": mask_BT}, {"input_ids": ids_BT})


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_record_is_the_same_however_it_is_padded(ledger: Ledger, left: bool):
    """Epochs pad a sequence to other lengths: it spends one budget all the same."""
    books = departures(ledger)
    books.defended(torch.randn(1, 5, 8), entry([7, 8, 9], padding=2, left=left))

    with pytest.raises(BudgetExhausted):
        books.defended(torch.randn(1, 4, 8), entry([7, 8, 9], padding=1, left=left))
    books.defended(torch.randn(1, 4, 8), entry([7, 8], padding=2, left=left))


def test_what_goes_on_from_a_cache_counts_for_every_record(ledger: Ledger):
    """One token after a prompt tells of the prompt, whose name it does not bear."""
    books = departures(ledger, planned=2)
    books.defended(torch.randn(1, 3, 8), entry([7, 8, 9]))
    grown = Entry({"attention_mask": torch.ones(1, 4)}, {"input_ids": torch.tensor([[5]])})

    left_BTD = books.defended(torch.randn(1, 1, 8), grown, past_tokens=3)

    assert left_BTD.shape == (1, 1, 8)
    with pytest.raises(BudgetExhausted):
        books.defended(torch.randn(1, 3, 8), entry([7, 8, 9]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_booked_too(ledger: Ledger, dtype: torch.dtype):
    """What leaves is told by a digest of its bytes, whatever numbers they are."""
    departures(ledger).defended(torch.randn(1, 3, 8, dtype=dtype), entry([7, 8, 9]))

    assert len(ledger.releases_of()) == 1
