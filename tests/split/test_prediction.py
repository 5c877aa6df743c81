"""What is predicted of a cut, against the parts when they are loaded and a run over the wire."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from cutlayer.client import connection as client_connection
from cutlayer.split.cut import Cut
from cutlayer.split.loading import skeleton_of
from cutlayer.split.prediction import Prediction, Setup, Speed, cuts_of, predict, recommended
from cutlayer.split.schedule import Path as Link
from cutlayer.split.trace import Pieces, trace
from tests.site import lora, unsplit

SPEED = Speed(1e9, 1e9)
ROWS, TOKENS = 4, 11


def pieces_of(folder: Path, *, columns: int = TOKENS, task: str = "causal-lm") -> Pieces:
    """Return a tiny model's pieces, from its config alone."""
    skeleton = skeleton_of(AutoConfig.from_pretrained(folder), task)
    return trace(skeleton, lora(task), columns=columns)


def setup_of(**changed: Any) -> Setup:
    """Return a run of 4 rows in fp32 over a link."""
    asked: dict[str, Any] = {"rows": ROWS, "client": SPEED, "server": SPEED}
    asked |= {"path": Link(1e6, 1e6, 0.02), "token_bytes": lambda width: 4.0 * width, "chunks": 1}
    return Setup(**(asked | changed))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "phi3"])
def test_parameters_are_those_of_the_loaded_parts(folder_of, serve, model_type):
    """Base and LoRA numbers of both sides equal those of parts that were loaded and connected."""
    folder = folder_of(model_type)
    with contextlib.closing(serve(folder).connect()) as model:
        cut = model.cut
        base = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
        mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
        theirs = model.connection.parameters

        found = predict(pieces_of(folder), cut, setup_of(moments=0))

        skeleton = skeleton_of(AutoConfig.from_pretrained(folder), "causal-lm")
        whole = sum(p.numel() for p in skeleton.model.parameters())
        client = sum(p.numel() for p in base.values())
        assert found.client_weight_bytes == 4 * client
        assert found.server_weight_bytes == 4 * (whole - client)
        assert found.client_state_bytes == 8 * sum(p.numel() for p in mine.values())
        assert found.server_state_bytes == 8 * sum(torch.Size(s).numel() for s in theirs.values())


@pytest.mark.parametrize(
    ("train", "chunks"),
    [
        (("bottom", "trunk", "top"), 1),
        (("bottom", "trunk", "top"), 2),
        (("trunk", "top"), 1),
        (("trunk",), 2),
        (("top",), 1),
    ],
)
def test_bytes_are_those_of_a_run_over_the_wire(folder_of, serve, monkeypatch, train, chunks):
    """Tensors of a training step, counted as they leave and arrive, are exactly as predicted."""
    up: list[int] = []
    down: list[int] = []
    attach = client_connection.attach_tensors
    monkeypatch.setattr(
        client_connection,
        "attach_tensors",
        lambda *args, **kwargs: up.extend(map(len, parts := attach(*args, **kwargs))) or parts,
    )
    read = client_connection.read_tensors
    monkeypatch.setattr(
        client_connection,
        "read_tensors",
        lambda message, **kwargs: down.append(len(message.body)) or read(message, **kwargs),
    )
    folder = folder_of("llama")
    with contextlib.closing(serve(folder).connect(train=train, chunks=chunks)) as model:
        model.train()
        tokens_BT = torch.ones(ROWS, TOKENS, dtype=torch.long)
        up.clear(), down.clear()
        batch = {"input_ids": tokens_BT, "attention_mask": tokens_BT, "labels": tokens_BT}
        model(**batch, use_cache=False).loss.backward()

        found = predict(pieces_of(folder), model.cut, setup_of(train=train, chunks=chunks))

    assert (sum(up), sum(down)) == (found.up_payload_bytes, found.down_payload_bytes)
    assert sum(up) < found.up_bytes < sum(up) * 1.01 + 1000


def test_what_is_kept_is_what_autograd_keeps(folder_of):
    """Counted without memory, a model keeps for its backward what it keeps when it is run."""
    columns = 32
    folder = folder_of("llama")
    pieces = pieces_of(folder, columns=columns)
    model = unsplit(folder, lora()).train()
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BT = torch.ones(64, columns, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=True)
    kept.pop(output.logits.untyped_storage().data_ptr(), None)
    expected = sum(piece.kept_bytes for piece in (*pieces.layers, pieces.behind))
    assert sum(kept.values()) == pytest.approx(64 * expected, rel=0.03)


@pytest.mark.parametrize("what", ["client_bytes", "server_bytes", "up_bytes", "client_flops"])
def test_more_rows_need_more(folder_of, what):
    """Memory, bytes, operations and seconds grow with the batch."""
    pieces = pieces_of(folder_of("llama"))
    found = [predict(pieces, Cut(2, 5), setup_of(rows=rows)) for rows in (1, 2, 8, 64, 512)]
    values = [getattr(each, what) for each in found]
    assert values == sorted(set(values))
    assert [each.step.seconds for each in found] == sorted({each.step.seconds for each in found})


def test_a_layer_moves_from_one_side_to_the_other(folder_of):
    """Whatever the cut, both sides together have the same weights, LoRA and operations."""
    pieces = pieces_of(folder_of("llama"))
    found = [predict(pieces, cut, setup_of()) for cut in cuts_of(len(pieces.layers))]
    assert len(found) == 6 * 7 // 2
    for what in ("weight_bytes", "state_bytes"):
        both = {getattr(e, f"client_{what}") + getattr(e, f"server_{what}") for e in found}
        assert len(both) == 1
    flops = [each.client_flops + each.server_flops for each in found]
    assert max(flops) == pytest.approx(min(flops))
    for one, other in itertools.pairwise(sorted(found, key=lambda e: (e.cut.upper, e.cut.lower))):
        if one.cut.upper == other.cut.upper:
            assert one.client_weight_bytes < other.client_weight_bytes


def test_operations_are_two_and_two_for_each_weight(folder_of):
    """A layer takes about two operations a weight and token forward, and as many backward."""
    pieces = pieces_of(folder_of("llama"), columns=8)
    for plain in pieces.plain:
        # Attention's own products come on top, and norms have weights without products.
        assert plain.forward_flops == pytest.approx(2 * 8 * plain.parameters, rel=0.15)
        assert plain.backward_flops == pytest.approx(plain.forward_flops, rel=0.1)
    assert all(
        a.kept_bytes > b.kept_bytes for a, b in zip(pieces.layers, pieces.plain, strict=True)
    )


def test_a_frozen_bottom_keeps_nothing_and_gets_no_gradient(folder_of):
    """Without a LoRA below, no gradient comes down and no graph of the bottom is held."""
    pieces = pieces_of(folder_of("llama"))
    whole = predict(pieces, Cut(3, 5), setup_of())
    frozen = predict(pieces, Cut(3, 5), setup_of(train=("trunk", "top")))
    assert frozen.down_payload_bytes < 0.6 * whole.down_payload_bytes
    assert frozen.client_bytes < whole.client_bytes
    assert frozen.client_flops < whole.client_flops
    only_top = predict(pieces, Cut(3, 5), setup_of(train=("top",)))
    assert only_top.server_state_bytes == 0
    assert only_top.up_payload_bytes < 0.6 * whole.up_payload_bytes


def test_options_move_what_they_are_for(folder_of):
    """Checkpointing saves the server's memory for time; a lean head saves the client's head."""
    pieces = pieces_of(folder_of("llama"), columns=64)
    plain = predict(pieces, Cut(1, 5), setup_of())
    again = predict(pieces, Cut(1, 5), setup_of(gradient_checkpointing=True))
    assert again.server_bytes < plain.server_bytes
    assert again.server_flops > 1.4 * plain.server_flops
    lean = predict(pieces, Cut(1, 6), setup_of(lean_head=True, supervised=0.25))
    full = predict(pieces, Cut(1, 6), setup_of())
    assert lean.client_flops < full.client_flops
    assert lean.down_payload_bytes < full.down_payload_bytes


def test_the_recommended_cut_fits_and_is_fast(folder_of):
    """It has a layer at both ends, is within the limits, and nothing that fits is much faster."""
    pieces = pieces_of(folder_of("llama"))
    found = [predict(pieces, cut, setup_of(chunks=0)) for cut in cuts_of(len(pieces.layers))]
    limit = sorted(each.client_bytes for each in found)[len(found) // 2]

    best = recommended(found, client_bytes=limit)

    assert isinstance(best, Prediction)
    assert best.client_bytes <= limit
    assert best.bottom_layers
    assert best.top_layers
    rivals = [e for e in found if e.client_bytes <= limit and e.bottom_layers and e.top_layers]
    assert best.step.seconds <= 1.03 * min(each.step.seconds for each in rivals)
    assert recommended(found, client_bytes=1.0) is None
