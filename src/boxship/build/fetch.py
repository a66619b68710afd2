"""What a build gets from elsewhere: files of URLs, repositories of git, archives in any compression.

Runs in: the daemon; downloads on its event loop, unpacking and git in worker threads and processes.
Spec: the Dockerfile reference, ADD; docker build's URL contexts: REPOSITORY#REF:DIRECTORY.
"""

from __future__ import annotations

import asyncio
import bz2
import hashlib
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import IO, Any, NamedTuple

from boxship.build.layers import in_thread
from boxship.build.tree import TarTree
from boxship.kit.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable, from_os_error

CONTEXT_MAX = 16 << 30
_PIECE = 1 << 20
_GIT_URL = re.compile(r"(?:git://|git@|[^/]+@[^/]+:|https?://[^#]+\.git(?:#|\Z)|ssh://|file://[^#]+\.git(?:#|\Z))")


class Fetched(NamedTuple):
    """A file that was downloaded; `file` is the caller's to close."""

    file: IO[bytes]
    size: int
    name: str
    mtime: int
    """Nanoseconds since 1970, of Last-Modified; 0 for none."""
    digest: str


def is_git(url: str) -> bool:
    """Whether a source is a repository."""
    return bool(_GIT_URL.match(url)) or url.startswith("github.com/")


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded."""
    return source.startswith(("http://", "https://"))


class Fetcher:
    """Downloads for builds."""

    def __init__(self, directory: str) -> None:
        """`directory`: where files are spooled."""
        self._directory = directory

    def spool(self) -> IO[bytes]:
        """A file without a name, gone with its descriptor."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        return tempfile.TemporaryFile(dir=self._directory)

    async def url(self, url: str, checksum: str = "") -> Fetched:
        """Download. Raises NotFound, Unavailable, DataLoss by `checksum` ("sha256:…")."""
        import aiohttp

        spool = self.spool()
        hasher = hashlib.sha256()
        size = 0
        try:
            async with aiohttp.ClientSession(trust_env=True, auto_decompress=False) as session, session.get(url) as answer:
                if answer.status != 200:
                    kind = NotFound if answer.status in (404, 410) else Unavailable
                    raise kind(f"failed to fetch {url}: the server answered {answer.status} {answer.reason}")
                async for piece in answer.content.iter_chunked(_PIECE):
                    size += len(piece)
                    if size > CONTEXT_MAX:
                        raise ResourceExhausted(f"{url} is larger than {CONTEXT_MAX} bytes")
                    hasher.update(piece)
                    spool.write(piece)
                name = os.path.basename(answer.url.path)
                mtime = _modified(answer.headers.get("Last-Modified", ""))
        except aiohttp.ClientError as error:
            spool.close()
            raise Unavailable(f"failed to fetch {url}: {error}") from None
        except BaseException:
            spool.close()
            raise
        found = f"sha256:{hasher.hexdigest()}"
        if checksum and checksum != found:
            spool.close()
            raise FailedPrecondition(f"{url} has the digest {found}, expected {checksum}")
        spool.flush()
        spool.seek(0)
        return Fetched(spool, size, name, mtime, found)

    async def git(self, url: str, *, keep: bool = False, commit: str = "") -> tuple[TarTree, str]:
        """(the files of a repository, its commit), at `REPOSITORY#REF:DIRECTORY`. `keep`: with its .git directory.

        Raises NotFound when there is no such thing, FailedPrecondition when it is not `commit`.
        """
        repository, _, fragment = url.partition("#")
        reference, _, below = fragment.partition(":")
        if repository.startswith("github.com/"):
            repository = f"https://{repository}"
        if repository.startswith("-") or reference.startswith("-"):
            raise InvalidArgument(f"{url} is no repository")
        with tempfile.TemporaryDirectory(dir=self._made(), prefix="git-") as directory:
            await _run("git", "init", "-q", directory)
            await _run("git", "-C", directory, "fetch", "-q", "--depth", "1", "--", repository, reference or "HEAD")
            await _run("git", "-C", directory, "checkout", "-q", "FETCH_HEAD")
            found = (await _run("git", "-C", directory, "rev-parse", "HEAD")).strip()
            if commit and not found.startswith(commit):
                raise FailedPrecondition(f"{url} is at the commit {found}, expected {commit}")
            spool = self.spool()
            top = os.path.realpath(os.path.join(directory, below.strip("/")))
            if not (top + "/").startswith(os.path.realpath(directory) + "/") or not os.path.isdir(top):
                spool.close()
                raise NotFound(f"{url}: there is no directory {below} in the repository")
            excluded = [] if keep else ["--exclude=./.git"]
            await _run("tar", "-c", "--sort=name", "-C", top, *excluded, ".", output=spool)
        fd = os.dup(spool.fileno())
        spool.close()
        return await in_thread(lambda: TarTree(fd)), found

    def _made(self) -> str:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        return self._directory


async def _run(*words: str, output: IO[bytes] | None = None) -> str:
    """A program to its end: its output. Raises NotFound with what it said when it fails."""
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": "/nonexistent", "GIT_TERMINAL_PROMPT": "0",
                   "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=output or asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=environment)
    except FileNotFoundError:
        raise FailedPrecondition(f"there is no {words[0]} on this machine", f"install {words[0]}") from None
    try:
        out, err = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise NotFound(f"{' '.join(words[:1])} failed: {err.decode(errors='replace').strip()}")
    return (out or b"").decode(errors="replace")


def _modified(text: str) -> int:
    if not text:
        return 0
    try:
        return int(parsedate_to_datetime(text).timestamp()) * 10**9
    except (TypeError, ValueError):
        return 0


def archive_kind(start: bytes) -> str:
    """What the first 512 bytes of a file say: "gzip", "bzip2", "xz", "zstd", "tar", or "" for no archive."""
    if start.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if start.startswith(b"BZh"):
        return "bzip2"
    if start.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    if len(start) >= 512 and start[257:262] == b"ustar":
        return "tar"
    if len(start) >= 512 and _old_tar(start):
        return "tar"
    return ""


def _old_tar(block: bytes) -> bool:
    try:
        return int(block[148:156].strip(b" \0"), 8) == sum(block[:148]) + sum(block[156:512]) + 256 and block[0] != 0
    except ValueError:
        return False


def decompressed(pieces: Iterator[bytes], kind: str) -> Iterator[bytes]:
    """The pieces uncompressed. Raises InvalidArgument for broken data."""
    made: Any
    if kind in ("", "tar"):
        yield from pieces
        return
    try:
        if kind == "gzip":
            made = zlib.decompressobj(wbits=31)
            for piece in pieces:
                while piece:
                    yield made.decompress(piece)
                    piece = made.unused_data
                    if made.eof:
                        made = zlib.decompressobj(wbits=31)
            return
        if kind == "zstd":
            import zstandard

            made = zstandard.ZstdDecompressor().decompressobj()
            errors: tuple[type[Exception], ...] = (zstandard.ZstdError,)
        else:
            made = bz2.BZ2Decompressor() if kind == "bzip2" else lzma.LZMADecompressor()
            errors = (OSError, lzma.LZMAError, EOFError)
        try:
            for piece in pieces:
                if getattr(made, "eof", False):
                    return
                yield made.decompress(piece)
        except errors as error:
            raise InvalidArgument(f"broken {kind} data: {error}") from None
    except zlib.error as error:
        raise InvalidArgument(f"broken gzip data: {error}") from None


def opened(file: IO[bytes], *, owners: bool, strip: bool = False, limit: int = CONTEXT_MAX) -> TarTree:
    """The tree of an archive in a spooled file, which is closed or taken over. Blocks. Raises InvalidArgument."""
    start = os.pread(file.fileno(), 512, 0)
    kind = archive_kind(start)
    if kind in ("", "tar"):
        fd = os.dup(file.fileno())
        file.close()
        return TarTree(fd, owners=owners, strip=strip)
    with file, tempfile.TemporaryFile(dir=None) as plain:
        size = 0
        file.seek(0)
        try:
            for piece in decompressed(iter(lambda: file.read(_PIECE), b""), kind):
                size += len(piece)
                if size > limit:
                    raise ResourceExhausted(f"the archive is larger than {limit} bytes")
                plain.write(piece)
            plain.flush()
        except OSError as error:
            raise from_os_error(error, "unpacking the archive") from None
        return TarTree(os.dup(plain.fileno()), owners=owners, strip=strip)
