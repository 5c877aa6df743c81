"""What a server keeps of rows: sealed, each run's alone, deletable, nothing that is no row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.cli.main import main
from cutlayer.errors import NotFinite, ProtocolError, Refused
from cutlayer.server.rows import RowStore
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.frames import Message
from cutlayer.wire.rows import add_row, opened, records_in, rows_that_came, sealed, unpacked
from cutlayer.wire.tensors import attach_tensors, read_tensors
from tests.equivalence.test_send_once import FROZEN
from tests.resilience.test_savepoints import until
from tests.resilience.test_send_once import rows_in, settled
from tests.site import Site, batch_of, equal, site_of
from tests.tiny import HIDDEN

ROW, KEY, NAME = b"\x01" * 32, b"\x02" * 32, "ab" * 16


@pytest.fixture
def keeping(llama: Site, certs: Path, tmp_path: Path) -> Iterator[Site]:
    """A server that keeps rows, with a folder of its own."""
    site = site_of(llama.folder, certs, tmp_path, row_ttl_s=1000.0)
    yield site
    site.server.stop(grace_s=0.5)


def fed(site: Site, **settings: Any) -> Any:
    """Return a connected client that has sent four rows."""
    split = site.connect(train=FROZEN, send_once=True, **settings)
    with torch.no_grad():
        split(**batch_of(1), use_cache=False)
    return split


def test_a_record_is_a_message_of_one_row():
    """Rows are taken out of a message and put into another without a look at their bytes."""
    tensors = {
        "smashed/0": torch.randn(1, 3, 4),
        "attention_mask/0": torch.ones(1, 3, dtype=torch.long),
        "smashed/2": torch.randn(1, 3, 4),
        "wanted": torch.arange(3),
    }
    head = pb.Head()
    parts = attach_tensors(head, tensors, codecs={"smashed/2": "bf16"})
    records = records_in(head, parts)
    other = pb.Head()
    body = add_row(other, 7, unpacked(records[0]))

    assert rows_that_came(head) == records.keys() == {0, 2}
    assert [meta.name for meta in other.tensors] == ["smashed/7", "attention_mask/7"]
    assert sum(map(len, body)) == sum(meta.nbytes for meta in other.tensors)
    row = read_tensors(unpacked(records[0]))
    assert equal([row["smashed"], row["attention_mask"]], list(tensors.values())[:2])


@pytest.mark.parametrize("change", ["nothing", "a bit", "its end", "the key", "the name", "all"])
def test_a_sealed_record_opens_as_it_was_or_not_at_all(change: str):
    """Torn, altered, under another key or another name: it is as if it were not there."""
    head = pb.Head()
    parts = attach_tensors(head, {"smashed/0": torch.randn(1, 3, 4)})
    found = sealed(KEY, records_in(head, parts)[0], b"name")
    key, name = KEY, b"name"
    if change == "a bit":
        found = found[:40] + bytes([found[40] ^ 1]) + found[41:]
    elif change == "its end":
        found = found[:-1]
    elif change == "the key":
        key = b"\x03" * 32
    elif change == "the name":
        name = b"other"
    elif change == "all":
        found = b""

    assert (opened(key, found, name) is not None) == (change == "nothing")


def test_no_activation_lies_on_the_disk_in_the_clear(keeping: Site, tmp_path: Path):
    """Nothing that the client sent, and no key, stands in any file of the server's folder."""
    with fed(keeping, run="one") as split:
        settled(tmp_path, 4)
        once = split.by_rows.once
        row = once.row(next(iter(once._copied)))["smashed"]
        secrets = [once.key, row[0, 0, :4].numpy().tobytes()]
        files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]

    assert len(files) > 4
    assert not any(secret in file for secret in secrets for file in files)


def test_the_key_is_gone_with_the_session(keeping: Site, tmp_path: Path):
    """A server without the client's stream cannot open a row, by its own code at least."""
    with fed(keeping, run="one") as split:
        settled(tmp_path, 4)
        sessions: Any = keeping.server.sessions
        (session,) = sessions.in_memory()
        rows, named = session.rows, [bytes.fromhex(p.name) for p in rows_in(tmp_path)]
        assert all(rows.get(row) is not None for row in named)
        made_again = sessions._rows.of("default", "one", split.by_rows.once.name)
        found = [made_again.get(row) for row in named]

    assert found == [None] * 4


def test_runs_and_tenants_have_their_own_rows(keeping: Site, tmp_path: Path):
    """Named by another run or tenant with the right key, a row is not there."""
    with fed(keeping, run="one") as split:
        settled(tmp_path, 4)
        once = split.by_rows.once
        row = next(iter(once._copied))
        store: Any = keeping.server.sessions._rows
        found = []
        for tenant, run in (("default", "one"), ("default", "two"), ("other", "one")):
            rows = store.of(tenant, run, once.name)
            rows.take_key(once.key)
            found.append(rows.get(row) is not None)
        # Not even a file that was moved there opens: it is bound to its place.
        (path,) = [p for p in rows_in(tmp_path) if p.name == row.hex()]
        moved = tmp_path / "default" / "two" / "rows" / once.name / path.parent.name / path.name
        moved.parent.mkdir(parents=True)
        moved.write_bytes(path.read_bytes())
        other = store.of("default", "two", once.name)
        other.take_key(once.key)

    assert found == [True, False, False]
    assert other.get(row) is None


def test_a_run_that_ends_leaves_no_row(keeping: Site, tmp_path: Path):
    """Closed it drops its rows; interrupted it keeps them; opened without it drops them."""
    fed(keeping, run="one").close()
    assert rows_in(tmp_path) == []

    split = fed(keeping, run="two")
    settled(tmp_path, 4)
    split.close(keep_rows=True)
    assert len(rows_in(tmp_path)) == 4
    fed(keeping, run="two").close(keep_rows=True)  # another key: the older rows are nobody's
    until(lambda: len(rows_in(tmp_path)) == 4, within_s=10)
    assert len(list((tmp_path / "default" / "two" / "rows").iterdir())) == 1

    with pytest.raises(KeyError), keeping.connect(run="two", train=FROZEN):
        raise KeyError
    assert rows_in(tmp_path) == []


@pytest.mark.parametrize("brings_one", [False, True])
def test_rows_count_as_what_they_become(tmp_path: Path, brings_one: bool):
    """However small on the disk, stored rows and those that come fit into one message or fail."""
    store = RowStore(tmp_path, 1000.0)
    rows = store.of("ward", "run", NAME)
    assert rows is not None
    rows.take_key(KEY)
    row_TD = torch.randn(1, 4, 256, dtype=torch.float64)
    head = pb.Head(keep_rows=pb.KeepRows(rows=[ROW], row_tokens=4))
    parts = attach_tensors(head, {"smashed/0": row_TD}, codecs={"smashed/0": "rotated1"})
    packed = memoryview(bytearray(b"".join(parts)))
    rows.keep_those_in(Message(head, packed))

    def joined(times: int) -> Any:
        asked = pb.Head(forward=pb.Forward(rows=[ROW] * times, row_tokens=4))
        came = {f"smashed/{times - 1}": row_TD} if brings_one else {}
        attach_tensors(asked, came)
        assert rows.missing(asked, 8 * row_TD.nbytes) is None
        return rows.joined(asked, came, {}, torch.device("cpu"))["smashed"].shape

    assert len(packed) * 9 < 8 * row_TD.nbytes
    assert joined(8) == (8, 4, 256)
    with pytest.raises(ProtocolError, match="more than a message may have"):
        joined(9)
    store.close()


def test_an_operator_sees_and_deletes_rows(
    keeping: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """`checkpoints list` has their bytes, `delete --rows` takes them, and the run goes on."""

    def told(*words: str) -> Any:
        capsys.readouterr()
        command = ["checkpoints", *words, "--state_dir", str(tmp_path), "--format", "json"]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)

    with fed(keeping, run="one") as split, torch.no_grad():
        settled(tmp_path, 4)
        (listed,) = told("list")["rows"]
        gone = told("delete", "default/one", "--rows")
        left = rows_in(tmp_path)
        split(**batch_of(1), use_cache=False)
        again = split.by_rows.once.counts()

    assert (listed["run"], left) == ("one", [])
    assert listed["size_bytes"] == gone["row_bytes"] > 4 * 2000
    assert again["sent"] == 8


def test_a_server_that_keeps_rows_no_more_deletes_them(tmp_path: Path):
    """Started without a time to keep them, it drops all that is there."""
    store = RowStore(tmp_path, 1000.0)
    rows = store.of("ward", "run", NAME)
    assert rows is not None
    rows.take_key(KEY)
    rows.keep(ROW, b"\0\0\0\0")
    store.close()
    assert len(rows_in(tmp_path)) == 1

    RowStore(tmp_path, 0.0).close()

    assert rows_in(tmp_path) == []


HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception]]] = {
    "an id that is none": ({"rows": [b"x"], "row_tokens": 2}, {}, ProtocolError),
    "too many": ({"rows": [ROW] * 5000, "row_tokens": 2}, {}, ProtocolError),
    "a number beyond": (
        {"rows": [ROW], "row_tokens": 2},
        {"smashed/0": torch.zeros(1, 2, HIDDEN), "smashed/1": torch.zeros(1, 2, HIDDEN)},
        ProtocolError,
    ),
    "two rows as one": (
        {"rows": [ROW], "row_tokens": 2},
        {"smashed/0": torch.zeros(2, 2, HIDDEN)},
        ProtocolError,
    ),
    "another width": (
        {"rows": [ROW], "row_tokens": 2},
        {"smashed/0": torch.zeros(1, 2, HIDDEN - 1)},
        ProtocolError,
    ),
    "another kind": (
        {"rows": [ROW], "row_tokens": 2},
        {"smashed/0": torch.zeros(1, 2, HIDDEN), "labels/0": torch.zeros(1, 2)},
        ProtocolError,
    ),
    "rows of two shapes": (
        {"rows": [ROW, ROW], "row_tokens": 2},
        {
            "smashed/0": torch.zeros(1, 2, HIDDEN),
            "smashed/1": torch.zeros(1, 2, HIDDEN),
            "attention_mask/1": torch.ones(1, 2, dtype=torch.long),
        },
        ProtocolError,
    ),
    "no number": (
        {"rows": [ROW], "row_tokens": 2},
        {"smashed/0": torch.full((1, 2, HIDDEN), torch.nan)},
        NotFinite,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("verb", ["forward", "keep_rows"])
def test_rows_that_are_none_are_refused_and_not_kept(
    keeping: Site, tmp_path: Path, name: str, verb: str
):
    """The session lives on."""
    fields, tensors, error = HOSTILE[name]
    if (verb, name) == ("keep_rows", "rows of two shapes"):
        return  # kept apart, they are no batch yet
    with keeping.connect(train=FROZEN, send_once=True) as split:
        connection = split.connection
        connection.once = None  # a client that says what it likes
        kind = pb.Forward if verb == "forward" else pb.KeepRows
        with pytest.raises(error):
            connection.request(pb.Head(**{verb: kind(**fields)}), tensors).wait()
        connection.request(pb.Head(echo=pb.Echo()), {"payload": torch.zeros(1)}).wait()

    assert rows_in(tmp_path) == []


def test_a_stream_without_the_key_is_refused(keeping: Site):
    """A client that opened a run with rows brings their key with every stream."""
    sessions: Any = keeping.server.sessions
    with keeping.connect(train=FROZEN, send_once=True) as split:
        with pytest.raises(ProtocolError, match="32 bytes"):
            sessions.attach("default", split.connection.session, 0, lambda: None, b"short")
        with pytest.raises(Refused, match="no such session"):
            sessions.attach("another", split.connection.session, 0, lambda: None, KEY)
