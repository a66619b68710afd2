"""What the collector keeps, against a plain reading of the rules on graphs that hypothesis makes up."""

import sqlite3

from hypothesis import given, settings
from hypothesis import strategies as st

from boxship.api.containerd import pb
from boxship.containerd.metadata.database import MIGRATIONS, dump
from boxship.containerd.metadata.graph import Graph, expiry, named

NOW = 1_000_000_000 * 10**9
PAST, FUTURE = "2001-01-01T00:00:00Z", "2031-01-01T00:00:00+02:00"
NAMES = ["a", "b", "c", "d"]


def edge_labels(draw):
    labels = {}
    for number, (kind, name) in enumerate(draw(st.lists(st.tuples(
            st.sampled_from(["content", "image", "snapshot.s", "snapshot.t/x"]), st.sampled_from(NAMES)), max_size=2))):
        separator = "/" if kind.endswith("/x") else "."
        labels[f"containerd.io/gc.ref.{kind}{separator}{number}" if "snapshot" not in kind or separator == "/"
               else f"containerd.io/gc.ref.{kind}"] = name
    if draw(st.integers(0, 5)) == 0:
        labels[f"containerd.io/gc.bref.{draw(st.sampled_from(['content', 'image', 'container', 'snapshot.s']))}"] = draw(
            st.sampled_from(NAMES))
    return labels


@st.composite
def worlds(draw):
    """Things of one kind after another, each with the labels and links that it may have."""
    world = {"content": {}, "images": {}, "snapshots/s": {}, "snapshots/t": {}, "containers": {}, "leases": {}, "ingests": {}}
    subset = st.lists(st.sampled_from(NAMES), unique=True)
    for name in draw(subset):
        labels = edge_labels(draw)
        if draw(st.integers(0, 4)) == 0:
            labels["containerd.io/gc.root"] = "1"
        world["content"][name] = labels
    for kind in ("snapshots/s", "snapshots/t"):
        known = []
        for name in draw(subset):
            parent = draw(st.sampled_from(["", *known]))
            labels = edge_labels(draw)
            if draw(st.integers(0, 4)) == 0:
                labels["containerd.io/gc.root"] = "1"
            world[kind][name] = (parent, labels)
            known.append(name)
    for name in draw(subset):
        labels = edge_labels(draw)
        expire = draw(st.sampled_from(["", PAST, FUTURE, "nonsense"]))
        if expire:
            labels["containerd.io/gc.expire"] = expire
        world["images"][name] = (draw(st.sampled_from(NAMES)), labels)
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=1)):
        world["containers"][name] = (draw(st.sampled_from(["", *NAMES])), edge_labels(draw))
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=2)):
        labels = {}
        expire = draw(st.sampled_from(["", PAST, FUTURE]))
        if expire:
            labels["containerd.io/gc.expire"] = expire
        if draw(st.booleans()):
            labels["containerd.io/gc.flat"] = "1"
        held = draw(st.lists(st.tuples(
            st.sampled_from(["content", "images", "snapshots/s", "ingests"]), st.sampled_from(NAMES)), max_size=2, unique=True))
        world["leases"][name] = (labels, held)
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=2)):
        world["ingests"][name] = (draw(st.sampled_from(["", *NAMES])), draw(st.sampled_from([0, NOW - 1, NOW + 1])))
    return world


def stored(world):
    rows = sqlite3.connect(":memory:", isolation_level=None)
    rows.executescript(MIGRATIONS[1])
    for name, labels in world["content"].items():
        rows.execute("INSERT INTO blobs VALUES ('n',?,1,0,0,?)", (name, dump(labels)))
    for kind in ("snapshots/s", "snapshots/t"):
        for name, (parent, labels) in world[kind].items():
            rows.execute("INSERT INTO snapshots VALUES (?,'n',?,?,?,2,0,0,?)", (kind[-1], name, name, parent, dump(labels)))
    for name, (target, labels) in world["images"].items():
        image = pb.images.Image(name=name, labels=labels, target=pb.types.Descriptor(digest=target))
        rows.execute("INSERT INTO records VALUES ('image','n',?,?)", (name, image.SerializeToString()))
    for name, (key, labels) in world["containers"].items():
        container = pb.containers.Container(id=name, labels=labels, snapshotter="s" if key else "", snapshot_key=key)
        rows.execute("INSERT INTO records VALUES ('container','n',?,?)", (name, container.SerializeToString()))
    for name, (labels, held) in world["leases"].items():
        rows.execute("INSERT INTO leases VALUES ('n',?,0,?)", (name, dump(labels)))
        rows.executemany("INSERT INTO resources VALUES ('n',?,?,?)", [(name, *each) for each in held])
    for name, (expected, expires) in world["ingests"].items():
        rows.execute("INSERT INTO ingests VALUES ('n',?,?,?,?)", (name, name, expected, expires))
    return rows


def labels_of(world, kind, name):
    found = world[kind].get(name)
    if found is None or kind in ("leases", "ingests"):
        return {}
    return found if kind == "content" else found[1]


def expected(world):
    """Every rule again and again until nothing more is kept: slow, and with no order that could be wrong."""
    whole, flat = set(), set()
    for kind in ("content", "snapshots/s", "snapshots/t"):
        whole |= {(kind, name) for name in world[kind] if "containerd.io/gc.root" in labels_of(world, kind, name)}
    whole |= {("images", name) for name, (_, labels) in world["images"].items() if labels.get("containerd.io/gc.expire") != PAST}
    whole |= {("containers", name) for name in world["containers"]}
    whole |= {("ingests", name) for name, (_, expires) in world["ingests"].items() if expires > NOW}
    for name, (labels, held) in world["leases"].items():
        if labels.get("containerd.io/gc.expire") != PAST:
            whole.add(("leases", name))
            (flat if "containerd.io/gc.flat" in labels else whole).update(held)
    while True:
        before = len(whole), len(flat)
        for kind, name in list(whole):
            whole |= links(world, kind, name)
            whole |= {node[1:] for node in named("n", labels_of(world, kind, name), "containerd.io/gc.ref.")}
            for other in world:
                for each in world[other]:
                    if any(node[1:] == (kind, name) for node in named("n", labels_of(world, other, each), "containerd.io/gc.bref.")):
                        whole.add((other, each))
        for kind, name in list(flat):
            flat |= links(world, kind, name)
        if before == (len(whole), len(flat)):
            return whole | flat


def links(world, kind, name):
    found = world[kind].get(name)
    if found is None:
        return set()
    if kind == "images":
        return {("content", found[0])}
    if kind == "ingests":
        return {("content", found[0])} if found[0] else set()
    if kind == "containers":
        return {("snapshots/s", found[0])} if found[0] else set()
    if kind.startswith("snapshots/"):
        return {(kind, found[0])} if found[0] else set()
    return set()


@settings(max_examples=120, deadline=None)
@given(worlds())
def test_what_is_garbage_is_what_no_rule_keeps(world):
    garbage = Graph(stored(world), NOW).garbage()
    kept = expected(world)
    found = {node[1:] for nodes in garbage for node in nodes}
    there = {(kind, name) for kind in world for name in world[kind] if kind != "containers"}
    assert found == there - kept


def test_what_is_held_flat_keeps_its_parents_and_target_and_no_more():
    world = {
        "content": {"a": {"containerd.io/gc.ref.content.0": "b"}, "b": {}}, "images": {"a": ("a", {"containerd.io/gc.expire": PAST})},
        "snapshots/s": {"a": ("", {}), "b": ("a", {"containerd.io/gc.ref.content.0": "b"}), "c": ("a", {})}, "snapshots/t": {},
        "containers": {}, "ingests": {},
        "leases": {"a": ({"containerd.io/gc.flat": "1"}, [("snapshots/s", "b"), ("images", "a")])},
    }
    garbage = Graph(stored(world), NOW).garbage()
    assert {node[1:] for nodes in garbage for node in nodes} == {("content", "b"), ("snapshots/s", "c")}


def test_labels_name_what_they_refer_to():
    labels = {
        "containerd.io/gc.ref.content": "d0", "containerd.io/gc.ref.content.l.1": "d1", "containerd.io/gc.ref.content/m": "d2",
        "containerd.io/gc.ref.contents": "no", "containerd.io/gc.ref.snapshot.overlayfs": "k",
        "containerd.io/gc.ref.snapshot.erofs/other": "k2", "containerd.io/gc.ref.image.base": "i",
        "containerd.io/gc.ref.container": "no", "other": "no",
    }
    assert set(named("n", labels, "containerd.io/gc.ref.")) == {
        ("n", "content", "d0"), ("n", "content", "d1"), ("n", "content", "d2"), ("n", "snapshots/overlayfs", "k"),
        ("n", "snapshots/erofs", "k2"), ("n", "images", "i"),
    }


def test_a_time_is_read_as_go_writes_it():
    key = "containerd.io/gc.expire"
    assert expiry({key: "2001-09-09T03:46:40+02:00"}) == NOW
    assert expiry({key: "2001-09-09T01:46:40.5Z"}) == NOW + 5 * 10**8
    assert expiry({key: "2001-09-09T01:46:40.123456789Z"}) // 10**9 == NOW // 10**9
    assert expiry({key: "tomorrow"}) == expiry({}) == 0
