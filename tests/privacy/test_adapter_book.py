"""The book of a data set's adapters: what all of them promise together, and that it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlayer.errors import BudgetExhausted, ConfigError, DataError, StorageError
from cutlayer.privacy.accountant import epsilon_of_adapter, epsilon_of_adapters
from cutlayer.privacy.adapter_book import AdapterBook

RUN = (1.1, 0.2, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A book with two adapters."""
    book = AdapterBook(tmp_path / "book")
    book.book(*RUN, name="a")
    book.book(*RUN, name="b")
    book.close()
    return tmp_path / "book"


def test_two_halves_are_the_whole():
    """Two adapters of three steps tell together what one of six steps tells."""
    together = epsilon_of_adapters([RUN, (1.1, 0.2000001, 3)], 1e-3)
    whole = epsilon_of_adapter(1.1, 0.2, 6, 1e-3)

    assert together.pld == pytest.approx(whole.pld, rel=1e-3)
    assert together.rdp == pytest.approx(whole.rdp, rel=1e-6)
    assert epsilon_of_adapters([RUN, RUN], 1e-3) == whole
    assert together.pld > 1.2 * epsilon_of_adapter(*RUN, 1e-3).pld


def test_a_book_goes_on_where_it_stood(path: Path):
    """Opened again it knows its adapters, and refuses one too many before it is trained."""
    book = AdapterBook(path)

    assert len(book) == 2
    assert book.total(1e-3) == epsilon_of_adapters([RUN, RUN], 1e-3)
    with pytest.raises(BudgetExhausted, match="3 adapters of this data would come to epsilon"):
        book.refuse_beyond(book.total(1e-3).pld + 0.01, 1e-3, RUN)
    book.refuse_beyond(100.0, 1e-3, RUN)
    with pytest.raises(ConfigError, match="above 0"):
        book.refuse_beyond(0.0, 1e-3, RUN)
    with pytest.raises(StorageError, match="in use by another process"):
        AdapterBook(path)
    assert len(book) == 2
    book.close()


def test_a_torn_line_is_dropped_and_an_altered_one_refused(path: Path):
    """A crash while writing leaves the lines before it; a smaller number of steps is found out."""
    whole = path.read_text()
    path.write_text(whole[:-9])
    torn = AdapterBook(path)
    assert len(torn) == 1
    torn.close()

    for altered in (whole.replace('"steps": 3', '"steps": 1', 1), whole.split("\n", 1)[1]):
        path.write_text(altered)
        with pytest.raises(DataError, match="altered or damaged"):
            AdapterBook(path)
