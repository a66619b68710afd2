"""The one tree of errors, by what the caller can do about them.

Runs in: every process.
The classes follow the field's own categories (containerd's errdefs, gRPC's codes), so that every seam maps them by table.

    BoxshipError
    ├── InvalidArgument      the request itself is wrong: change it
    ├── NotFound             the thing named does not exist
    ├── AlreadyExists        the name is taken
    ├── FailedPrecondition   right request, wrong state: do something else first
    ├── PermissionDenied     the caller or the kernel's policy forbids it
    ├── Unavailable          a peer or a resource is not there now: try again later
    ├── Unsupported          the kernel, the machine or this version cannot do it
    └── Internal             a promise between our own parts was broken
"""

from __future__ import annotations


class BoxshipError(Exception):
    """A failure with a text for people: what failed, on what, and (`hint`) what to do about it.

    The text is lower case and has no full stop, because callers put their own context in front of it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message} ({self.hint})" if self.hint else message


class InvalidArgument(BoxshipError):
    """The request is wrong in itself."""


class NotFound(BoxshipError):
    """What the request names does not exist."""


class AlreadyExists(BoxshipError):
    """The name is in use."""


class FailedPrecondition(BoxshipError):
    """The object is in a state that does not allow this."""


class PermissionDenied(BoxshipError):
    """The kernel or a policy forbids it to this caller."""


class Unavailable(BoxshipError):
    """A peer or resource is missing for now."""


class Unsupported(BoxshipError):
    """The kernel or this version cannot do it."""


class Internal(BoxshipError):
    """Two of our own parts disagree."""


def from_os_error(error: OSError, doing: str) -> BoxshipError:
    """Wrap `error` with what was being done, in the tree's class for its errno; the text ends as Go's errors do.

    Clients of runc match "no such file or directory", "permission denied" and the like in lower case.
    """
    import errno

    kinds: dict[int, type[BoxshipError]] = {
        errno.EPERM: PermissionDenied, errno.EACCES: PermissionDenied,
        errno.ENOENT: NotFound, errno.ESRCH: NotFound,
        errno.EEXIST: AlreadyExists, errno.EINVAL: InvalidArgument,
        errno.ENOSYS: Unsupported, errno.EOPNOTSUPP: Unsupported, errno.EAGAIN: Unavailable,
    }
    text = (error.strerror or str(error)).lower()
    where = f" {error.filename}" if error.filename else ""
    kind = kinds.get(error.errno or 0, BoxshipError)
    return kind(f"{doing}{where}: {text}")
