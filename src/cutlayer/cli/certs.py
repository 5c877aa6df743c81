"""`cutlayer certs`: a small authority of one's own, and the certificates that it signs."""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import ConfigError, StorageError
from cutlayer.server.names import is_plain_name

__all__ = ["issue", "make_authority", "make_software_attester"]

CA_DAYS, LEAF_DAYS = 3650, 365

_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    what = parser.add_subparsers(dest="what", required=True, metavar="init|client|renew|attester")
    init = what.add_parser("init", help="make an authority, a server's and a client's certificate")
    init.add_argument("--dir", default="certs", help="where they go (default: certs)")
    init.add_argument("--host", action="append", default=[], help="a name or address of the server")
    init.add_argument("--client", default="client", help="the first client's name")
    client = what.add_parser("client", help="make one more client's certificate")
    client.add_argument("--dir", default="certs")
    client.add_argument("--name", required=True, help="the tenant's name")
    attester = what.add_parser(
        "attester", help="make a software attester for a server, and a policy that trusts it: tests"
    )
    attester.add_argument("--dir", default="certs")
    renew = what.add_parser("renew", help="make a new server certificate")
    renew.add_argument("--dir", default="certs")
    renew.add_argument("--host", action="append", default=[])


def run(args: argparse.Namespace) -> int:
    """Make what is asked for.

    Raises:
        ConfigError: If certificates would be overwritten, there is no authority, or a name cannot
            be one.
    """
    folder = Path(args.dir)
    hosts = [*dict.fromkeys([*getattr(args, "host", []), "localhost", "127.0.0.1"])]
    names = [
        name
        for name in (getattr(args, "client", None), getattr(args, "name", None))
        if name is not None
    ]
    _check(hosts, names)
    if args.what == "init":
        make_authority(folder)
        issue(folder, "server", hosts=hosts, server=True)
        issue(folder, args.client)
        print(
            f"{folder}/ca.pem            give it to every client\n"
            f"{folder}/ca.key            keep it off the server: it signs new clients\n"
            f"{folder}/server.pem, .key  for the server, valid for {', '.join(hosts)}\n"
            f"{folder}/{args.client}.pem, .key  for the client '{args.client}'"
        )
    elif args.what == "client":
        issue(folder, args.name)
        print(f"{folder}/{args.name}.pem, .key")
    elif args.what == "attester":
        make_software_attester(folder)
        print(
            f"{folder}/attester.json, .key  for --software_evidence_proving_no_hardware\n"
            f"{folder}/policy.json          for split_attestation_policy\n"
            "Software signs what it is told: this tries out the gate and proves nothing about "
            "hardware."
        )
    else:
        issue(folder, "server", hosts=hosts, server=True, again=True)
        print(f"{folder}/server.pem, .key: start the server again to use them")
    return 0


def _check(hosts: Sequence[str], names: Sequence[str]) -> None:
    """Refuse what could not be used, before anything is written."""
    for host in hosts:
        if not _HOST.fullmatch(host) and not isinstance(_host(host), x509.IPAddress):
            raise ConfigError(
                f"--host '{host}' is no name and no address of a machine: write gpu.example.org, "
                "without https:// and port"
            )
    for name in names:
        if not is_plain_name(name):  # the server would have no folder for such a tenant
            raise ConfigError(
                f"'{name}' is no plain name: use letters, digits, '.', '_' and '-', at most 64"
            )


def make_authority(folder: Path) -> None:
    """Write `ca.pem` and `ca.key`.

    Raises:
        ConfigError: If there is an authority already.
        StorageError: If they cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cutlayer authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    cert = (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder, "ca", cert, key, again=False)


def issue(
    folder: Path,
    name: str,
    *,
    hosts: Sequence[str] = (),
    server: bool = False,
    again: bool = False,
    days: float = LEAF_DAYS,
) -> None:
    """Write `NAME.pem` and `NAME.key`, signed by the authority in the same folder.

    Args:
        folder: Where `ca.pem` and `ca.key` are.
        name: The common name, which is the tenant's name for a client.
        hosts: Names and addresses of a server.
        server: Whether it is for a server.
        again: Whether a certificate of this name may be replaced.
        days: How long it is valid; negative makes one that has expired.

    Raises:
        ConfigError: If there is no authority, or such a certificate is there already.
    """
    try:
        ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        ca_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"'{folder}' has no authority (ca.pem and ca.key): run 'cutlayer certs init' first"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(subject, ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in dict.fromkeys(hosts)])
        builder = builder.add_extension(names, critical=False)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    _write(folder, name, builder.sign(ca_key, hashes.SHA256()), key, again=again)


def make_software_attester(folder: Path) -> None:
    """Write `attester.key`, `attester.json` and a `policy.json` that is met by them.

    Raises:
        ConfigError: If there is one already.
        StorageError: If they cannot be written.
    """
    if (folder / "attester.json").exists():
        raise ConfigError(f"'{folder}/attester.json' exists already: name another --dir")
    key = ed25519.Ed25519PrivateKey.generate()
    # What a real attester would measure; here it is only what the file says.
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha384(b"".join(source.read_bytes() for source in sources)).hexdigest()
    release = ".".join(re.findall(r"\d+", version("cutlayer"))[:3])
    claims = {"debug": False, "confidential_computing": True}
    attester = {
        "key": "attester.key",
        "measurements": {"cutlayer": digest},
        "tcb": {"cutlayer": release},
    }
    policy = {
        "format": 1,
        "verifier": "software",
        "measurements": {"cutlayer": [digest]},
        "minimum_tcb": {"cutlayer": release},
        "trust": {"keys": [key.public_key().public_bytes_raw().hex()]},
    }
    try:
        _write_secret(folder / "attester.key", key)
        for name, told in (("attester", attester), ("policy", policy)):
            (folder / f"{name}.json").write_text(json.dumps(told | claims, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write to '{folder}' ({error.strerror})") from error


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    end = now + dt.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - dt.timedelta(days=1))
        .not_valid_after(end)
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(
    folder: Path,
    name: str,
    cert: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *,
    again: bool,
) -> None:
    pem = folder / f"{name}.pem"
    if pem.exists() and not again:
        raise ConfigError(f"'{pem}' exists already: name another --dir, or remove it yourself")
    try:
        _write_secret(folder / f"{name}.key", key)
        pem.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise StorageError(f"cannot write to '{folder}' ({error.strerror})") from error


def _write_secret(path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    # Never readable by others, not even for a moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
