"""What secure aggregation is made of: keys that two agree on, masks, and shares of a secret.

Masks are ChaCha20 under 256-bit keys. A generator seeded with fewer bits (a published library
folds the key to 32 and seeds a Mersenne Twister) can be searched through in hours.

References:
    X25519: RFC 7748. HKDF: RFC 5869. ChaCha20: RFC 8439.
    Shamir, 1979, How to share a secret, https://doi.org/10.1145/359168.359176
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from cutlayer.errors import ConfigError, ProtocolError, Refused

__all__ = [
    "KEY_BYTES",
    "SHARE_BYTES",
    "agreed",
    "derived",
    "framed",
    "join",
    "keystream",
    "new_secret",
    "public",
    "split",
]

KEY_BYTES = 32
SHARE_BYTES = 33
# The smallest prime above 2**256, so that every 32-byte secret is a number of the field.
PRIME = 2**256 + 297


def keystream(key: bytes, length_bytes: int) -> bytes:
    """Return the first bytes of the ChaCha20 stream of a 256-bit key, which is used once."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return encryptor.update(bytes(length_bytes))


def new_secret() -> bytes:
    """Return 32 bytes that nobody else has."""
    return secrets.token_bytes(KEY_BYTES)


def public(secret: bytes) -> bytes:
    """Return the X25519 public key of a secret, 32 bytes."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes) -> bytes:
    """Return what the owners of these two keys both can compute, 32 bytes.

    Raises:
        ProtocolError: If the public key is none.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        theirs = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(secret).exchange(theirs)
    except ValueError as error:
        raise ProtocolError("an advertised key is none of X25519: check its client") from error


def derived(shared: bytes, context: bytes, *purpose: str) -> bytes:
    """Return a key of 32 bytes for one purpose.

    Args:
        shared: What two have agreed on.
        context: What both were told besides, so that the keys differ where it does.
        purpose: Names of the purpose and of the two.
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"".join(framed(part.encode()) for part in ("cutlayer secagg 1", *purpose))
    return HKDF(SHA256(), KEY_BYTES, salt=context, info=info).derive(shared)


def framed(part: bytes) -> bytes:
    """Return bytes with their length before them, so that no two lists of them look alike."""
    return len(part).to_bytes(8, "little") + part


def split(secret: bytes, *, threshold: int, count: int) -> list[bytes]:
    """Return the secret's shares at 1, 2, ... count; any `threshold` of them give it back.

    Fewer say nothing of it: they fit every secret equally well.

    Raises:
        ConfigError: If the library for it is not installed.
    """
    assert len(secret) == KEY_BYTES
    assert 1 <= threshold <= count
    value = int.from_bytes(secret, "big")
    shares = _shamirs().shares(value, quantity=count, modulus=PRIME, threshold=threshold)
    return [share.value.to_bytes(SHARE_BYTES, "big") for share in shares]


def join(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """Return the secret of these shares, by the point at which each lies.

    Raises:
        ProtocolError: If a share is malformed, or they are no shares of a 32-byte secret.
        Refused: If they are fewer than the threshold.
    """
    if len(shares) < threshold:
        raise Refused(
            f"{len(shares)} shares of a secret where {threshold} are needed: start the round again"
        )
    numbers = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    sizes = {len(share) for share in shares.values()}
    if sizes != {SHARE_BYTES} or any(number >= PRIME for number in numbers.values()):
        raise ProtocolError("a share of a secret is malformed: check the client that revealed it")
    shamirs = _shamirs()
    chosen = [shamirs.share(point, numbers[point], PRIME) for point in sorted(numbers)[:threshold]]
    secret: int = shamirs.interpolate(chosen, threshold=threshold)
    if secret >= 1 << 8 * KEY_BYTES:
        raise ProtocolError("the shares do not belong to one secret: start the round again")
    return secret.to_bytes(KEY_BYTES, "big")


def _shamirs() -> Any:
    try:
        import shamirs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("secure aggregation needs shamirs: pip install 'cutlayer[dp]'") from error
    return shamirs
