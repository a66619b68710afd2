"""What keeps what: the marking half of garbage collection, on rows in memory.

Runs in: any thread; does no I/O but its queries.
Spec: containerd docs/garbage-collection.md, core/metadata/gc.go.

    roots    leases that have not expired and what they hold; images that have not expired; containers;
             content and snapshots with the label containerd.io/gc.root; ingests that no lease holds, for a day;
             what the labels of sandboxes refer to
    edges    containerd.io/gc.ref.content[.NAME], .gc.ref.image[.NAME], .gc.ref.snapshot.SNAPSHOTTER[/NAME]: from whatever has
             the label to what it names; containerd.io/gc.bref.content, .container, .image, .snapshot.SNAPSHOTTER: the other way
             round; an image's target, a container's snapshot, a snapshot's parent, what an ingest expects
    flat     a lease with containerd.io/gc.flat keeps what it holds (of an image its target too, of a snapshot its parents),
             but not what the labels of that refer to
"""

from __future__ import annotations

import logging
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from boxship.api.containerd import pb
from boxship.containerd.metadata.database import load

log = logging.getLogger("boxship.gc")

PREFIX = "containerd.io/gc."
ROOT = "containerd.io/gc.root"
EXPIRE = "containerd.io/gc.expire"
FLAT = "containerd.io/gc.flat"
REFERENCE = "containerd.io/gc.ref."
BACK_REFERENCE = "containerd.io/gc.bref."
TYPES = {"content": "content", "image": "images", "container": "containers"}
"""What a label calls a thing → its type as leases call it."""

Node = tuple[str, str, str]
"""(namespace, type, id); the types are those of leases' resources, and "containers", "leases"."""


class Garbage(NamedTuple):
    """What nothing keeps."""

    content: list[Node]
    snapshots: list[Node]
    ingests: list[Node]
    images: list[Node]
    leases: list[Node]

    def total(self) -> int:
        """Of all kinds together."""
        return sum(map(len, self))


def named(namespace: str, labels: Mapping[str, str], prefix: str) -> Iterator[Node]:
    """What the labels refer to that begin with `prefix`, REFERENCE or BACK_REFERENCE."""
    for key, value in labels.items():
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix):]
        if rest.startswith("snapshot."):
            yield namespace, "snapshots/" + rest[len("snapshot."):].partition("/")[0], value
            continue
        for word, kind in TYPES.items():
            if rest == word or rest.startswith((f"{word}.", f"{word}/")):
                if prefix == BACK_REFERENCE or word != "container":
                    yield namespace, kind, value
                break


def expiry(labels: Mapping[str, str]) -> int:
    """The time of `containerd.io/gc.expire` (RFC 3339) in nanoseconds since 1970; 0 without one, or when it cannot be read."""
    text = labels.get(EXPIRE)
    if not text:
        return 0
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        log.info("ignoring %s=%s, which is no time of RFC 3339", EXPIRE, text)
        return 0
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1e9)


class Graph:
    """All that may keep and be kept, read from the database at one moment."""

    def __init__(self, rows: sqlite3.Connection, at: int) -> None:
        """`at`: the time, nanoseconds since 1970, at which things are expired or not."""
        self.roots: list[Node] = []
        self.flat: list[Node] = []
        self.edges: dict[Node, list[Node]] = defaultdict(list)
        """Followed from what is kept, flat or not."""
        self.references: dict[Node, list[Node]] = defaultdict(list)
        """By labels; not followed from what is kept flat."""
        self.next_expiry = 0
        """When the next of the things that keep something now will cease to; 0: never."""
        self._at = at
        self._content: list[Node] = []
        self._snapshots: list[Node] = []
        self._ingests: list[Node] = []
        self._images: list[Node] = []
        self._leases: list[Node] = []
        self._read_content(rows)
        self._read_snapshots(rows)
        self._read_ingests(rows)
        self._read_records(rows)
        self._read_leases(rows)

    def garbage(self) -> Garbage:
        """What cannot be reached."""
        kept = self.kept()
        return Garbage(*([node for node in nodes if node not in kept] for nodes in (
            self._content, self._snapshots, self._ingests, self._images, self._leases)))

    def kept(self) -> set[Node]:
        """What can be reached from a root."""
        kept: set[Node] = set()
        todo = list(self.roots)
        while todo:
            node = todo.pop()
            if node not in kept:
                kept.add(node)
                todo += self.edges.get(node, ())
                todo += self.references.get(node, ())
        # Flat ones last, and apart: what is kept in both ways is kept whole.
        flat: set[Node] = set()
        todo = list(self.flat)
        while todo:
            node = todo.pop()
            if node not in kept and node not in flat:
                flat.add(node)
                todo += self.edges.get(node, ())
        return kept | flat

    def _labelled(self, node: Node, text: str) -> dict[str, str]:
        """The labels of a node; what they refer to is noted."""
        if PREFIX not in text:
            return {}
        return self._noted(node, load(text))

    def _noted(self, node: Node, labels: dict[str, str]) -> dict[str, str]:
        self.references[node] += named(node[0], labels, REFERENCE)
        for other in named(node[0], labels, BACK_REFERENCE):
            self.references[other].append(node)
        return labels

    def _lives(self, labels: Mapping[str, str]) -> bool:
        return self._lasts(expiry(labels))

    def _lasts(self, until: int) -> bool:
        """Whether that is still to come, or 0; the earliest that is to come is remembered."""
        if not until:
            return True
        if until <= self._at:
            return False
        self.next_expiry = min(self.next_expiry or until, until)
        return True

    def _read_content(self, rows: sqlite3.Connection) -> None:
        for namespace, digest, text in rows.execute("SELECT namespace, digest, labels FROM blobs"):
            node = (namespace, "content", digest)
            self._content.append(node)
            if ROOT in self._labelled(node, text):
                self.roots.append(node)

    def _read_snapshots(self, rows: sqlite3.Connection) -> None:
        for snapshotter, namespace, key, parent, text in rows.execute(
            "SELECT snapshotter, namespace, key, parent, labels FROM snapshots"
        ):
            node = (namespace, f"snapshots/{snapshotter}", key)
            self._snapshots.append(node)
            if parent:
                self.edges[node].append((namespace, f"snapshots/{snapshotter}", parent))
            if ROOT in self._labelled(node, text):
                self.roots.append(node)
        # What is being committed is kept as long as that lasts.
        for snapshotter, namespace, key in rows.execute("SELECT snapshotter, namespace, key FROM commits"):
            self.roots.append((namespace, f"snapshots/{snapshotter}", key))

    def _read_ingests(self, rows: sqlite3.Connection) -> None:
        for namespace, ref, expected, expires in rows.execute("SELECT namespace, ref, expected, expires FROM ingests"):
            node = (namespace, "ingests", ref)
            self._ingests.append(node)
            if expected:
                self.edges[node].append((namespace, "content", expected))
            if expires and self._lasts(expires):
                self.roots.append(node)

    def _read_records(self, rows: sqlite3.Connection) -> None:
        for kind, namespace, name, record in rows.execute("SELECT kind, namespace, id, record FROM records"):
            if kind == "image":
                image = pb.images.Image.FromString(record)
                node = (namespace, "images", name)
                self._images.append(node)
                labels = self._noted(node, dict(image.labels))
                self.edges[node].append((namespace, "content", image.target.digest))
                if self._lives(labels):
                    self.roots.append(node)
            elif kind == "container":
                container = pb.containers.Container.FromString(record)
                node = (namespace, "containers", name)
                self._noted(node, dict(container.labels))
                if container.snapshotter:
                    self.edges[node].append((namespace, f"snapshots/{container.snapshotter}", container.snapshot_key))
                self.roots.append(node)
            else:
                sandbox = pb.types.Sandbox.FromString(record)
                self.roots += named(namespace, sandbox.labels, REFERENCE)

    def _read_leases(self, rows: sqlite3.Connection) -> None:
        flat: dict[tuple[str, str], bool] = {}
        for namespace, name, text in rows.execute("SELECT namespace, id, labels FROM leases"):
            labels = load(text)
            self._leases.append((namespace, "leases", name))
            if self._lives(labels):
                flat[namespace, name] = FLAT in labels
                self.roots.append((namespace, "leases", name))
        for namespace, lease, kind, name in rows.execute("SELECT namespace, lease, type, id FROM resources"):
            if (namespace, lease) in flat:
                (self.flat if flat[namespace, lease] else self.roots).append((namespace, kind, name))
