"""What a snapshot driver does: containerd's `snapshots.Snapshotter`, without namespaces.

Runs in: the daemon, any thread; a driver's methods block for as long as the file system takes, and may be called by several
threads at once.
Spec: containerd 2.x core/snapshots (the meaning of each method), api/services/snapshots/v1 (the kinds' numbers).

A snapshot is *active* (made by prepare, may be written to), a *view* (made by view, read-only) or *committed* (made of an active
one by commit; never changes again, and may be a parent). Active ones and views are addressed by *key*, committed ones by *name*,
and both are one space of names, opaque to the driver.

Not here: namespaces, leases, garbage collection and events (`boxship.containerd.metadata`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

VIEW = 1
ACTIVE = 2
COMMITTED = 3
KINDS = {VIEW: "View", ACTIVE: "Active", COMMITTED: "Committed"}


class Mount:
    """One mount, as mount(8) has it, that a shim carries out below a container's root.

    Attributes:
        type: "bind" or "overlay".
        source: a path of the host, or the type's name where the file system has no source.
        target: a path relative to where the snapshot is mounted; "" for the snapshot itself.
        options: in mount(8)'s words.
    """

    __slots__ = ("options", "source", "target", "type")

    def __init__(self, fstype: str, source: str, options: list[str], target: str = "") -> None:
        self.type = fstype
        self.source = source
        self.options = options
        self.target = target

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mount) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash((self.type, self.source))

    def __repr__(self) -> str:
        return f"Mount{self._all()}"

    def _all(self) -> tuple[str, str, list[str], str]:
        return self.type, self.source, self.options, self.target


class Info:
    """What is known of one snapshot.

    Attributes:
        kind: VIEW, ACTIVE or COMMITTED.
        name: its key or name.
        parent: the name of its parent, "" at the bottom.
        labels: may be changed by update.
        created, updated: nanoseconds since 1970, UTC.
    """

    __slots__ = ("created", "kind", "labels", "name", "parent", "updated")

    def __init__(
        self, name: str, parent: str = "", kind: int = 0, labels: dict[str, str] | None = None,
        created: int = 0, updated: int = 0,
    ) -> None:
        self.name = name
        self.parent = parent
        self.kind = kind
        self.labels = labels if labels is not None else {}
        self.created = created
        self.updated = updated

    def __repr__(self) -> str:
        return f"Info({self.name!r}, parent={self.parent!r}, kind={KINDS.get(self.kind, self.kind)}, labels={self.labels})"


class Usage:
    """What a snapshot takes of the disk beyond its parents.

    Attributes:
        inodes: how many the file system spends on it.
        size: bytes of blocks in use.
    """

    __slots__ = ("inodes", "size")

    def __init__(self, inodes: int = 0, size: int = 0) -> None:
        self.inodes = inodes
        self.size = size

    def __repr__(self) -> str:
        return f"Usage(inodes={self.inodes}, size={self.size})"


class Driver(Protocol):
    """A snapshot driver. Every method may raise OSError for what the disk refuses."""

    name: str
    """How configuration and clients call it: "overlayfs", "native", "erofs"."""
    root: str
    """The directory that it owns."""

    def stat(self, key: str) -> Info:
        """Of any kind; raises NotFound."""

    def update(self, info: Info, fieldpaths: Iterable[str] = ()) -> Info:
        """Change the labels of `info.name`: all of them ("labels" or no field path), or one ("labels.KEY"; absent removes it).

        Answers with the snapshot as it is then. Raises NotFound, InvalidArgument for any other field.
        """

    def usage(self, key: str) -> Usage:
        """What it takes now (active), or took when it was committed; of a view nothing. Raises NotFound."""

    def mounts(self, key: str) -> list[Mount]:
        """How to mount an active snapshot or a view. Raises NotFound, FailedPrecondition for a committed one."""

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make an active snapshot on top of `parent` (empty without one).

        Raises AlreadyExists for the key, NotFound for the parent, InvalidArgument when that is not committed.
        """

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make a read-only snapshot of `parent`; raises as prepare does."""

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """Make the active snapshot `key` the committed one `name`; the key is gone then, and so are its labels.

        Raises NotFound, AlreadyExists for the name, FailedPrecondition when it is not active.
        """

    def remove(self, key: str) -> None:
        """Of any kind. Raises NotFound, FailedPrecondition while others have it as parent."""

    def walk(self) -> Iterator[Info]:
        """Every snapshot, in the order in which they were made."""

    def cleanup(self) -> None:
        """Take away what is on the disk and belongs to no snapshot, and what was left for later when it was removed."""

    def close(self) -> None:
        """Give up the database; what others have mounted stays. May be called twice."""
