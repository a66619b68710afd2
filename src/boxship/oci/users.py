"""Who the container's process is: `-u` looked up in the files of the container's own root.

Runs in: the boxship command and the daemon.
Spec: docker run's `--user`: "name|uid[:name|gid]"; passwd(5), group(5). Errors are docker's.
Not here: which ids of the host these are (the user namespace's id maps).
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_ID = 2**31 - 1


class User:
    """Ids and home directory of a process."""

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: list[int], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


def _records(text: str, fields: int) -> list[list[str]]:
    rows = (line.split(":") for line in text.splitlines() if line and not line.startswith("#"))
    return [row for row in rows if len(row) >= fields]


def _number(word: str) -> int:
    """An id, or -1 when the word is none."""
    if not word.isascii() or not word.isdigit():
        return -1
    if int(word) > _MAX_ID:
        raise InvalidArgument(f"uids and gids must be in range 0-{_MAX_ID}")
    return int(word)


def find(wanted: str, read: Callable[[str], str]) -> User:
    """The user that `wanted` names; "" is root. `read` returns the text of a file of the container, "" when it has none.

    Raises NotFound for a name without entry; a number needs none.
    """
    name, _, group = wanted.partition(":")
    name = name or "0"
    uid = _number(name)
    gid, home, user_name = 0, "/root" if uid == 0 else "/", ""
    for row in _records(read("/etc/passwd"), 4):
        if row[0] == name or (uid >= 0 and row[2] == str(uid)):
            user_name, uid, gid = row[0], _number(row[2]), max(_number(row[3]), 0)
            home = (row[5] if len(row) > 5 else "") or "/"
            break
    if uid < 0:
        raise NotFound(f"unable to find user {name}: no matching entries in passwd file")
    if group:
        return User(uid, _group(group, read), [], home)
    member_of = []
    if user_name:
        for row in _records(read("/etc/group"), 3):
            number = _number(row[2])
            if len(row) > 3 and user_name in row[3].split(",") and number >= 0 and number != gid:
                member_of.append(number)
    return User(uid, gid, member_of, home)


def _group(name: str, read: Callable[[str], str]) -> int:
    for row in _records(read("/etc/group"), 3):
        if row[0] == name:
            return _number(row[2])
    number = _number(name)
    if number < 0:
        raise NotFound(f"unable to find group {name}: no matching entries in group file")
    return number
