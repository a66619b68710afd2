"""Decompresses a layer and hashes what comes out, in threads of their own beside whatever uses it.

Runs in: any thread, which gets the pieces; two more threads for each layer, ended by `close`.
Spec: RFC 1952 (gzip, several members in a row), RFC 8878 (zstd, several frames, skippable ones passed over); image-spec 1.1.1
layer.md for the media types. What a blob is, is seen from its first bytes, as containerd does: media types lie.

isal and zstandard give up Python's lock while they work, and so does hashing: on two cores a layer costs the inflating alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, cast

from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.oci.image import (
    MEDIA_TYPE_DOCKER_LAYER,
    MEDIA_TYPE_DOCKER_LAYER_GZIP,
    MEDIA_TYPE_LAYER,
    MEDIA_TYPE_LAYER_GZIP,
    MEDIA_TYPE_LAYER_ZSTD,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PIECE = 1 << 20
"""Bytes that are handed from thread to thread at once; larger ones leave the caches, smaller ones wait for Python's lock."""
_AHEAD = 6
"""Pieces that may be waiting."""

COMPRESSIONS = {
    MEDIA_TYPE_LAYER: "", MEDIA_TYPE_LAYER_GZIP: "gzip", MEDIA_TYPE_LAYER_ZSTD: "zstd", MEDIA_TYPE_DOCKER_LAYER: "",
    MEDIA_TYPE_DOCKER_LAYER_GZIP: "gzip", "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd": "zstd",
}


def compression(media_type: str) -> str:
    """"gzip", "zstd" or "" for none. Raises Unsupported for what is no layer, or an encrypted one."""
    base = media_type.partition(";")[0].strip()
    found = COMPRESSIONS.get(base)
    if found is None:
        if base.endswith("+encrypted"):
            raise Unsupported(f"layer of media type {media_type}: encrypted layers are not supported")
        raise Unsupported(f"currently unsupported or unknown media type {media_type}")
    return found


class Layer:
    """A layer's uncompressed tar, piece by piece; use it in a `with`, or close it.

    Attributes:
        size: bytes of the tar so far.
    """

    def __init__(self, read: Callable[[int], bytes], limit: int = 0) -> None:
        """`read(n)` answers with up to n bytes of the blob, b"" at its end. `limit`: bytes of the tar, 0 is none."""
        self.size = 0
        self._limit = limit
        self._hash = hashlib.sha256(usedforsecurity=False)
        self._pieces: SimpleQueue[bytes | BaseException] = SimpleQueue()
        self._to_hash: SimpleQueue[bytes | None] = SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._hash_room = threading.Semaphore(_AHEAD)
        self._closed = False
        self._ended = False
        self._threads = [
            threading.Thread(target=self._inflate, args=(read,), name="layer-inflate", daemon=True),
            threading.Thread(target=self._digest, name="layer-hash", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> bytes:
        """The next piece, b"" at the end. Blocks. Raises InvalidArgument for a broken blob, and what reading the blob raises."""
        if self._ended:
            return b""
        piece = self._pieces.get()
        self._room.release()
        if isinstance(piece, BaseException):
            self._ended = True
            raise piece
        self._ended = not piece
        return piece

    def finish(self) -> str:
        """Read what is left (the padding behind a tar), and answer with the diff ID: the digest of the whole tar."""
        while self.read():
            pass
        self.close()
        return f"sha256:{self._hash.hexdigest()}"

    def close(self) -> None:
        """End the threads, at the end or before it. May be called twice."""
        self._closed = True
        self._room.release()
        for thread in self._threads:
            thread.join()

    def _inflate(self, read: Callable[[int], bytes]) -> None:
        try:
            for piece in pieces(read):
                self.size += len(piece)
                if self._limit and self.size > self._limit:
                    raise InvalidArgument(f"layer: larger than {self._limit} bytes when uncompressed")
                self._hash_room.acquire()
                self._to_hash.put(piece)
                self._room.acquire()
                if self._closed:
                    return
                self._pieces.put(piece)
            self._pieces.put(b"")
        except BaseException as error:  # noqa: BLE001 (handed to the thread that reads)
            self._pieces.put(error)
        finally:
            self._to_hash.put(None)

    def _digest(self) -> None:
        while (piece := self._to_hash.get()) is not None:
            self._hash.update(piece)
            self._hash_room.release()


def reader(fd: int) -> Callable[[int], bytes]:
    """Reads a file from its start, without moving its position; `fd` is borrowed."""
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        data = os.pread(fd, size, at)
        at += len(data)
        return data

    return read


def pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The uncompressed content of a blob, whatever it is compressed with. Raises InvalidArgument when that is broken."""
    head = b""
    while len(head) < 6:
        more = read(_PIECE)
        if not more:
            break
        head += more
    if head.startswith(b"\x1f\x8b"):
        yield from _gzip(head, read)
    elif head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        yield from _zstd(head, read)
    else:
        while head:
            yield head
            head = read(_PIECE)


def _gzip(data: bytes, read: Callable[[int], bytes]) -> Iterator[bytes]:
    from isal import igzip_lib

    # isal's stubs take its class of errors for an instance of one.
    broken = cast("tuple[type[Exception], ...]", (igzip_lib.IsalError, EOFError))
    try:
        while data:
            inflate = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            while not inflate.eof:
                piece = inflate.decompress(data, _PIECE)
                data = b""
                if piece:
                    yield piece
                if inflate.needs_input and not inflate.eof:
                    data = read(_PIECE)
                    if not data:
                        raise InvalidArgument("layer: the gzip data ends too early")
            data = inflate.unused_data or read(_PIECE)
            # Padding of zeros, as tapes and some writers leave it.
            while data and not data.strip(b"\0"):
                data = read(_PIECE)
            data = data.lstrip(b"\0")
    except broken as error:
        raise InvalidArgument(f"layer: broken gzip data: {str(error).lower()}") from None


def _zstd(head: bytes, read: Callable[[int], bytes]) -> Iterator[bytes]:
    import zstandard

    def blobs(size: int) -> bytes:
        nonlocal head
        data, head = head, b""
        return data or read(size)

    class _File(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return blobs(size)

    stream = zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", _File()), read_size=_PIECE, read_across_frames=True)
    try:
        while piece := stream.read(_PIECE):
            yield piece
    except (zstandard.ZstdError, BoxshipError) as error:
        raise InvalidArgument(f"layer: broken zstd data: {error}") from None
