"""--user is looked up in the container's own files."""

import pytest

from boxship.kit.errors import InvalidArgument, NotFound
from boxship.oci.users import find

FILES = {
    "/etc/passwd": "root:x:0:0::/root:/bin/sh\n# comment\nbroken\nann:x:1000:1001::/home/ann:/bin/sh\nbob:x:7:7:::\n",
    "/etc/group": "root:x:0:\nann:x:1001:\nwheel:x:10:root,ann\nvideo:x:44:ann\nbob:x:7:bob\n",
}


def read(path: str) -> str:
    return FILES.get(path, "")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", (0, 0, [10], "/root")),
        ("ann", (1000, 1001, [10, 44], "/home/ann")),
        ("1000", (1000, 1001, [10, 44], "/home/ann")),
        ("ann:video", (1000, 44, [], "/home/ann")),
        ("1000:5", (1000, 5, [], "/home/ann")),
        ("4711", (4711, 0, [], "/")),
        ("4711:wheel", (4711, 10, [], "/")),
        ("bob", (7, 7, [], "/")),
    ],
)
def test_users(wanted: str, expected: tuple[int, int, list[int], str]) -> None:
    user = find(wanted, read)
    assert (user.uid, user.gid, user.groups, user.home) == expected


def test_an_image_without_files_has_numbers_only() -> None:
    user = find("12:13", lambda path: "")
    assert (user.uid, user.gid, user.groups, user.home) == (12, 13, [], "/")
    assert find("", lambda path: "").home == "/root"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("eve", "unable to find user eve: no matching entries in passwd file"),
        ("ann:eve", "unable to find group eve: no matching entries in group file"),
        ("-1", "unable to find user -1: no matching entries in passwd file"),
    ],
)
def test_unknown_names_are_refused(wanted: str, message: str) -> None:
    with pytest.raises(NotFound) as caught:
        find(wanted, read)
    assert str(caught.value) == message


def test_ids_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        find(str(2**31), read)
