"""What goes wrong ends in a named error of one sentence, without a path of the server."""

from __future__ import annotations

import resource
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health, health_pb2_grpc
from peft import LoraConfig, PrefixTuningConfig
from transformers import AutoConfig

import cutlayer
from cutlayer import errors
from cutlayer.cli.certs import issue, make_authority
from cutlayer.errors import (
    BY_CODE,
    CannotCut,
    ConfigError,
    ConnectionFailed,
    CutlayerError,
    ModelError,
    NotFinite,
    ProtocolError,
    Refused,
    StorageError,
    TLSError,
)
from cutlayer.server.access import Limits
from cutlayer.split.cut import REFUSED
from cutlayer.wire import cutlayer_pb2 as pb
from tests.site import Loop, Site, adapter_of, batch_of, equal, lora, site_of


@contextmanager
def refused(site: Site, kind: type[CutlayerError], words: str) -> Iterator[None]:
    """Expect an error of exactly this class, in one sentence that names nothing of the server."""
    with pytest.raises(kind, match=words) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert "Traceback" not in message
    assert not message.endswith(".")
    assert str(site.server.sessions._store.root) not in message


# ---------------------------------------------------------------------- reaching the server


def test_nobody_listens(llama: Site):
    """A port at which nobody listens is ConnectionFailed and asks whether the server runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    with refused(llama, ConnectionFailed, "nothing listens at"):
        llama.connect(server=f"127.0.0.1:{port}")


def test_something_else_listens(llama: Site):
    """A port that speaks another protocol is ConnectionFailed and asks to check the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                    with caller:
                        caller.sendall(b"220 mail.example.org ESMTP ready\r\n")
                except OSError:
                    return

        threading.Thread(target=speak, daemon=True).start()
        with refused(llama, ConnectionFailed, "check the port"):
            llama.connect(server=f"127.0.0.1:{listener.getsockname()[1]}", connect_timeout_s=5)
        listener.shutdown(socket.SHUT_RDWR)


def test_another_grpc_service_listens(llama: Site):
    """A gRPC server of another service is ConnectionFailed and says that it is none of ours."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    with refused(llama, ConnectionFailed, "no cutlayer server"):
        llama.connect(server=f"127.0.0.1:{port}", plaintext=True)
    server.stop(0).wait()


def test_plaintext_to_a_tls_server(llama: Site):
    """Plaintext to a server of TLS is ConnectionFailed and says which side to change."""
    with refused(llama, ConnectionFailed, "not in plaintext"):
        llama.connect(plaintext=True)


def test_tls_to_a_plaintext_server(llama: Site, certs: Path, tmp_path: Path):
    """TLS to a server of plaintext is ConnectionFailed and says which side to change."""
    from cutlayer.server.app import make_server

    settings = {"bottom_layers": 1, "top_layers": 1, "host": "127.0.0.1", "port": 0}
    server = make_server(str(llama.folder), credentials=None, state_dir=tmp_path, **settings)

    with refused(llama, ConnectionFailed, "does not speak TLS"):
        llama.connect(server=f"127.0.0.1:{server.port}", connect_timeout_s=5)
    server.stop(0)


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":7443", "localhost:port", "h:99999"]
)
def test_an_address_that_is_none(llama: Site, address: str):
    """What is not host:port is a ConfigError."""
    with refused(llama, ConfigError, "write host:port"):
        llama.connect(server=address)


def test_a_host_without_an_address(llama: Site):
    """A host that no one knows is ConnectionFailed and names it."""
    with refused(llama, ConnectionFailed, r"host 'no-such-host\.invalid' has no address"):
        llama.connect(server="no-such-host.invalid:7443")


# ---------------------------------------------------------------------- certificates


def test_another_authority(llama: Site, tmp_path: Path):
    """A certificate of an authority that the client does not trust is TLSError."""
    make_authority(tmp_path)

    with refused(llama, TLSError, "not signed by the authority in split_ca"):
        llama.connect(ca=tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hosts": ["127.0.0.1"], "days": -1}, "has expired"),
        ({"hosts": ["gpu.example.org"]}, "for another"),
    ],
    ids=["expired", "for another host"],
)
def test_a_server_certificate_that_is_not_good(
    llama: Site, tmp_path: Path, settings: dict[str, Any], words: str
):
    """An expired certificate, or one for another host, is TLSError that says which."""
    make_authority(tmp_path)
    issue(tmp_path, "server", server=True, **settings)
    site = site_of(llama.folder, tmp_path, tmp_path / "state")

    with refused(site, TLSError, words):
        site.connect()
    site.server.stop(0)


def test_a_client_without_a_certificate(llama: Site, certs: Path, tmp_path: Path):
    """A server of mutual TLS turns a client without a certificate away, with TLSError."""
    site = site_of(llama.folder, certs, tmp_path / "state", client_ca=certs / "ca.pem")

    with refused(site, TLSError, "asks for a client certificate"):
        site.connect()
    with site.connect(cert=certs / "ward-a.pem", key=certs / "ward-a.key") as split:
        (session,) = site.server.sessions._open.values()
        assert session.tenant == "ward-a"
        assert equal(adapter_of(site.unsplit()), adapter_of(split))
    site.server.stop(0)


def test_a_session_is_its_tenants_alone(llama: Site, certs: Path, tmp_path: Path):
    """A tenant that knows another's session is told that there is none."""
    site = site_of(llama.folder, certs, tmp_path / "state", client_ca=certs / "ca.pem")
    mine = {"cert": certs / "ward-a.pem", "key": certs / "ward-a.key"}
    theirs = {"cert": certs / "ward-b.pem", "key": certs / "ward-b.key"}

    with site.connect(**mine) as split, site.connect(**theirs) as other:
        stolen = pb.CloseSessionRequest(session=split.connection.session)
        with refused(site, Refused, "no such session"):
            other.connection._ask("CloseSession", stolen, pb.CloseSessionReply, timeout_s=10)
        split(**batch_of(1))
    site.server.stop(0)


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_a_certificate_file_that_is_missing(llama: Site, certs: Path, name: str):
    """A file that is not there is a ConfigError that names its key."""
    given = {"cert": certs / "ward-a.pem", "key": certs / "ward-a.key", name: "nowhere.pem"}

    with refused(llama, ConfigError, f"split_{name} 'nowhere.pem' does not exist"):
        llama.connect(**given)


# ---------------------------------------------------------------------- what both must share


def test_other_weights(llama: Site, folder_of: Any):
    """A client with other weights is refused and told that the weights differ."""
    other = Site(folder_of("llama", seed=1), llama.certs, llama.server)

    with refused(llama, Refused, r"weights of layers \d.* differ"):
        other.connect()


def test_another_model(llama: Site, folder_of: Any):
    """A client with another model is told every difference at once."""
    other = Site(folder_of("qwen3", layers=5), llama.certs, llama.server)

    with refused(llama, Refused, r"model_type is 'qwen3' .*num_layers is '5'"):
        other.connect()


def test_a_trunk_wider_than_the_servers(llama: Site):
    """A cut that the server's does not cover is refused with both cuts and the flags."""
    with refused(llama, Refused, r"client's trunk is layers 0:6 and the server holds 1:5"):
        llama.connect(bottom_layers=0, top_layers=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' at the client and 'float32' at the server"),
        ({"attn_implementation": "eager"}, "attn_implementation is 'eager'"),
        ({"run": "../../etc"}, "run name .* is not plain"),
        ({"peft_config": lora(r=513)}, "rank 513 is not within 1 and 512"),
    ],
)
def test_settings_that_the_server_does_not_share(llama: Site, settings: dict, words: str):
    """Another dtype or attention, a run name with a path, a huge rank: each is refused."""
    with refused(llama, Refused, words):
        llama.connect(**settings)


def test_another_protocol(llama: Site, monkeypatch: pytest.MonkeyPatch):
    """A client of another protocol version is refused and told to install the same release."""
    monkeypatch.setattr("cutlayer.client.handshake.PROTOCOL", 99)

    with refused(llama, Refused, "protocol is '99' at the client .* same release"):
        llama.connect()


def test_a_server_full_of_streams_still_answers(
    llama: Site, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Who comes when each allowed session has its stream is told so, and may close and ask."""
    monkeypatch.setattr("cutlayer.server.app._CONTROL_CALLS", 1)
    site = site_of(llama.folder, certs, tmp_path / "state", limits=Limits(max_sessions=2))
    with site.connect() as one, site.connect() as other:
        for model in (one, other):
            model.connection.request(pb.Head(echo=pb.Echo())).wait()
        with pytest.raises(Refused, match="2 sessions are open"):
            site.connect(connect_timeout_s=5.0)
    site.server.stop(grace_s=0.5)


def test_a_server_that_is_full(llama: Site, certs: Path, tmp_path: Path):
    """One session more than the server allows is refused; a closed one makes room."""
    site = site_of(llama.folder, certs, tmp_path / "state", limits=Limits(max_sessions=1))

    with site.connect(), refused(site, Refused, "1 sessions are open"):
        site.connect()
    with site.connect():
        pass
    site.server.stop(0)


# ---------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "int3"}, "codec 'int3' is unknown"),
        ({"chunks": 0}, "chunks=0 must be a number of at least 1"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"task": "translation"}, "task 'translation' is unknown"),
        ({"train": ("head",)}, "name one or more of bottom, trunk, top"),
        ({"train": ()}, "name one or more of bottom, trunk, top"),
        ({"peft_config": LoraConfig(target_modules=["no_such"])}, "cannot be placed"),
        ({"peft_config": lora(bias="all")}, "bias='all'"),
        ({"peft_config": lora(init_lora_weights="pissa")}, "init_lora_weights='pissa'"),
        ({"peft_config": PrefixTuningConfig(num_virtual_tokens=3)}, "use a LoraConfig"),
    ],
)
def test_arguments_that_are_wrong(llama: Site, settings: dict, words: str):
    """A wrong argument is a ConfigError before anything is sent."""
    with refused(llama, ConfigError, words):
        llama.connect(**settings)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
def test_experts_in_one_tensor_take_no_lora(folder_of: Any):
    """Peft makes parameters of experts' names: the sentence says so, before a server is asked."""
    folder = folder_of("mixtral", layers=3)
    with pytest.raises(ConfigError, match="name the attention's modules"):
        cutlayer.connect(
            str(folder), server="localhost:1", bottom_layers=1, top_layers=0, peft_config=lora()
        )


@pytest.mark.parametrize(("bottom", "top"), [(3, 3), (6, 0), (-1, 1), (9, 9)])
def test_a_cut_out_of_range(llama: Site, bottom: int, top: int):
    """A cut that leaves no trunk is CannotCut with the number of layers."""
    with refused(llama, CannotCut, "leave no trunk in a model of 6 layers"):
        llama.connect(bottom_layers=bottom, top_layers=top)


def test_no_such_model(llama: Site):
    """A model folder that does not exist is a ModelError that names it."""
    with refused(llama, ModelError, "'./no/such/model' does not exist"):
        cutlayer.connect("./no/such/model", server=llama.address, bottom_layers=1, top_layers=1)


@pytest.mark.parametrize("model_type", ["mamba", "t5", "gemma4_text", "jamba"])
def test_a_family_that_cannot_be_cut(llama: Site, tmp_path: Path, model_type: str):
    """A family that cannot be cut is refused by name, before weights are looked for."""
    config = AutoConfig.for_model(model_type)
    config.save_pretrained(tmp_path)  # and no weights at all

    with refused(llama, CannotCut, f"models of type '{model_type}' cannot be cut"):
        cutlayer.connect(str(tmp_path), server=llama.address, bottom_layers=1, top_layers=1)


def test_reasons_of_refusal_are_sentences():
    """Every reason in the table of refused families reads on after a colon."""
    assert all(reason[0].islower() and not reason.endswith(".") for reason in REFUSED.values())


def test_every_error_has_a_code_and_an_exit_code():
    """Codes are unique, and exit codes are those that the tree in errors.py states."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(BY_CODE) == len(kinds) > 14
    stated = {"config": 2, "data": 3, "model": 4, "connection": 5, "refused": 6, "storage": 8}
    assert stated.items() <= {code: kind.exit_code for code, kind in BY_CODE.items()}.items()


# ---------------------------------------------------------------------- while training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_never_leave(llama: Site, value: float):
    """NaN or infinity in the smashed activations is NotFinite, and nothing is sent."""
    with llama.connect() as split:
        with torch.no_grad():
            split.get_input_embeddings().weight[30] = value
        batch = batch_of(1)
        batch["input_ids"][0, 0] = 30
        before = split.connection.traffic.sent_bytes

        with refused(llama, NotFinite, "nothing was sent"):
            split(**batch)

        assert split.connection.traffic.sent_bytes == before


def test_activations_that_are_not_finite_are_not_computed_with(llama: Site):
    """A client that sends NaN all the same is told NotFinite by the server."""
    with llama.connect() as split:
        smashed_BTD = torch.full((1, 2, 48), float("nan"))
        pending = split.connection.request(pb.Head(forward=pb.Forward()), {"smashed": smashed_BTD})

        with refused(llama, NotFinite, "nothing was computed"):
            pending.wait()


def test_a_loss_that_is_nan_stops_before_it_is_sent(llama: Site):
    """The backward of a NaN loss is NotFinite at the client, and the trunk has no gradient."""
    with llama.connect() as split:
        loss = split.train()(**batch_of(1)).loss * float("nan")

        with refused(llama, NotFinite, "the loss is NaN or infinite"):
            loss.backward()


BAD_REQUESTS = {
    "no verb": (pb.Head(), {}, "nothing that a client can ask for"),
    "a verb of the server": (pb.Head(done=pb.Done()), {}, "nothing that a client can ask for"),
    "no activations": (pb.Head(forward=pb.Forward()), {}, "activations of shape"),
    "activations of another width": (
        pb.Head(forward=pb.Forward()),
        {"smashed": torch.ones(1, 2, 47)},
        "activations of shape",
    ),
    "activations of no rows": (
        pb.Head(forward=pb.Forward()),
        {"smashed": torch.ones(0, 2, 48)},
        "activations of shape",
    ),
    "a tensor that nobody asked for": (
        pb.Head(forward=pb.Forward()),
        {"smashed": torch.ones(1, 2, 48), "labels": torch.ones(1, 2)},
        "came with the activations",
    ),
    "a backward without a forward": (
        pb.Head(backward=pb.Backward(forward_sequence=77)),
        {"gradient": torch.ones(1, 2, 48)},
        "no graph of forward 77",
    ),
    "a step of no number": (
        pb.Head(optim_step=pb.OptimStep(step=1, optimizer="AdamW", clip_factor=float("nan"))),
        {},
        "not finite",
    ),
    "autocast to an unknown dtype": (
        pb.Head(forward=pb.Forward(autocast="float32")),
        {"smashed": torch.ones(1, 2, 48)},
        "autocast to 'float32' is unknown",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_request_that_breaks_the_protocol(llama: Site, name: str):
    """A senseless request is a ProtocolError, and the session goes on."""
    head, tensors, words = BAD_REQUESTS[name]
    with llama.connect() as split:
        with refused(llama, ProtocolError, words):
            split.connection.request(pb.Head.FromString(head.SerializeToString()), tensors).wait()
        with torch.no_grad():
            split(**batch_of(1))


def test_a_gap_in_the_numbers(llama: Site):
    """A request that follows one that never came is a ProtocolError."""
    with llama.connect() as split:
        split.connection._sequence, split.connection._follows = 5, 5
        pending = split.connection.request(pb.Head(zero_grad=pb.ZeroGrad()))

        with refused(llama, ProtocolError, "request 6 says that it follows 5 and came after 0"):
            pending.wait()


def test_a_graph_serves_one_backward(llama: Site):
    """A second backward through the same forward is a named error."""
    with llama.connect() as split:
        loss = split.train()(**batch_of(1)).loss
        loss.backward(retain_graph=True)

        with pytest.raises(ProtocolError, match="a graph lives for one backward"):
            loss.backward()


def test_an_optimizer_that_the_server_lacks(llama: Site):
    """An optimizer outside the table is a ConfigError when it is attached."""
    with llama.connect() as split:
        trained = [p for p in split.parameters() if p.requires_grad]

        with refused(llama, ConfigError, "LBFGS cannot run at the server: choose one of"):
            cutlayer.attach(torch.optim.LBFGS(trained), split)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_the_client_cannot_know(llama: Site, name: str):
    """Hidden states and attentions of all layers are CannotCut: they are elsewhere."""
    with llama.connect() as split, refused(llama, CannotCut, f"{name}=True cannot be answered"):
        split(**batch_of(1), **{name: True})


def test_a_cache_that_was_copied(llama: Site):
    """A KV cache whose other half the server does not hold is CannotCut."""
    import copy

    with llama.connect() as split, torch.no_grad():
        ids_BT = batch_of(1)["input_ids"][:1]
        cache = split.eval()(input_ids=ids_BT, use_cache=True).past_key_values

        with refused(llama, CannotCut, "filled elsewhere or copied"):
            split(input_ids=ids_BT[:, :1], past_key_values=copy.deepcopy(cache))


def test_a_server_that_goes_away(llama: Site, certs: Path, tmp_path: Path):
    """A server that stays away for longer than the lease is ConnectionFailed, with what to do."""
    site = site_of(llama.folder, certs, tmp_path / "state")
    with site.connect(lease_s=1.0) as split:
        loop = Loop.over(split)
        loop.step(batch_of(1))
        site.server.stop(0)

        with refused(
            site, ConnectionFailed, "did not come back .* start the run again with --resume"
        ):
            for seed in range(3):
                loop.step(batch_of(seed))


def test_an_adapter_that_the_server_keeps(llama: Site, certs: Path, tmp_path: Path):
    """A server that keeps its half says so before training, and writes no half of it out."""
    site = site_of(llama.folder, certs, tmp_path / "state", keep_adapter=True)
    with site.connect() as split:
        assert split.keeps_adapter
        with refused(site, Refused, "keeps the trunk's half"):
            split.whole_adapter()
        split.save_pretrained(tmp_path / "half")
    site.server.stop(0)

    assert (tmp_path / "half" / "TRUNK_IS_AT_THE_SERVER").is_file()


# ---------------------------------------------------------------------- saving


@contextmanager
def full_disk() -> Iterator[None]:
    """While open, the system refuses to write files of more than 4 KiB, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_no_room_for_the_adapter(llama: Site, tmp_path: Path):
    """When the adapter cannot be written whole, what stood there before is untouched."""
    with llama.connect() as split:
        split.save_pretrained(tmp_path / "out")
        before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        Loop.over(split).step(batch_of(1))

        with full_disk(), refused(llama, StorageError, "nothing there was changed"):
            split.save_pretrained(tmp_path / "out")
        with full_disk(), refused(llama, StorageError, "could not be written"):
            split.save_pretrained(tmp_path / "new")

    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert list((tmp_path / "new").iterdir()) == []


def test_no_room_at_the_server(llama: Site):
    """A state that the server cannot write is StorageError, and the run goes on."""
    with llama.connect(run="no-room") as split:
        loop = Loop.over(split)
        loop.step(batch_of(1))
        save = pb.Head(save_state=pb.SaveState(step=1))

        with full_disk(), refused(llama, StorageError, "could not save step 1 of run 'no-room'"):
            split.connection.request(save).wait()
        loop.step(batch_of(2))

    assert llama.server.sessions._store.steps("default", "no-room") == []


def test_a_place_where_nothing_can_be_written(llama: Site, tmp_path: Path):
    """An output folder that is a file is StorageError that names it."""
    (tmp_path / "file").write_text("mine")

    with llama.connect() as split, refused(llama, StorageError, "could not be written to"):
        split.save_pretrained(tmp_path / "file")

    assert (tmp_path / "file").read_text() == "mine"


def test_a_state_that_the_server_does_not_hold(llama: Site):
    """Resuming at a step that the server has not kept is refused with what it holds."""
    with llama.connect(run="never-saved") as split:
        load = pb.Head(load_state=pb.LoadState(step=7))

        with refused(llama, Refused, "no state of run 'never-saved' at step 7: it holds none"):
            split.connection.request(load).wait()


def test_an_adapter_folder_that_is_none(llama: Site, tmp_path: Path):
    """Taking up a folder that is no adapter is a ModelError."""
    with llama.connect() as split, refused(llama, ModelError, "is no adapter folder"):
        split.load_adapter(tmp_path)


def test_an_adapter_of_another_rank(llama: Site, tmp_path: Path):
    """Taking up an adapter that does not fit is refused, and ours is as it was."""
    with llama.connect(peft_config=lora(r=5)) as split:
        split.save_pretrained(tmp_path / "other")

    with llama.connect() as split:
        before = adapter_of(split)
        with pytest.raises((Refused, RuntimeError)):
            split.load_adapter(tmp_path / "other")
        assert equal(before, adapter_of(split))
    shutil.rmtree(tmp_path / "other")
