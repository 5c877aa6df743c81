"""Rows that are sent once: the run is the same bit for bit, and later epochs send none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, Refused
from cutlayer.privacy.defenses import defense_of
from cutlayer.privacy.transcript import TranscriptWriter, read_transcript
from tests.equivalence.test_trl import trainer_of
from tests.site import Loop, Site, adapter_of, batch_of, equal, lora, site_of

ROWS, BATCH, EPOCHS = 12, 4, 3
FROZEN = ("trunk", "top")


@pytest.fixture(scope="module")
def keeping(llama: Site, certs: Path, tmp_path_factory: Any) -> Iterator[Site]:
    """The small Llama at a server that keeps rows."""
    state = tmp_path_factory.mktemp("rows")
    site = site_of(llama.folder, certs, state, row_ttl_s=1000.0)
    yield site
    site.server.stop(grace_s=0.5)


def epochs_of(seed: int = 0, *, tokens: int = 16) -> list[list[dict[str, Tensor]]]:
    """Return a few epochs over the same rows, shuffled one by one into other batches each time."""
    data = batch_of(1, rows=ROWS, tokens=tokens)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(ROWS, generator=generator).view(-1, BATCH) for _ in range(EPOCHS)]
    return [[{k: v[rows] for k, v in data.items()} for rows in order] for order in orders]


def trained(split: Any, *, accumulate: int = 1, tokens: int = 16) -> list[Any]:
    """Train the epochs; return losses, logits, norms and adapter."""
    seen: list[Any] = []
    loop = Loop.over(split)
    for epoch in epochs_of(tokens=tokens):
        for first in range(0, len(epoch), accumulate):
            seen += loop.step(*epoch[first : first + accumulate])
    return [*seen, adapter_of(split)]


def attention_calls(split: Any) -> list[int]:
    """Count, from now on, how many rows go through the first layer of the bottom."""
    rows: list[int] = []
    attention = split.hf_model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda _m, _a, k: rows.append(len(k["hidden_states"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_run_that_sends_once_is_the_run_that_does_not(
    llama: Site, keeping: Site, chunks: int, accumulate: int
):
    """Losses, logits, norms and the adapter are equal over three shuffled epochs.

    Rows of 16 tokens: a matrix product then gives a row the same bits wherever it stands in a
    batch, with the CPU kernels that this was found with.
    """
    settings = {"train": FROZEN, "chunks": chunks, "seed": 3}
    with llama.connect(**settings) as plain:
        expected = trained(plain, accumulate=accumulate)
    with keeping.connect(**settings, send_once=True) as split:
        bottom_rows = attention_calls(split)
        found = trained(split, accumulate=accumulate)
        once = split.by_rows.once

    assert equal(expected, found)
    assert sum(bottom_rows) == ROWS
    assert (once.rows_sent, once.rows_named) == (ROWS, ROWS * (EPOCHS - 1))


def test_rows_of_an_odd_width_are_the_same_to_rounding(llama: Site, keeping: Site):
    """At 11 tokens a row's own bits depend on its place in the batch, split or not."""
    with llama.connect(train=FROZEN, seed=3) as plain:
        expected = trained(plain, tokens=11)
    with keeping.connect(train=FROZEN, seed=3, send_once=True) as split:
        found = trained(split, tokens=11)

    # Rounding of 3e-6 in an activation, over nine steps of Adam at a learning rate of 1e-2.
    torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)


def test_batches_that_stay_together_are_equal_at_any_width(llama: Site, keeping: Site):
    """Epochs that shuffle whole batches have the same bits."""
    runs = []
    for site, settings in ((llama, {}), (keeping, {"send_once": True})):
        with site.connect(train=FROZEN, seed=3, **settings) as split:
            loop = Loop.over(split)
            seen = [loop.step(batch_of(number)) for number in (0, 1, 2, 1, 0, 2, 2, 1, 0)]
            runs.append([*seen, adapter_of(split)])

    assert equal(*runs)


def test_a_row_is_named_by_64_bytes_at_most(keeping: Site):
    """Epochs two and three send no activation, no mask, and less than 64 bytes for each row."""
    with keeping.connect(train=FROZEN, send_once=True) as split:
        widths: list[int] = []
        put = split.connection._put

        def watched(head: Any, parts: Any, pending: Any) -> Any:
            if head.WhichOneof("verb") == "forward" and not head.tensors:
                bare = type(head)()
                bare.CopyFrom(head)
                del bare.forward.rows[:]
                widths.append((head.ByteSize() - bare.ByteSize()) // len(head.forward.rows))
            return put(head, parts, pending)

        split.connection._put = watched
        trained(split)
        sent = split.by_rows.once.rows_sent

    assert sent == ROWS
    assert len(widths) == (EPOCHS - 1) * ROWS // BATCH
    assert max(widths) <= 64


def test_no_gradient_comes_down(keeping: Site):
    """A reply to a backward has the norms and no tensor of the activations' shape."""
    with keeping.connect(train=FROZEN, send_once=True) as split:
        asked: list[bool] = []
        forward = split.remote_trunk.link.forward

        def watched(smashed_BTD: Tensor, question: Any) -> Any:
            asked.append(question.wants_gradient)
            return forward(smashed_BTD, question)

        split.remote_trunk.link.forward = watched
        split.enable_input_require_grads()  # as trainers do under gradient checkpointing
        trained(split)

    assert asked
    assert not any(asked)


def test_known_and_new_rows_mix_in_a_batch(llama: Site, keeping: Site):
    """A batch of rows that were sent and rows that were not is put together in its order."""
    data = batch_of(1, rows=6)
    batches = [{k: v[rows] for k, v in data.items()} for rows in ([0, 3], [5, 0, 2, 3], [4, 1, 5])]
    runs = []
    for site, settings in ((llama, {}), (keeping, {"send_once": True})):
        with site.connect(train=FROZEN, **settings) as split:
            loop = Loop.over(split)
            runs.append([loop.step(batch) for batch in batches])
            once = split.by_rows and split.by_rows.once

    # A product of fewer rows may round otherwise; here it does not by more than this.
    for expected, found in zip(*runs, strict=True):
        torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-6)
    assert (once.rows_sent, once.rows_named) == (6, 3)


def test_rows_are_told_apart_by_all_that_decides_them(keeping: Site):
    """Another mask, width or position makes another row; other labels do not."""
    one = {k: v[:1] for k, v in batch_of(1).items()}
    longer = {k: torch.nn.functional.pad(v, (0, 2)) for k, v in one.items()}
    masked = {**one, "attention_mask": one["attention_mask"].clone()}
    masked["attention_mask"][0, -1] = 0
    moved = {**one, "position_ids": torch.arange(1, 12)[None]}
    relabelled = {**one, "labels": one["labels"].roll(1, 1)}
    with keeping.connect(train=FROZEN, send_once=True) as split, torch.no_grad():
        sent = []
        for batch in (one, relabelled, longer, masked, moved, one):
            split(**batch)
            sent.append(split.by_rows.once.rows_sent)

    assert sent == [1, 1, 2, 3, 4, 4]


def test_autocast_makes_other_rows(keeping: Site):
    """Activations under bfloat16 autocast are not taken for those without."""
    with keeping.connect(train=FROZEN, send_once=True) as split, torch.no_grad():
        split(**batch_of(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            split(**batch_of(1))
        sent = split.by_rows.once.rows_sent

    assert sent == 8


def test_generation_goes_on_between_epochs(llama: Site, keeping: Site):
    """`generate` fills the bottom's own cache, known rows or not, and gives the same tokens."""
    prompt = {k: v[:1] for k, v in batch_of(5).items() if k != "labels"}
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with llama.connect(train=FROZEN) as plain:
        expected = plain.eval().generate(**prompt, **asked)
    with keeping.connect(train=FROZEN, send_once=True) as split, torch.no_grad():
        split.eval()(**prompt, use_cache=False)
        found = split.generate(**prompt, **asked)

    assert torch.equal(expected, found)


def test_a_trainer_whose_rows_do_not_last_is_told(keeping: Site, tmp_path: Path, caplog: Any):
    """Fresh noise on the embedding is refused; batches without padding save nothing, says a log."""
    with keeping.connect(train=FROZEN, send_once=True) as split:
        with pytest.raises(ConfigError, match="neftune_noise_alpha draws fresh noise"):
            trainer_of(split, tmp_path, neftune_noise_alpha=5.0)
        trainer_of(split, tmp_path, padding_free=True, max_length=None)

    assert "split_send_once saves nothing" in caplog.text


def test_rows_may_be_sent_ahead(llama: Site, keeping: Site):
    """After `send_ahead` of a whole epoch the run names rows only, and ends the same."""
    with llama.connect(train=FROZEN) as plain:
        expected = trained(plain)
    with keeping.connect(train=FROZEN, send_once=True) as split:
        went = [split.send_ahead(epochs_of()[0]), split.send_ahead(epochs_of()[1])]
        bottom_rows = attention_calls(split)
        found = trained(split)

    assert went == [ROWS, 0]
    assert bottom_rows == []
    assert equal(expected, found)


@pytest.fixture
def learn_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learn statics from the first batch."""
    monkeypatch.setattr("cutlayer.client.calibration._TOKENS_FOR_A_MEAN", 60)
    monkeypatch.setattr("cutlayer.client.calibration._TOKENS_A_COORDINATE", 1)


@pytest.mark.parametrize("codec", ["bf16", "rotated4", "klt2"])
@pytest.mark.usefixtures("learn_early")
def test_what_is_kept_is_what_was_encoded(llama: Site, keeping: Site, codec: Any):
    """With a codec the server goes on from the very bytes that it got, also with statics."""
    if codec == "klt2":
        codec = {"activations_up": "klt2", "activations_down": "rotated4", "gradients_up": "int8"}
    settings = {"train": FROZEN, "codec": codec}
    with llama.connect(**settings) as plain:
        expected = trained(plain)
    with keeping.connect(**settings, send_once=True) as split:
        assert equal(expected, trained(split))


@pytest.mark.usefixtures("learn_early")
@pytest.mark.parametrize("are_statics_there", [True, False])
def test_rows_with_statics_are_read_as_they_were_written(
    keeping: Site, tmp_path: Path, are_statics_there: bool
):
    """A resumed run names rows only if it has what they were written with; else they go anew."""
    folder, batches = tmp_path / "once", epochs_of()[0]
    settings = {"train": FROZEN, "codec": "rotated4", "send_once": folder, "run": "statics"}
    reached: list[list[Tensor]] = []
    counts = []
    for epochs in (2, 1):
        split = keeping.connect(**settings)
        trunk = keeping.server.sessions.in_memory()[-1].trunk  # type: ignore[union-attr]
        reached.append(seen := [])
        forward = trunk.forward

        def seen_forward(
            *args: Any, _forward: Any = forward, _seen: Any = seen, **more: Any
        ) -> Any:
            _seen.append(args[1].detach().clone())
            return _forward(*args, **more)

        trunk.forward = seen_forward
        with torch.no_grad():
            for batch in batches * epochs:
                split(**batch, use_cache=False)
        counts.append(split.by_rows.once.counts())
        split.close(keep_rows=True)
        for path in folder.glob("statics-*"):
            if not are_statics_there:
                path.unlink()

    last = len(batches)
    assert counts[0]["sent"] == ROWS + BATCH  # those of the first batch once more, with statics
    if are_statics_there:
        assert counts[1]["sent"] == 0
        assert equal(reached[0][-last:], reached[1])
    else:
        assert counts[1]["sent"] == ROWS - BATCH  # the first batch is there as it went without
        assert equal(reached[0][:1], reached[1][:1])


def test_trl_trains_the_same(llama: Site, keeping: Site, tmp_path: Path):
    """Under SFTTrainer, evaluations included, losses and adapter are equal."""
    runs = []
    words = {"eval_strategy": "steps", "eval_steps": 7, "pad_to_multiple_of": 64}
    for site, settings in ((llama, {}), (keeping, {"send_once": True})):
        with site.connect(train=FROZEN, **settings) as split:
            trainer = trainer_of(split, tmp_path / "out", **words)
            trainer.train()
            losses = [entry.get("loss", entry.get("eval_loss")) for entry in _logged(trainer)]
            runs.append((losses, adapter_of(split)))
            once = split.by_rows and split.by_rows.once

    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    # 20 steps of 4 rows over 48, and three evaluations of the same 6.
    assert (once.rows_sent, once.rows_named) == (48 + 6, 80 - 48 + 2 * 6)


def test_the_coming_batch_is_sent_while_the_trunk_computes(
    llama: Site, keeping: Site, tmp_path: Path
):
    """In chunks, a trainer's next batch goes up before it is asked for; the run is the same."""
    runs = []
    words = {
        "pad_to_multiple_of": 64,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    for site, settings in ((llama, {}), (keeping, {"send_once": True})):
        with site.connect(train=FROZEN, chunks=2, **settings) as split:
            trainer = trainer_of(split, tmp_path / "out", **words)
            trainer.train()
            runs.append(adapter_of(split))
            once, went_ahead = split.by_rows and split.by_rows.once, split.ahead.used

    assert equal(*runs)
    assert once.rows_sent == 48
    assert went_ahead >= 10


def _logged(trainer: Any) -> list[dict[str, float]]:
    return [e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a bottom that trains": ({"train": ("bottom", "trunk", "top")}, "needs a frozen bottom"),
    "noise at the cut": (
        {"train": FROZEN, "defenses": [defense_of("gaussian", nsr=0.1)]},
        "draws fresh noise",
    ),
    "noise at the embedding": (
        {"train": FROZEN, "defenses": [defense_of("metric_dp_embed", eta=10.0)]},
        "draws fresh noise",
    ),
    "dropout in the bottom": ({"train": FROZEN, "attention_dropout": 0.1}, "attention_dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_the_same_each_time_is_refused(keeping: Site, name: str):
    """In one sentence, with what to do, and no session is left."""
    settings, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        keeping.connect(**{"peft_config": lora(), "send_once": True, **settings})

    assert keeping.server.sessions.in_memory() == []


def test_a_bottom_that_draws_is_refused_whatever_it_draws_for(
    folder_of: Callable[..., Path], certs: Path, tmp_path: Path
):
    """PhiMoE picks its experts at random in training, and has no number that says so."""
    site = site_of(folder_of("phimoe"), certs, tmp_path, row_ttl_s=1000.0)
    settings = {"train": FROZEN, "peft_config": lora(target_modules=["q_proj"])}
    with pytest.raises(ConfigError, match="draws random numbers in training"):
        site.connect(send_once=True, **settings)
    site.server.stop(0.5)


def test_a_server_that_keeps_no_rows_says_so(llama: Site):
    """What the server offers is known before anything is sent."""
    with pytest.raises(Refused, match="--send_once_ttl_s"):
        llama.connect(train=FROZEN, send_once=True)


def test_the_transcript_says_what_was_named(keeping: Site, tmp_path: Path):
    """The audit sees the activations that the server has, and that they had left before."""
    writer = TranscriptWriter(tmp_path / "t", {"model": "tiny"}, sequences=100)
    batch = batch_of(1)
    with keeping.connect(train=FROZEN, send_once=True, transcript=writer) as split:
        loop = Loop.over(split)
        for _ in range(2):
            loop.step(batch)
    _facts, departures = read_transcript(tmp_path / "t")
    first, second = departures

    assert torch.equal(first.smashed_BTD, second.smashed_BTD)
    assert first.referenced == ()
    assert second.referenced == (0, 1, 2, 3)
    assert second.gradient_BTD is not None


def test_any_family_knows_its_bottom(folder_of: Callable[..., Path], certs: Path, tmp_path: Path):
    """GPT-2's dropout behind the embedding is found; without it, its rows are sent once."""
    folder = folder_of("gpt2")
    site = site_of(folder, certs, tmp_path, row_ttl_s=1000.0)
    settings = {"train": FROZEN, "send_once": True}
    off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    with pytest.raises(ConfigError, match=r"transformer\.drop of the bottom has p"):
        site.connect(**settings, **{**off, "embd_pdrop": 0.1})
    with site.connect(train=FROZEN, **off) as plain:
        expected = trained(plain)
    with site.connect(**settings, **off) as split:
        found = trained(split)
        sent = split.by_rows.once.rows_sent
    site.server.stop(0.5)

    assert sent == ROWS
    assert equal(expected, found)
