"""Every way in which Cutlayer fails, as one tree.

    CutlayerError
    ├── ConfigError          exit 2    a flag, a key of the YAML file, or an argument
    ├── DataError            exit 3    a dataset, a sample, a label
    ├── ModelError           exit 4    a model folder, its weights, its shape
    │   └── CannotCut        exit 4    a family or a cut that cannot be split
    ├── ConnectionFailed     exit 5    the server cannot be reached, or fell silent
    │   └── TLSError         exit 5    certificates, names, authorities
    ├── Refused              exit 6    the other side said no, and says why
    │   ├── ProtocolError    exit 6    a frame that breaks the protocol
    │   ├── Unauthorized     exit 6    no token or certificate that the server lets in
    │   └── OverQuota        exit 6    more than the tenant may use, with both numbers
    ├── NotFinite            exit 7    NaN or infinity, in the loss or in an activation
    ├── StorageError         exit 8    a disk that is full or cannot be written
    │   └── Tampered         exit 8    a log that is not what was written
    └── PrivacyError         exit 9    a promise of privacy that cannot be kept
        ├── AttestationFailed  exit 9  the server does not prove what it is; nothing was sent
        └── BudgetExhausted  exit 9    the privacy budget is spent; nothing was sent

Each class has a stable `code` (it crosses the wire and stands in `--format json`) and a stable
`exit_code`. Each also inherits the class of the standard library which it refines. A message is
one sentence: what is wrong, what was found, what to do. To add a class, add it to this tree; the
table `BY_CODE` finds it by itself.
"""

from __future__ import annotations

__all__ = [
    "BY_CODE",
    "AttestationFailed",
    "BudgetExhausted",
    "CannotCut",
    "ConfigError",
    "ConnectionFailed",
    "CutlayerError",
    "DataError",
    "ModelError",
    "NotFinite",
    "OverQuota",
    "PrivacyError",
    "ProtocolError",
    "Refused",
    "StorageError",
    "TLSError",
    "Tampered",
    "Unauthorized",
]


class CutlayerError(Exception):
    """The root of the tree."""

    code = "error"
    exit_code = 1


class ConfigError(CutlayerError, ValueError):
    """A flag, a key or an argument is wrong; the message lists all the faults found."""

    code = "config"
    exit_code = 2


class DataError(CutlayerError, ValueError):
    """A dataset or one of its samples cannot be trained on."""

    code = "data"
    exit_code = 3


class ModelError(CutlayerError, ValueError):
    """A model folder is missing, incomplete, or not what it is said to be."""

    code = "model"
    exit_code = 4


class CannotCut(ModelError):
    """This family cannot be split, or not at these layers."""

    code = "cannot_cut"


class ConnectionFailed(CutlayerError, ConnectionError):
    """The server cannot be reached, or no byte moved for longer than the idle limit."""

    code = "connection"
    exit_code = 5


class TLSError(ConnectionFailed):
    """The two sides could not agree on who they are."""

    code = "tls"


class Refused(CutlayerError, PermissionError):
    """The other side refused a request and says why."""

    code = "refused"
    exit_code = 6


class ProtocolError(Refused):
    """A frame broke the protocol."""

    code = "protocol"


class Unauthorized(Refused):
    """The server does not know who asks, or lets it in no more; it never says which."""

    code = "unauthorized"


class OverQuota(Refused):
    """A tenant asked for more than it may use."""

    code = "over_quota"


class NotFinite(CutlayerError, ArithmeticError):
    """NaN or infinity where a number was needed."""

    code = "not_finite"
    exit_code = 7


class StorageError(CutlayerError, OSError):
    """Something could not be written; what was there before is untouched."""

    code = "storage"
    exit_code = 8


class Tampered(StorageError):
    """A log was changed by another hand than ours."""

    code = "tampered"


class PrivacyError(CutlayerError, RuntimeError):
    """A promise of privacy cannot be kept: accountants disagree, evidence does not hold."""

    code = "privacy"
    exit_code = 9


class AttestationFailed(PrivacyError):
    """A server's evidence does not verify, or not for this connection; nothing was sent."""

    code = "attestation"


class BudgetExhausted(PrivacyError):
    """The next release would exceed the privacy budget; nothing was sent."""

    code = "budget"


def _walk(cls: type[CutlayerError]) -> list[type[CutlayerError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _walk(child))]


BY_CODE: dict[str, type[CutlayerError]] = {cls.code: cls for cls in _walk(CutlayerError)}
