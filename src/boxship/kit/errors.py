"""The one tree of errors, by what the caller can do about them.

Runs in: every process.
The classes follow the field's own categories (containerd's errdefs, gRPC's codes), so that every seam maps them by table.

    BoxshipError             (code 2, unknown: nothing better is known)
    ├── InvalidArgument      the request itself is wrong: change it
    ├── OutOfRange           the request goes past the end of what there is
    ├── NotFound             the thing named does not exist
    ├── AlreadyExists        the name is taken
    ├── FailedPrecondition   right request, wrong state: do something else first
    ├── Aborted              another request came first: start again
    ├── PermissionDenied     the caller or the kernel's policy forbids it
    ├── Unauthenticated      who the caller is must be proved first
    ├── Unavailable          a peer or a resource is not there now: try again later
    ├── ResourceExhausted    a limit is reached: a quota, a size, the disk
    ├── DeadlineExceeded     it took longer than it may
    ├── Canceled             the caller did not want to wait any longer
    ├── Unsupported          the kernel, the machine or this version cannot do it
    ├── DataLoss             what was stored is damaged
    └── Internal             a promise between our own parts was broken
"""

from __future__ import annotations


class BoxshipError(Exception):
    """A failure with a text for people: what failed, on what, and (`hint`) what to do about it.

    The text is lower case and has no full stop, because callers put their own context in front of it.
    """

    code = 2
    """The number of this category in gRPC and ttRPC."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message} ({self.hint})" if self.hint else message


class InvalidArgument(BoxshipError):
    """The request is wrong in itself."""

    code = 3


class OutOfRange(BoxshipError):
    """The request goes past the end."""

    code = 11


class NotFound(BoxshipError):
    """What the request names does not exist."""

    code = 5


class AlreadyExists(BoxshipError):
    """The name is in use."""

    code = 6


class FailedPrecondition(BoxshipError):
    """The object is in a state that does not allow this."""

    code = 9


class Aborted(BoxshipError):
    """Another request came in between."""

    code = 10


class PermissionDenied(BoxshipError):
    """The kernel or a policy forbids it to this caller."""

    code = 7


class Unauthenticated(BoxshipError):
    """The caller has not proved who it is."""

    code = 16


class Unavailable(BoxshipError):
    """A peer or resource is missing for now."""

    code = 14


class ResourceExhausted(BoxshipError):
    """A limit is reached."""

    code = 8


class DeadlineExceeded(BoxshipError):
    """It took longer than allowed."""

    code = 4


class Canceled(BoxshipError):
    """The caller went away."""

    code = 1


class Unsupported(BoxshipError):
    """The kernel or this version cannot do it."""

    code = 12


class DataLoss(BoxshipError):
    """What was stored is damaged."""

    code = 15


class Internal(BoxshipError):
    """Two of our own parts disagree."""

    code = 13


def from_code(code: int, message: str) -> BoxshipError:
    """The error that a peer reported as gRPC code `code`; a code that is not known becomes BoxshipError itself."""
    for kind in BoxshipError.__subclasses__():
        if vars(kind).get("code") == code and kind.__module__ == __name__:
            return kind(message)
    return BoxshipError(message)


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
        errno.ENOSPC: ResourceExhausted, errno.EDQUOT: ResourceExhausted,
    }
    text = (error.strerror or str(error)).lower()
    where = f" {error.filename}" if error.filename else ""
    kind = kinds.get(error.errno or 0, BoxshipError)
    return kind(f"{doing}{where}: {text}")
