"""What RUN --mount puts into a step's container.

Runs in: the daemon, on its event loop.
Spec: the Dockerfile reference, RUN --mount: bind, cache, tmpfs, secret, ssh.

    STATE/build/ID/…       mounts of stages and contexts for one step, and its secrets (a file system in memory)
    ROOT/cache/HASH/data   one cache; HASH-2, HASH-3 … further ones of sharing=private

What a killed daemon leaves below STATE is unmounted and removed at the next start (`sweep`). A secret is written there for the
time of its step, where no snapshot and no layer is.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets as random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from boxship.build.layers import in_thread
from boxship.kit.errors import FailedPrecondition, InvalidArgument, NotFound, from_os_error
from boxship.linux import mounts as linux

SHARED, PRIVATE, LOCKED = "shared", "private", "locked"
_TMPFS_OPTIONS = ["nosuid", "nodev", "mode=1777"]


class Mounts:
    """The directories of caches, and places for steps' mounts."""

    def __init__(self, root: str, state: str) -> None:
        self._caches = f"{root}/cache"
        self._state = f"{state}/build"
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: dict[str, int] = {}

    def sweep(self) -> None:
        """Take away what a killed daemon left of its steps. The caches stay."""
        if os.path.isdir(self._state):
            linux.umount_below(self._state)
            shutil.rmtree(self._state, ignore_errors=True)

    @asynccontextmanager
    async def step(self) -> AsyncIterator[Step]:
        """The mounts of one step, gone at the end."""
        directory = f"{self._state}/{random.token_hex(8)}"
        os.makedirs(self._state, mode=0o700, exist_ok=True)
        os.mkdir(directory, 0o700)
        try:
            yield Step(directory)
        finally:
            await in_thread(lambda: _remove(directory))

    @asynccontextmanager
    async def cache(self, name: str, sharing: str, *, mode: int, uid: int, gid: int) -> AsyncIterator[tuple[str, bool]]:
        """(the host's directory of a cache, whether it is new), for as long as a step uses it."""
        hashed = hashlib.sha256(name.encode()).hexdigest()[:32]
        if sharing == LOCKED:
            lock = self._locks.setdefault(hashed, asyncio.Lock())
            async with lock:
                yield self._directory(hashed, mode, uid, gid)
            return
        number = 1
        if sharing == PRIVATE:
            while self._users.get(f"{hashed}-{number}", 0):
                number += 1
        held = f"{hashed}-{number}"
        self._users[held] = self._users.get(held, 0) + 1
        try:
            yield self._directory(hashed if number == 1 else held, mode, uid, gid)
        finally:
            self._users[held] -= 1

    def _directory(self, name: str, mode: int, uid: int, gid: int) -> tuple[str, bool]:
        path = f"{self._caches}/{name}/data"
        try:
            os.makedirs(f"{self._caches}/{name}", mode=0o700, exist_ok=True)
            try:
                os.mkdir(path)
            except FileExistsError:
                return path, False
            os.chown(path, uid, gid)
            os.chmod(path, mode)
        except OSError as error:
            raise from_os_error(error, "making a cache directory") from None
        return path, True

    def usage(self) -> list[tuple[str, int]]:
        """(name, bytes) of each cache."""
        if not os.path.isdir(self._caches):
            return []
        return [(name, _size(f"{self._caches}/{name}")) for name in sorted(os.listdir(self._caches))]

    def prune(self) -> list[tuple[str, int]]:
        """Remove the caches that no step uses: (name, bytes) of each."""
        gone = []
        for name, size in self.usage():
            base = name.partition("-")[0]
            locked = base in self._locks and self._locks[base].locked()
            if locked or any(count and held.startswith(base) for held, count in self._users.items()):
                continue
            shutil.rmtree(f"{self._caches}/{name}", ignore_errors=True)
            gone.append((name, size))
        return gone


class Step:
    """One step's mounts."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._count = 0

    def _place(self) -> str:
        self._count += 1
        return f"{self._directory}/{self._count}"

    def attach(self, mounts: list[Any], inner: str, target: str, *, read_only: bool) -> dict[str, Any]:
        """`inner` of the file system that `mounts` make, at `target`: a mount of the specification. Raises NotFound."""
        place = self._place()
        os.mkdir(place, 0o700)
        if len(mounts) != 1:
            raise FailedPrecondition("a file system of several mounts cannot be mounted into a step")
        linux.attach(mounts[0].type, mounts[0].source, place, list(mounts[0].options))
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            path = linux.follow_links(fd, inner)
        finally:
            os.close(fd)
        source = f"{place}/{path}".rstrip("/")
        if not os.path.lexists(source):
            raise NotFound(f"failed to calculate checksum of /{inner.strip('/')}: not found")
        return bind(source, target, read_only=read_only)

    def secret(self, value: bytes, target: str, *, mode: int, uid: int, gid: int) -> dict[str, Any]:
        """A file with a secret at `target`."""
        place = self._place()
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(value)
            while view:
                view = view[os.write(fd, view):]
            os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
        return bind(place, target, read_only=True)


def bind(source: str, target: str, *, read_only: bool) -> dict[str, Any]:
    """A bind mount of the specification."""
    return {"destination": target, "type": "bind", "source": source,
            "options": ["rbind", "rprivate", "ro" if read_only else "rw"]}


def tmpfs(target: str, size: int) -> dict[str, Any]:
    """A file system in memory; `size` in bytes, 0 for no limit of its own."""
    options = [*_TMPFS_OPTIONS, *([f"size={size}"] if size else [])]
    return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options}


def check_socket(path: str) -> str:
    """The socket of an ssh agent. Raises InvalidArgument when it is none."""
    import stat

    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            return path
    except OSError:
        pass
    raise InvalidArgument(f"{path} is no socket of an ssh agent")


def _remove(directory: str) -> None:
    linux.umount_below(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _size(directory: str) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(f"{folder}/{name}").st_blocks * 512
            except OSError:
                continue  # a step is at work in it
    return total
