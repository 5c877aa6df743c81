"""The profile `attested`: a server process that must prove what it is before anything is sent."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.certs import issue
from cutlayer.cli.main import main
from cutlayer.client.address import Address
from cutlayer.privacy.attestation import new_nonce
from cutlayer.wire import cutlayer_pb2 as pb
from tests.cli.test_by_hand import one_sentence, saved_tiny, write_rows, write_run
from tests.site import ServerProcess
from tests.tokens import dataset


@dataclass
class Relay:
    """Stands between client and server, and keeps what goes up.

    With a certificate of its own it ends TLS, reads everything, and opens TLS to the server anew.
    """

    port_behind: int
    tls: Path | None = None
    seen: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> Relay:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self.port_behind))
            if self.tls is not None:
                ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                ours.load_cert_chain(self.tls, self.tls.with_suffix(".key"))
                theirs = ssl._create_unverified_context()
                for context in (ours, theirs):
                    context.set_alpn_protocols(["h2"])
                server = theirs.wrap_socket(server)
                client = ours.wrap_socket(client, server_side=True)
            self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        # By one thread: a TLS socket is not made for one that reads while another one writes.
        other = {client: server, server: client}
        try:
            while True:
                buffered = [s for s in other if isinstance(s, ssl.SSLSocket) and s.pending()]
                for source in buffered or select.select([*other], [], [], 30)[0]:
                    source.settimeout(0.02)
                    try:
                        data = source.recv(65536)
                    except TimeoutError:  # a record without data, such as a session ticket
                        continue
                    if not data:
                        return
                    if source is client:
                        self.seen += data
                    other[source].settimeout(10)
                    other[source].sendall(data)
        finally:
            for end in other:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@dataclass
class Ward:
    """A server process with a software attester, and all that its client needs."""

    folder: Path
    certs: Path
    model: Path
    port: int

    def claim(self, **changes: Any) -> None:
        """Have the server's attester claim what the policy asks for, but for these."""
        good = json.loads((self.certs / "attester.good").read_text())
        told = changes if "replay" in changes else good | changes
        (self.certs / "attester.json").write_text(json.dumps(told))

    def config(self, folder: Path, port: int | None = None, **settings: Any) -> str:
        """Write a run's YAML."""
        write_rows(folder, [{"text": text} for text in dataset(8)["text"]])
        asked = {
            "split_ca": str(self.certs / "ca.pem"),
            "split_cert": None,
            "split_key": None,
            "split_privacy_profile": "attested",
            "split_attestation_policy": str(self.certs / "policy.json"),
            **settings,
        }
        return str(write_run(folder, self.model, port or self.port, **asked))


@pytest.fixture(scope="module")
def ward(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    """`cutlayer certs init`, `cutlayer certs attester` and `cutlayer serve`, each as it is used."""
    folder = tmp_path_factory.mktemp("attested")
    certs = folder / "certs"
    assert main(["certs", "init", "--dir", str(certs)]) == 0
    assert main(["certs", "attester", "--dir", str(certs)]) == 0
    issue(certs, "server-b", hosts=["127.0.0.1"], server=True)
    (certs / "attester.good").write_text((certs / "attester.json").read_text())
    model = saved_tiny(folder_of, folder, "llama")
    flags = {"software_evidence_proving_no_hardware": certs / "attester.json"}
    with ServerProcess(model, certs, folder / "state", **flags) as server:
        yield Ward(folder, certs, model, server.port)


def recorded(ward: Ward) -> str:
    """Return the name of a file with evidence that the good server gave to an older nonce."""
    ward.claim()
    address = Address(f"127.0.0.1:{ward.port}", ca=ward.certs / "ca.pem")
    with address.open_channel() as channel:
        ask = channel.unary_unary("/cutlayer.v1.Trunk/Attest")
        reply = pb.AttestReply.FromString(
            ask(pb.AttestRequest(nonce=new_nonce()).SerializeToString())
        )
    (ward.certs / "recorded").write_bytes(reply.evidence)
    return "recorded"


def test_a_server_that_proves_itself_is_trained_with(ward: Ward, tmp_path: Path, capsys: Any):
    """With good evidence a run trains, and its card and its words say what signed it."""
    ward.claim()
    with Relay(ward.port) as relay:
        assert main(["train", "--config", ward.config(tmp_path, relay.port)]) == 0

    assert len(relay.seen) > 20_000
    assert "no hardware stands behind it" in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "software signed it and no hardware stands behind it" in card


VECTORS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong nonce": ({"replay": None}, "made for another nonce"),
    "wrong measurement": ({"measurements": {"cutlayer": "5e" * 48}}, "which is not allowed"),
    "expired": ({"tcb": {"cutlayer": "0.0.9"}}, "must be at least"),
    "debug": ({"debug": True}, "debugging is on"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_nothing_is_sent_to_a_server_that_does_not(
    name: str, ward: Ward, tmp_path: Path, capsys: Any
):
    """T-D7: each ends in one sentence and code 9, after two handshakes and a nonce at most."""
    changes, told = VECTORS[name]
    ward.claim(**({"replay": recorded(ward)} if "replay" in changes else changes))
    with Relay(ward.port) as relay:
        config = ward.config(tmp_path, relay.port)
        assert one_sentence(["train", "--config", config], capsys, told) == 9

    assert len(relay.seen) < 6_000
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_evidence_does_not_pass_through_another_ones_tls(ward: Ward, tmp_path: Path, capsys: Any):
    """A relay that ends TLS with a good certificate of its own is refused, and sees no token."""
    ward.claim()
    token = {"split_token_file": str(tmp_path / "token")}
    (tmp_path / "token").write_text("cutlayer_of-ward-a")
    (tmp_path / "token").chmod(0o600)
    with Relay(ward.port, tls=ward.certs / "server-b.pem") as relay:
        config = ward.config(tmp_path, relay.port, **token)
        assert one_sentence(["train", "--config", config], capsys, "another TLS certificate") == 9
        refused, relay.seen = bytes(relay.seen), bytearray()
        trusting = {"split_privacy_profile": "open", "split_attestation_policy": None}
        config = ward.config(tmp_path, relay.port, **token, **trusting)
        assert main(["doctor", "--config", config]) == 0

    assert b"/Attest" in refused
    assert not [word for word in (b"Describe", b"OpenSession", b"cutlayer_of") if word in refused]
    assert b"OpenSession" in relay.seen
    assert b"cutlayer_of-ward-a" in relay.seen


def test_a_server_without_evidence_is_sent_nothing(
    ward: Ward, llama: Any, tmp_path: Path, capsys: Any
):
    """One that offers none is refused by name; so is a policy that is asked of plaintext."""
    config = ward.config(tmp_path, split_ca=str(llama.certs / "ca.pem"), split_server=llama.address)
    assert one_sentence(["train", "--config", config], capsys, "gives no evidence") == 9

    config = ward.config(tmp_path, split_plaintext=True)
    assert one_sentence(["train", "--config", config], capsys, "leave out split_plaintext") == 2


def test_an_attester_that_cannot_be_loaded_is_named(
    ward: Ward, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """`cutlayer serve` refuses a file that is none, and `certs attester` an existing one."""
    (tmp_path / "attester.json").write_text('{"key": "attester.key"}')
    words = ["serve", "--model_name_or_path", str(ward.model), "--split_bottom_layers", "1"]
    words += ["--split_top_layers", "1", "--certs", str(ward.certs)]
    flag = "--software_evidence_proving_no_hardware"

    assert main([*words, flag, str(tmp_path / "attester.json")]) == 2
    assert "certs attester" in capsys.readouterr().err
    assert main([*words, flag, str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["certs", "attester", "--dir", str(ward.certs)]) == 2
    assert "exists already" in capsys.readouterr().err
