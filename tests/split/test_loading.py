"""Each side loads its part and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.errors import CannotCut, ConfigError, ModelError
from cutlayer.split.cut import Cut
from cutlayer.split.loading import (
    config_digest,
    layer_digests,
    load_ends,
    load_trunk,
    open_checkpoint,
    skeleton_of,
)

CUT = Cut(2, 5)


def parts_of(folder: Path, cut: Cut = CUT) -> tuple[dict, dict]:
    """Return the parameters of the client's and of the server's part by name."""
    checkpoint = open_checkpoint(str(folder))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")
    remote = RemoteTrunk(skeleton.anatomy, cut.lower)
    ends = load_ends(checkpoint, skeleton, cut, remote)
    trunk = load_trunk(checkpoint, skeleton, cut)
    return dict(ends.named_parameters()), dict(trunk.named_parameters())


def files_by_side(folder: Path, cut: Cut = CUT) -> tuple[set[str], set[str]]:
    """Return the shard files that only the client, and only the server, has to open."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    sides: tuple[set[str], set[str]] = (set(), set())
    for key, file in index.items():
        number = key.partition("layers.")[2].partition(".")[0]
        sides[bool(number) and int(number) in cut].add(file)
    ends, trunk = sides
    return ends - trunk, trunk - ends


@pytest.fixture
def copied(folder_of, tmp_path: Path) -> Path:
    """A copy of a sharded folder that a test may damage."""
    return Path(shutil.copytree(folder_of("llama", sharded=True), tmp_path / "model"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "mixtral", "opt", "bert"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("cut", [CUT, Cut(0, 6), Cut(1, 2)], ids=str)
def test_parts_are_disjoint_and_make_up_the_model(folder_of, model_type, sharded, cut):
    """No parameter is on both sides, and together they are the model's, bit for bit."""
    folder = folder_of(model_type, sharded=sharded)
    whole = AutoModelForCausalLM.from_pretrained(folder)

    ends, trunk = parts_of(folder, cut)

    expected = dict(whole.named_parameters())
    assert not ends.keys() & trunk.keys()
    assert expected.keys() == ends.keys() | trunk.keys()
    assert all(torch.equal(expected[name], p) for name, p in {**ends, **trunk}.items())


def test_client_never_opens_the_trunks_shards(copied: Path):
    """With the server's files gone the client's part still loads, and the other way round."""
    checkpoint = open_checkpoint(str(copied))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")
    only_ends, only_trunk = files_by_side(copied)
    assert only_ends
    assert only_trunk

    for file in only_trunk:
        (copied / file).unlink()
    ends = load_ends(checkpoint, skeleton, CUT, RemoteTrunk(skeleton.anatomy, CUT.lower))
    layer_digests(checkpoint, skeleton.anatomy, CUT, trunk=False)

    assert "model.layers.0.mlp.up_proj.weight" in dict(ends.named_parameters())


def test_server_never_opens_the_ends_shards(copied: Path):
    """With garbage in the client's files the server's part still loads."""
    checkpoint = open_checkpoint(str(copied))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")
    only_ends, _only_trunk = files_by_side(copied)

    for file in only_ends:
        (copied / file).write_bytes(b"no tensors")
    trunk = load_trunk(checkpoint, skeleton, CUT)
    layer_digests(checkpoint, skeleton.anatomy, CUT, trunk=True)

    assert {n.split(".")[2] for n, _ in trunk.named_parameters()} == {"2", "3", "4"}


def test_tied_embeddings_stay_tied_at_the_client(folder_of):
    """The head of a model with tied embeddings is the very parameter of its embedding."""
    folder = folder_of("gpt2")
    checkpoint = open_checkpoint(str(folder))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")

    ends = load_ends(checkpoint, skeleton, CUT, RemoteTrunk(skeleton.anatomy, CUT.lower))

    assert ends.config.tie_word_embeddings
    assert ends.get_output_embeddings().weight is ends.get_input_embeddings().weight


def test_missing_weights_are_named(copied: Path):
    """A checkpoint without one weight of this part is a ModelError that names it."""
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    name = "model.layers.3.mlp.up_proj.weight"
    file = copied / index["weight_map"].pop(name)
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({k: t for k, t in load_file(file).items() if k != name}, file, {"format": "pt"})
    checkpoint = open_checkpoint(str(copied))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")

    with pytest.raises(ModelError, match=r"lacks 1 weights .*layers\.3\.mlp\.up_proj\.weight"):
        load_trunk(checkpoint, skeleton, CUT)


def test_damaged_weights_of_this_part_are_a_model_error(copied: Path):
    """A file that is no safetensors file is a ModelError that says what to do."""
    _only_ends, only_trunk = files_by_side(copied)
    checkpoint = open_checkpoint(str(copied))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")
    for file in only_trunk:
        (copied / file).write_bytes(b"no tensors")

    with pytest.raises(ModelError, match="cannot be read"):
        load_trunk(checkpoint, skeleton, CUT)


def test_digests_agree_where_the_weights_do_and_differ_where_they_do_not(folder_of):
    """Both sides' digests of a layer are equal for one checkpoint and differ for another."""
    digests = []
    for seed in (0, 1):
        checkpoint = open_checkpoint(str(folder_of("llama", seed=seed)))
        anatomy = skeleton_of(checkpoint.config, "causal-lm").anatomy
        digests.append([layer_digests(checkpoint, anatomy, CUT, trunk=t) for t in (False, True)])

    (client, server), (other, _) = digests
    shared = client.keys() & server.keys()
    assert shared
    assert all(client[n] == server[n] for n in shared)
    assert all(client[n] != other[n] for n in shared)


def test_config_digest_sees_what_shapes_the_trunk_only(folder_of):
    """Token ids and labels may differ between the sides; a base of angles may not."""
    configs = [open_checkpoint(str(folder_of("llama"))).config for _ in range(3)]
    configs[1].pad_token_id, configs[1].num_labels = 5, 7
    configs[2].rms_norm_eps = 1e-3

    expected, same, other = map(config_digest, configs)

    assert expected == same
    assert expected != other


BAD_FOLDERS = {
    "no such folder": (lambda _f: None, "./nowhere", "does not exist"),
    "an empty folder": (lambda f: f.mkdir(), "", "is not a model"),
    "no weights": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "llama"}')),
        "",
        "is not a model",
    ),
    "an unknown type": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "lama"}')),
        "",
        "is not a model",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_is_no_model_is_a_model_error(tmp_path: Path, name: str):
    """What is no model is a ModelError of one sentence."""
    make, other, words = BAD_FOLDERS[name]
    make(tmp_path / "model")

    with pytest.raises(ModelError, match=words) as caught:
        open_checkpoint(other or str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_cut_without_a_trunk_is_refused():
    """A cut that leaves no layer to the trunk, or asks for a negative count, is CannotCut."""
    for bottom, top in ((3, 3), (6, 0), (7, 0), (-1, 2)):
        with pytest.raises(CannotCut, match="leave no trunk"):
            Cut.leaving(bottom_layers=bottom, top_layers=top, num_layers=6)


def test_an_attention_that_the_family_lacks_is_a_config_error(folder_of):
    """Asking for an attention implementation that a family has not is a ConfigError."""
    checkpoint = open_checkpoint(str(folder_of("gemma2")))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")

    with pytest.raises(ConfigError, match="attn_implementation"):
        load_trunk(checkpoint, skeleton, CUT, attn_implementation="sdpa")


def test_single_file_folder_has_every_key(folder_of):
    """The keys of a folder of one file are those of the file."""
    folder = folder_of("llama")

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == open_checkpoint(str(folder)).keys.keys()
