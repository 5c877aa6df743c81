"""Who comes in: tokens, certificates, and what happens when they are taken away."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from cutlayer.cli.config import connect_settings, read_run
from cutlayer.cli.main import main
from cutlayer.client.address import Address
from cutlayer.errors import ConfigError, Unauthorized
from cutlayer.server import tenants
from cutlayer.server.database import Journal
from cutlayer.server.tenants import Register
from cutlayer.wire import cutlayer_pb2 as pb
from tests.cli.test_by_hand import write_run
from tests.site import Loop, Site, batch_of, site_of


@pytest.fixture
def register(tmp_path: Path) -> Any:
    """An empty register of a journal of its own."""
    journal = Journal(tmp_path)
    made = Register(journal)
    yield made
    made.close()
    journal.close()


def elsewhere(state_dir: Path) -> Register:
    """Return the same register as another process would open it."""
    return Register(Journal(state_dir))


# ---------------------------------------------------------------------- the register


def test_a_token_is_kept_as_a_hash_only(register: Register, tmp_path: Path):
    """No file of the journal holds the token, and the token finds its tenant."""
    token = register.add("ward-a")

    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert token.encode() not in written
    assert token.removeprefix(tenants.TOKEN_PREFIX).encode() not in written
    assert register.holder_of(token).name == "ward-a"


def test_only_the_whole_token_is_a_token(register: Register):
    """A prefix, another case, an empty word and the hash itself let nobody in."""
    token = register.add("ward-a")
    hashed = register.get("ward-a").token_hash.hex()

    for wrong in ("", token[:-1], token + "A", token.lower(), hashed, "ward-a"):
        assert register.holder_of(wrong) is None


def test_every_tenant_is_compared_with(register: Register, monkeypatch: pytest.MonkeyPatch):
    """The first tenant's token, the last one's and nobody's take the same number of comparisons."""
    tokens = [register.add(f"ward-{i}") for i in range(5)]
    compared: list[int] = []
    real = tenants.hmac.compare_digest
    monkeypatch.setattr(
        tenants.hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b)
    )

    counts = []
    for token in (tokens[0], tokens[-1], "cutlayer_nobody"):
        compared.clear()
        register.holder_of(token)
        counts.append(len(compared))

    assert counts == [10, 10, 10]


def test_a_rotated_token_works_on_only_as_long_as_was_said(register: Register):
    """Without an overlap the old token stops at once; with one both work; a revoked one never."""
    first = register.add("ward-a")
    second = register.rotate("ward-a")
    third = register.rotate("ward-a", overlap_s=1000.0)

    assert register.holder_of(first) is None
    assert register.holder_of(second).name == register.holder_of(third).name == "ward-a"
    register.revoke("ward-a")
    assert register.holder_of(third) is None
    fourth = register.rotate("ward-a", overlap_s=1000.0)
    assert [register.holder_of(token) is None for token in (second, third, fourth)] == [1, 1, 0]


def test_a_register_sees_what_another_process_wrote(register: Register, tmp_path: Path):
    """A tenant added and revoked through another connection is known, and not, within a second."""
    other = elsewhere(tmp_path)
    token = other.add("ward-a")

    assert within_a_second(lambda: register.holder_of(token) is not None)
    other.revoke("ward-a")
    assert within_a_second(lambda: register.holder_of(token) is None)
    other.close()


def within_a_second(holds: Any) -> bool:
    """Say whether something comes true within a second."""
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        if holds():
            return True
        time.sleep(0.02)
    return bool(holds())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["add", "../x"], "no plain name"),
        (["add", "journal.sqlite"], "no plain name"),
        (["add", "ward-a"], "there already"),
        (["rotate", "ward-x"], "no tenant 'ward-x'"),
    ],
)
def test_bad_names_end_in_one_sentence(
    words: list[str],
    told: str,
    register: Register,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """`cutlayer tenants` with a name that cannot be says so and changes nothing."""
    register.add("ward-a")

    assert main(["tenants", *words, "--state_dir", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
    assert [tenant.name for tenant in register.tenants()] == ["ward-a"]


# ---------------------------------------------------------------------- at a server's door


@pytest.fixture(scope="module")
def guarded(folder_of: Any, certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server that asks for a token."""
    state_dir = tmp_path_factory.mktemp("guarded")
    site = site_of(folder_of("llama"), certs, state_dir, auth="token")
    yield site
    site.server.stop(grace_s=0.5)


def refusal(site: Site, **settings: Any) -> str:
    """Return what a connection that must be refused as unauthorised is told."""
    with pytest.raises(Unauthorized) as caught:
        site.connect(**settings)
    return str(caught.value)


def test_no_one_without_a_valid_token_learns_anything(guarded: Site):
    """No token, a made-up one, a revoked one and a replaced one are refused in the same words."""
    register = guarded.server.gate.register
    revoked, replaced = register.add("gone"), register.add("changed")
    register.revoke("gone")
    register.rotate("changed")

    told = {refusal(guarded, token=token) for token in (None, "cutlayer_x", revoked, replaced)}

    assert len(told) == 1
    assert "split_token_file" in told.pop()


def test_a_token_makes_the_tenant(guarded: Site, tmp_path: Path):
    """With a token, from its file, a run trains under the tenant's name."""
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(guarded.server.gate.register.add("ward-t") + "\n")

    with guarded.connect(token_file=token_file, run="mine") as model:
        Loop.over(model).step(batch_of(1))
        runs = [session.run for session in guarded.server.sessions.in_memory("ward-t")]

    assert runs == ["mine"]


def test_a_revoked_token_stops_an_open_stream(guarded: Site):
    """Revoked by another process, a token's run is told so within a second, in its open stream."""
    token = guarded.server.gate.register.add("ward-r")
    model = guarded.connect(token=token)
    loop = Loop.over(model)
    loop.step(batch_of(1))
    other = elsewhere(guarded.server.gate.register._journal.path.parent)

    other.revoke("ward-r")
    started_s = time.monotonic()
    while time.monotonic() - started_s < 1.0:
        try:
            loop.step(batch_of(1))
        except Unauthorized:
            break
    else:
        pytest.fail("the stream still worked a second after its token was revoked")

    assert refusal(guarded, token=token)
    other.close()


def test_another_tenants_session_is_told_like_an_unknown_one(guarded: Site):
    """Naming another tenant's session, a made-up one or a closed one gives the same words."""
    register = guarded.server.gate.register
    mine, theirs = register.add("ward-m"), register.add("ward-o")
    with guarded.connect(token=theirs) as model:
        open_one = model.connection.session
        told = {closing(guarded, mine, session) for session in (open_one, "made-up", "")}
    told.add(closing(guarded, mine, open_one))

    assert len(told) == 1


def closing(site: Site, token: str, session: str) -> str:
    """Return what a tenant is told that closes a session which is not its own."""
    address = Address.of(site.address, ca=site.certs / "ca.pem", token=token)
    with address.open_channel() as channel:
        call = channel.unary_unary(
            "/cutlayer.v1.Trunk/CloseSession",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=pb.CloseSessionReply.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(pb.CloseSessionRequest(session=session), timeout=10)
    return str((caught.value.code(), caught.value.details()))


def test_with_both_the_token_must_be_the_certificates(folder_of: Any, certs: Path, tmp_path: Path):
    """With `auth both`, a token opens only together with its own tenant's certificate."""
    ca = certs / "ca.pem"
    site = site_of(folder_of("llama"), certs, tmp_path, auth="both", client_ca=ca)
    register = site.server.gate.register
    a, b = register.add("ward-a"), register.add("ward-b")
    mine = {"cert": certs / "ward-a.pem", "key": certs / "ward-a.key"}

    site.connect(token=a, **mine).close()
    refusal(site, token=b, **mine)
    refusal(site, **mine)
    site.server.stop(grace_s=0.2)


def test_a_revoked_name_keeps_its_certificate_out(folder_of: Any, certs: Path, tmp_path: Path):
    """With certificates alone, a tenant that was revoked is refused, and the others are not."""
    ca = certs / "ca.pem"
    site = site_of(folder_of("llama"), certs, tmp_path, auth="tls", client_ca=ca)
    site.server.gate.register.revoke("ward-a")

    site.connect(cert=certs / "ward-b.pem", key=certs / "ward-b.key").close()
    refusal(site, cert=certs / "ward-a.pem", key=certs / "ward-a.key")
    site.server.stop(grace_s=0.2)


# ---------------------------------------------------------------------- the client's secrets


def test_a_token_is_never_sent_in_plaintext(guarded: Site):
    """A token together with `split_plaintext` is refused before a byte is sent."""
    with pytest.raises(ConfigError, match="over TLS only"):
        guarded.connect(token="cutlayer_x", plaintext=True)


def test_a_token_comes_from_a_file_or_the_environment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`CUTLAYER_TOKEN` and `split_token_file` reach the client; no key or flag holds a token."""
    path = write_run(tmp_path, tmp_path, 7443, split_token_file="token")
    assert connect_settings(read_run(path, {}))["token_file"] == "token"
    monkeypatch.setenv("CUTLAYER_TOKEN", "cutlayer_x")

    assert connect_settings(read_run(path, {}))["token"] == "cutlayer_x"
    with pytest.raises(ConfigError, match="split_token is unknown"):
        read_run(path, {"split_token": "cutlayer_x"})
    assert "cutlayer_x" not in repr(Address.of("h:1", token="cutlayer_x"))


@pytest.mark.parametrize("secret", ["key", "token_file"])
def test_a_secret_that_others_can_read_is_refused(secret: str, guarded: Site, tmp_path: Path):
    """The client's private key and its token's file must be its own account's alone."""
    (tmp_path / "token").write_text("cutlayer_x")
    (tmp_path / "key").write_bytes((guarded.certs / "ward-a.key").read_bytes())
    for name in ("token", "key"):
        (tmp_path / name).chmod(0o640)
    given: dict[str, Any] = {"token_file": tmp_path / "token"}
    if secret == "key":
        given = {"cert": guarded.certs / "ward-a.pem", "key": tmp_path / "key"}

    with pytest.raises(ConfigError, match="can be read by others: run 'chmod 600"):
        guarded.connect(**given)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--auth", "token", "--plaintext"], "needs TLS"),
        (["--auth", "token", "--mutual_tls", "--certs", "x"], "takes no client certificates"),
        (["--auth", "tls", "--tls_cert", "x", "--tls_key", "y"], "needs an authority"),
    ],
)
def test_flags_that_contradict_are_refused(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    """`cutlayer serve` says which flags of authentication do not go together."""
    words = ["--model_name_or_path", "x", "--split_bottom_layers", "1", "--split_top_layers", "1"]

    assert main(["serve", *words, *flags]) == 2
    assert told in capsys.readouterr().err
