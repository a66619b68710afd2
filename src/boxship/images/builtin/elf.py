"""Which shared libraries a program needs, read from its ELF headers: ldd(1) would execute it.

Runs in: the daemon.
Spec: elf(5), ld.so(8). ld.so.cache is glibc's "glibc-ld.so.cache1.1" (sysdeps/generic/dl-cache.h).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO

from boxship.kit.errors import InvalidArgument, NotFound

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
_DEFAULT = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
_CACHE = b"glibc-ld.so.cache1.1"


@dataclass
class Elf:
    """What the dynamic linker reads of a file.

    Attributes:
        interpreter: path of the dynamic linker; "" in a library.
        needed: names of libraries (DT_NEEDED).
        search: folders of DT_RUNPATH, or of DT_RPATH where there is none, with $ORIGIN replaced.
        kind: (class, byte order, machine): libraries of another kind are passed over.
    """

    kind: tuple[int, int, int]
    interpreter: str = ""
    needed: list[str] = field(default_factory=list)
    search: list[str] = field(default_factory=list)


def read(path: str) -> Elf:
    """Raises InvalidArgument when it is no ELF file, OSError."""
    with open(path, "rb") as file:
        ident = file.read(16)
        if len(ident) < 16 or ident[:4] != b"\x7fELF" or ident[4] not in (1, 2) or ident[5] not in (1, 2):
            raise InvalidArgument(f"{path}: not an ELF file")
        wide, order = ident[4] == 2, "<" if ident[5] == 1 else ">"
        try:
            return _read(file, path, wide, order, ident)
        except (struct.error, IndexError, ValueError, OverflowError, StopIteration, OSError):
            raise InvalidArgument(f"{path}: damaged ELF headers") from None


def _read(file: IO[bytes], path: str, wide: bool, order: str, ident: bytes) -> Elf:
    def at(offset: int, size: int) -> bytes:
        return os.pread(file.fileno(), size, offset)

    header = struct.unpack(order + ("HHIQQQIHHH" if wide else "HHIIIIIHHH"), at(16, 42 if wide else 30))
    machine, table, size, count = header[1], header[4], header[8], header[9]
    found = Elf((ident[4], ident[5], machine))
    loads: list[tuple[int, int, int]] = []
    dynamic = b""
    for index in range(count):
        entry = at(table + index * size, size)
        if wide:
            kind, _, offset, address, _, length = struct.unpack_from(order + "IIQQQQ", entry)
        else:
            kind, offset, address, _, length = struct.unpack_from(order + "IIIII", entry)
        if kind == _PT_LOAD:
            loads.append((address, offset, length))
        elif kind == _PT_INTERP:
            found.interpreter = os.fsdecode(at(offset, length).split(b"\0")[0])
        elif kind == _PT_DYNAMIC:
            dynamic = at(offset, length)
    pair = struct.Struct(order + ("qQ" if wide else "iI"))
    tags = list(pair.iter_unpack(dynamic[: len(dynamic) // pair.size * pair.size]))
    strings = next((value for tag, value in tags if tag == _DT_STRTAB), None)
    if strings is None:
        return found
    base = next(offset + strings - address for address, offset, length in loads if address <= strings < address + length)

    def text(value: int) -> str:
        return os.fsdecode(at(base + value, 4096).split(b"\0")[0])

    found.needed = [text(value) for tag, value in tags if tag == _DT_NEEDED]
    for wanted in (_DT_RUNPATH, _DT_RPATH):
        paths = [text(value) for tag, value in tags if tag == wanted]
        if paths:
            origin = os.path.dirname(os.path.realpath(path))
            found.search = [
                os.path.normpath(folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin))
                for folder in ":".join(paths).split(":") if folder
            ]
            break
    return found


class Linker:
    """Finds libraries as ld.so does without LD_LIBRARY_PATH: the asker's search path, the cache, the default folders."""

    def __init__(self, cache: str = "/etc/ld.so.cache") -> None:
        self._cache: dict[str, list[str]] = {}
        try:
            with open(cache, "rb") as file:
                data = file.read()
        except OSError:
            return  # musl, or a machine without one: the default folders are what there is
        for name, path in _cached(data):
            self._cache.setdefault(name, []).append(path)

    def libraries(self, programs: Iterable[str]) -> dict[str, str]:
        """Everything that `programs` (and libraries among them) load: path on the machine by name (soname, or linker's path).

        Raises NotFound for a library that is nowhere, InvalidArgument for a program that is no ELF file.
        """
        found: dict[str, str] = {}
        seen: set[str] = set()
        todo = list(programs)
        while todo:
            path = todo.pop()
            if path in seen:
                continue
            seen.add(path)
            elf = read(path)
            if elf.interpreter:
                found[elf.interpreter] = elf.interpreter
            for name in elf.needed:
                if name not in found:
                    found[name] = self._find(name, elf, path)
                    todo.append(found[name])
        return found

    def _find(self, name: str, elf: Elf, asker: str) -> str:
        if "/" in name:
            return name
        candidates = [f"{folder}/{name}" for folder in elf.search]
        candidates += self._cache.get(name, [])
        candidates += [f"{folder}/{name}" for folder in _DEFAULT]
        for path in candidates:
            try:
                if read(path).kind == elf.kind:
                    return path
            except (OSError, InvalidArgument):
                continue
        raise NotFound(f"{name}, which {asker} needs, is not on this machine")


def _cached(data: bytes) -> Iterator[tuple[str, str]]:
    start = data.find(_CACHE)
    if start < 0:
        return
    count = struct.unpack_from("=I", data, start + 20)[0]
    for index in range(count):
        entry = start + 48 + index * 24
        if entry + 24 > len(data):
            return
        _, key, value = struct.unpack_from("=iII", data, entry)
        yield _string(data, start + key), _string(data, start + value)


def _string(data: bytes, offset: int) -> str:
    end = data.find(b"\0", offset)
    return os.fsdecode(data[offset:end]) if end >= 0 else ""
