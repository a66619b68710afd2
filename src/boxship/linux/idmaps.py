"""Id maps of user namespaces: written directly where the kernel lets us, else by newuidmap and newgidmap.

Runs in: the runtime, outside of the namespace whose maps it writes.
Spec: user_namespaces(7), newuidmap(1), subuid(5). A map is written once, in one write, of at most 340 lines (Linux ≥ 4.15).
"""

from __future__ import annotations

import errno
import os
from itertools import pairwise

from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported, from_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Mapping = tuple[int, int, int]

_IDS = 1 << 32
_MAX_LINES = 340


def write_id_maps(pid: int, uid_mappings: Sequence[Mapping], gid_mappings: Sequence[Mapping], *, deny_setgroups: bool) -> None:
    """Write the maps of `pid`'s new user namespace. A mapping is (id inside, id outside, how many).

    `deny_setgroups` gives up setgroups(2) in it for good, which an unprivileged caller must do who maps its own group without
    newgidmap; with any other map of groups it is not needed, and not done.
    Blocks until the helper programs have ended. Raises InvalidArgument, PermissionDenied, Unsupported.
    """
    check_mappings(uid_mappings)
    check_mappings(gid_mappings)
    # Before gid_map: afterwards the kernel refuses.
    if deny_setgroups and maps_only_self(gid_mappings, os.getegid()):
        _deny_setgroups(pid)
    if uid_mappings:
        _write_map(pid, "uid", uid_mappings)
    if gid_mappings:
        _write_map(pid, "gid", gid_mappings)


def check_mappings(mappings: Sequence[Mapping]) -> None:
    """Raises InvalidArgument for ids that do not fit, ranges that overlap, and more lines than the kernel takes."""
    if len(mappings) > _MAX_LINES:
        raise InvalidArgument(f"too many id mappings: {len(mappings)}, the kernel takes {_MAX_LINES}")
    for inside, outside, size in mappings:
        # (uid_t)-1 is no id.
        fits = all(start >= 0 and start + size < _IDS for start in (inside, outside))
        if size <= 0 or not fits:
            raise InvalidArgument(f"invalid id mapping {inside}:{outside}:{size}: ids have 32 bits, and a range has at least one")
    for side in (0, 1):
        ordered = sorted(mappings, key=lambda mapping: mapping[side])
        for one, other in pairwise(ordered):
            if one[side] + one[2] > other[side]:
                raise InvalidArgument(f"id mappings {_text(one)} and {_text(other)} overlap")


def _text(mapping: Mapping) -> str:
    return ":".join(map(str, mapping))


def maps_only_self(mappings: Sequence[Mapping], own: int) -> bool:
    """Whether the mappings are what an unprivileged caller may write without help: one line with its own effective id."""
    return len(mappings) == 1 and mappings[0][1] == own and mappings[0][2] == 1


def _deny_setgroups(pid: int) -> None:
    try:
        _write(f"/proc/{pid}/setgroups", b"deny")
    except FileNotFoundError:
        pass  # Linux < 3.19, where nothing needs denying
    except OSError as error:
        raise from_os_error(error, f"failed to write 'deny' to /proc/{pid}/setgroups") from None


def _write_map(pid: int, kind: str, mappings: Sequence[Mapping]) -> None:
    path = f"/proc/{pid}/{kind}_map"
    lines = "".join(f"{inside} {outside} {size}\n" for inside, outside, size in mappings)
    try:
        _write(path, lines.encode())
    except OSError as error:
        if error.errno != errno.EPERM:
            raise from_os_error(OSError(error.errno, error.strerror), f"failed to update {path}") from None
        _run_tool(pid, kind, mappings)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _run_tool(pid: int, kind: str, mappings: Sequence[Mapping]) -> None:
    """newuidmap or newgidmap: setuid programs that allow what /etc/subuid and /etc/subgid give to the caller."""
    tool = f"new{kind}map"
    path = _find(tool)
    if not path:
        raise Unsupported(
            f"failed to use new{kind} map on {pid}: {tool} not found", "Debian's package is uidmap",
        )
    numbers = [str(number) for mapping in mappings for number in mapping]
    said, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, write_end, 1), (os.POSIX_SPAWN_DUP2, write_end, 2)]
        child = os.posix_spawn(path, [tool, str(pid), *numbers], {}, file_actions=actions)
        os.close(write_end)
        write_end = -1
        output = b""
        while chunk := os.read(said, 4096):
            output += chunk
        status = os.waitpid(child, 0)[1]
    except OSError as error:
        raise from_os_error(error, f"failed to use new{kind} map on {pid}: {tool}") from None
    finally:
        os.close(said)
        if write_end >= 0:
            os.close(write_end)
    if status:
        text = output.decode(errors="replace").strip().splitlines()
        raise BoxshipError(f"failed to use new{kind} map on {pid}" + (f": {text[-1]}" if text else ""))


def _find(tool: str) -> str:
    for folder in os.environ.get("PATH", os.defpath).split(":"):
        path = f"{folder}/{tool}"
        if folder and os.access(path, os.X_OK):
            return path
    return ""


def subordinate_ranges(path: str, user: str, own: int) -> list[tuple[int, int]]:
    """(first id, how many) that /etc/subuid or /etc/subgid gives to the user of that name, or of the id `own`.

    An unreadable file gives nothing; lines that are not well formed are passed over, as shadow does.
    """
    from boxship.kit.files import read_all

    try:
        lines = read_all(path).decode(errors="replace").split("\n")
    except OSError:
        return []
    ranges = []
    for line in lines:
        owner, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if owner in (user, str(own)) and _is_number(first) and _is_number(count) and int(count):
            ranges.append((int(first), int(count)))
    return ranges


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def rootless_mappings(own: int, ranges: Sequence[tuple[int, int]]) -> list[Mapping]:
    """Root inside is the caller; the subordinate ids follow from 1 on."""
    mappings = [(0, own, 1)]
    inside = 1
    for first, count in ranges:
        mappings.append((inside, first, count))
        inside += count
    return mappings
