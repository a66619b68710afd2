"""Compresses a layer's tar while it is written, and finds its two digests' halves: that of the tar, and the blob's size.

Runs in: any thread.
Spec: image-spec 1.1.1, layer.md (media types). The same tar makes the same blob.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_GZIP_LEVEL = 2
"""isal's best is at zlib's level 1 in size, and an order of magnitude faster."""
_ZSTD_LEVEL = 3


class Compressor:
    """Compresses and counts what is written, and hashes it uncompressed."""

    def __init__(self, kind: str, write: Callable[[bytes], object]) -> None:
        """`kind` as `streams.compression` says it; `write` gets the blob in pieces."""
        self._out = write
        self._hash = hashlib.sha256(usedforsecurity=False)
        self.size = 0
        """Bytes of the blob so far."""
        self.plain = 0
        """Bytes of the tar so far."""
        if kind == "gzip":
            from isal import isal_zlib

            # No name and no time in the header: the same tar makes the same blob.
            compressor = isal_zlib.compressobj(_GZIP_LEVEL, wbits=31)
            self._compress: Callable[[bytes], bytes] = compressor.compress
            self._flush: Callable[[], bytes] = compressor.flush
        elif kind == "zstd":
            import zstandard

            stream = zstandard.ZstdCompressor(_ZSTD_LEVEL, write_checksum=True).compressobj()
            self._compress, self._flush = stream.compress, stream.flush
        else:
            self._compress, self._flush = bytes, bytes

    def write(self, data: bytes) -> None:
        """The next piece of the tar."""
        self._hash.update(data)
        self.plain += len(data)
        self._put(self._compress(data))

    def finish(self) -> str:
        """The diff ID."""
        self._put(self._flush())
        return f"sha256:{self._hash.hexdigest()}"

    def _put(self, data: bytes) -> None:
        if data:
            self._out(data)
            self.size += len(data)
