"""The lean head gives the loss and the gradients of the whole head, to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cutlayer.client.remote_trunk import Question
from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.privacy.transcript import TranscriptWriter, read_transcript
from cutlayer.wire import cutlayer_pb2 as pb
from tests.equivalence.test_trl import logged, trainer_of
from tests.site import Loop, Site, adapter_of, batch_of, lora, site_of

# What a product of fewer rows may round otherwise, in float32.
RTOL, ATOL = 1e-5, 1e-6
WATERFILL = {"gradients_up": "waterfill2"}


@pytest.fixture(scope="module")
def wide(folder_of: Any, certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server whose trunk reaches up to the norm."""
    site = site_of(folder_of("llama"), certs, tmp_path_factory.mktemp("wide"), top_layers=0)
    yield site
    site.server.stop(0)


def answers_only(index: int) -> dict[str, Tensor]:
    """Return a batch with a label on few tokens, and on none of its last row."""
    batch = batch_of(index)
    labels_BT = batch["labels"].clone()
    labels_BT[:, : labels_BT.shape[1] // 2] = -100
    labels_BT[-1] = -100
    return {**batch, "labels": labels_BT}


def close(a: Any, b: Any) -> bool:
    """Say whether two adapters are equal up to rounding."""
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name], rtol=1e-3, atol=2e-6) for name in a)


def gradients(split: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of one batch, the gradients here and the norms of those of the trunk."""
    split.train()
    split.zero_grad()
    loss = split(**batch).loss
    loss.backward()
    mine = [p.grad.clone() for p in split.parameters() if p.grad is not None]
    return loss.detach(), [*mine, split.connection.norms.clone()]


def all_that_moved(split: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """Run a batch; return the bytes that have crossed once all of it has."""
    gradients(split, batch)
    split.connection.request(pb.Head(zero_grad=pb.ZeroGrad())).wait()
    return vars(split.connection.traffic).copy()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("top_layers", [0, 1])
def test_loss_and_gradients_are_those_of_the_whole_head(wide: Site, chunks: int, top_layers: int):
    """Wherever the labels stand, with a layer above the cut and without, whole or in chunks."""
    cut = {"bottom_layers": 1, "top_layers": top_layers, "chunks": chunks}
    with wide.connect(**cut) as whole, wide.connect(lean_head=True, **cut) as lean:
        for batch in (answers_only(0), batch_of(1)):
            loss, expected = gradients(whole, batch)
            lean_loss, found = gradients(lean, batch)
            assert torch.allclose(loss, lean_loss, rtol=RTOL)
            assert len(expected) == len(found)
            for a, b in zip(expected, found, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=ATOL)


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},  # its head reads fields that a plain output has not
    "opt": {},  # its head passes over the base model
    "mixtral": {"target_modules": ["q_proj", "v_proj"]},  # its head reads the router's logits
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_heads_are_run_as_they_are(folder_of: Any, serve: Any, model_type: str):
    """Whatever a family's head calls and reads, loss and gradients are the whole head's."""
    site = serve(folder_of(model_type, layers=3), bottom_layers=1, top_layers=0)
    asked = {"bottom_layers": 1, "top_layers": 0}
    batch, seen = answers_only(0), []
    for is_lean in (False, True):
        config = lora(**FAMILIES[model_type])
        with site.connect(peft_config=config, lean_head=is_lean, **asked) as split:
            for module in split.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            seen.append(gradients(split, batch))
    (loss, expected), (lean_loss, found) = seen

    assert torch.allclose(loss, lean_loss, rtol=RTOL)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=ATOL)


def test_only_labelled_positions_cross_if_nothing_above_the_cut_mixes(wide: Site):
    """With no layer above, fewer bytes come down and go up, by the share of labels."""
    sent = {}
    for top_layers in (0, 1):
        cut = {"bottom_layers": 1, "top_layers": top_layers, "lean_head": True}
        batch = answers_only(0)
        with wide.connect(train=("trunk",), **cut) as split:
            before, after = (all_that_moved(split, batch) for _ in range(2))
            sent[top_layers] = {
                name: after[name] - before[name] for name in ("sent_bytes", "received_bytes")
            }
        labels = int((batch["labels"][:, 1:] != -100).sum())
    width, positions = split.config.hidden_size, batch["labels"].numel()
    less = 4 * width * (positions - labels)
    assert sent[1]["received_bytes"] - sent[0]["received_bytes"] == pytest.approx(less, rel=0.05)
    assert sent[1]["sent_bytes"] - sent[0]["sent_bytes"] == pytest.approx(less, rel=0.05)


@pytest.mark.parametrize("chunks", [1, 2])
def test_trls_trainer_does_not_notice(wide: Site, tmp_path: Path, chunks: int):
    """Losses, norms, accuracies and the adapter of a run are those of the whole head's run."""
    runs = []
    for lean in (False, True):
        with wide.connect(lean_head=lean, chunks=chunks, top_layers=0) as split:
            trainer = trainer_of(
                split, tmp_path / str(lean), max_steps=6, eval_strategy="steps", eval_steps=3
            )
            trainer.train()
            runs.append((trainer, adapter_of(split)))
    (whole, expected), (lean, found) = runs
    for a, b in zip(logged(whole), logged(lean), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    accuracies = [
        [e["mean_token_accuracy"] for e in t.state.log_history if "mean_token_accuracy" in e]
        for t in (whole, lean)
    ]
    assert accuracies[0] == accuracies[1]
    assert close(expected, found)


def test_a_plain_loop_trains_as_with_the_whole_head(wide: Site):
    """Losses of a plain loop with an optimizer, a batch without any label among them."""
    seen = []
    for lean in (False, True):
        with wide.connect(seed=3, lean_head=lean, chunks=2) as split:
            loop = Loop.over(split)
            for step in range(3):
                for batch in (answers_only(step), batch_of(step)):
                    (split(**batch).loss / 2).backward()
                loop.clip(split.parameters(), 0.05)
                loop.optimizer.step()
                loop.optimizer.zero_grad()
            seen.append(adapter_of(split))
    assert close(*seen)


def test_what_needs_logits_still_gets_them(wide: Site):
    """An evaluation, and a call without labels, return the logits of every position."""
    batch = batch_of(0)
    with wide.connect(lean_head=True) as split:
        split.eval()
        with torch.no_grad():
            expected = split(**batch).logits
        assert expected.shape[:2] == batch["input_ids"].shape
        split.train()
        del batch["labels"]
        assert split(**batch).logits.shape == expected.shape


def test_a_head_that_is_trained_is_not_lean(wide: Site):
    """Its gradient needs every logit: the option is refused, and not left out silently."""
    with pytest.raises(ConfigError, match="not trained"):
        wide.connect(lean_head=True, peft_config=lora(modules_to_save=["lm_head"]))


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("modernbert-decoder", {"train": ("bottom",)}, r"lm_head\.dense\.lora_A.*' is"),
        ("mixtral", {"output_router_logits": True, "peft_config": None}, "the router's"),
        ("trocr", {"peft_config": None}, "has another"),
    ],
)
def test_a_head_that_is_not_the_labels_alone_is_refused(
    folder_of: Any, serve: Any, model_type: str, settings: dict[str, Any], words: str
):
    """A layer of the head that is trained, or a loss of another kind, is never left out."""
    site = serve(folder_of(model_type, layers=3), bottom_layers=1, top_layers=0)
    with pytest.raises(ConfigError, match=words):
        site.connect(bottom_layers=1, top_layers=0, lean_head=True, **settings)


def test_a_transcript_knows_the_labels(wide: Site, tmp_path: Path):
    """The audit of a lean run compares with the truth, as of any other run."""
    writer = TranscriptWriter(tmp_path / "transcript", sequences=8, facts={})
    batch = answers_only(0)
    with wide.connect(lean_head=True, transcript=writer) as split:
        gradients(split, batch)
    kept = [load_file(file) for file in sorted((tmp_path / "transcript").glob("*.safetensors"))]
    labels = [tensors[n] for tensors in kept for n in tensors if "labels" in n]
    assert any(torch.equal(found, batch["labels"]) for found in labels)


def test_a_transcript_has_the_gradient_that_the_server_has(wide: Site, tmp_path: Path):
    """A codec that spends its bits by what leaves together has labelled positions alone to see."""
    writer = TranscriptWriter(tmp_path, sequences=8, facts={})
    reached: list[torch.Tensor] = []
    settings: dict[str, Any] = {"bottom_layers": 1, "top_layers": 0, "codec": WATERFILL}
    with wide.connect(lean_head=True, transcript=writer, **settings) as split:
        trunk = wide.server.sessions.in_memory()[-1].trunk  # type: ignore[union-attr]
        backward = trunk.backward

        def seen(number: int, grad_BTD: torch.Tensor, **kwargs: Any) -> Any:
            reached.append(grad_BTD.clone())
            return backward(number, grad_BTD, **kwargs)

        trunk.backward = seen
        gradients(split, answers_only(0))

    (departure,) = list(read_transcript(tmp_path)[1])
    labels_BT = departure.truth["labels"]
    has_loss_BT = torch.cat([labels_BT[:, 1:] != -100, torch.zeros(len(labels_BT), 1).bool()], 1)
    assert departure.gradient_BTD is not None
    assert torch.equal(departure.gradient_BTD[has_loss_BT], reached[0][0])


def test_a_classifier_has_no_lean_head(wide: Site):
    """Its head is small, and the option would say nothing."""
    with pytest.raises(ConfigError, match="lean_head"):
        wide.connect(task="sequence-classification", lean_head=True)


@pytest.mark.parametrize(
    "positions",
    [[-1], [10**6], [[0]], list(range(100)) * 10, [0.5]],
    ids=["below", "beyond", "in two dimensions", "too many", "not whole"],
)
def test_positions_that_are_none_are_refused(wide: Site, positions: list[Any]):
    """The server takes no position from outside of the batch."""
    with wide.connect() as split:
        smashed_BTD = torch.zeros(1, 4, split.config.hidden_size)
        question = Question(wanted_N=torch.tensor(positions))
        with pytest.raises(ProtocolError, match="position"):
            split.remote_trunk.link.forward(smashed_BTD, question)[1].wait()
