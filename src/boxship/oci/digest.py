"""Digests: the name of content by its hash.

Runs in: every process of the thin set.
Spec: image-spec 1.1, descriptor.md "Digests". The words of errors are go-digest's.
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _hashlib import HASH

LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}
"""Algorithms that can be verified here, with the length of what they encode to."""

_HEX = frozenset("0123456789abcdef")
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_ENCODED = _LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ=_-")


def split(digest: str) -> tuple[str, str]:
    """Algorithm and encoded hash; neither can hold a `/` or be `..`, so that both are safe in paths.

    An algorithm that is not known here passes when the grammar holds, as the specification demands.
    Raises InvalidArgument.
    """
    algorithm, colon, encoded = digest.partition(":")
    length = LENGTHS.get(algorithm)
    if length is not None:
        if len(encoded) != length:
            raise InvalidArgument("invalid checksum digest length" if colon else "invalid checksum digest format")
        if not _HEX.issuperset(encoded):
            raise InvalidArgument("invalid checksum digest format")
        return algorithm, encoded
    for separator in "+._-":
        algorithm = algorithm.replace(separator, " ")
    if not all(part and _LOWER.issuperset(part) for part in algorithm.split(" ")):
        raise InvalidArgument("invalid checksum digest format")
    if not encoded or not _ENCODED.issuperset(encoded):
        raise InvalidArgument("invalid checksum digest format")
    return digest.partition(":")[0], encoded


def check(digest: str) -> None:
    """Raises InvalidArgument when `digest` is not one."""
    split(digest)


def hasher(digest: str) -> HASH:
    """A hash object of the digest's algorithm, to feed content to; raises Unsupported when it is not known here."""
    algorithm, _ = split(digest)
    if algorithm not in LENGTHS:
        raise Unsupported(f"unsupported digest algorithm {algorithm}")
    import _hashlib

    return _hashlib.new(algorithm, usedforsecurity=False)


def of(content: bytes, algorithm: str = "sha256") -> str:
    """The digest of `content`; raises Unsupported for an algorithm that is not known here."""
    if algorithm not in LENGTHS:
        raise Unsupported(f"unsupported digest algorithm {algorithm}")
    import _hashlib

    return f"{algorithm}:{_hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}"
