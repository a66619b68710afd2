"""Names, files and command lines that were made to hurt: each is taken as it is meant, or refused with a clear error."""

from __future__ import annotations

import copy
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.machine import Bundle, Done, Machine


def refused(done: Done, code: int = 1) -> None:
    """An error that is one: told in a line, with the exit status of errors, and no exception of the interpreter."""
    assert done.code == code, done
    assert "Traceback" not in done.err and "was killed" not in done.err, done
    assert done.err.strip(), done


TRAVERSING = [
    "..", ".", "", "../evil", "../../evil", "a/b", "/evil", "./evil", "evil/", "evil/..", "..\\evil", "a b", "a\nb", "a\tb", "é", "a*",
    "@seccomp", "a:b", "x" * 1025, "\x01", "%2e%2e", "a\x7f", "~", "$(id)", "`id`", "\udcff",
]


@pytest.mark.parametrize("command", ["create", "run", "state", "start", "kill", "delete", "exec", "pause", "ps", "update"])
def test_a_container_id_is_never_a_way_to_other_folders(machine: Machine, bundle: Bundle, command: str) -> None:
    """Path traversal in ids: a folder beside the runtime's own, which looks as if it were a container's, stays as it is."""
    decoy = Path(f"{machine.root}/run/boxship/evil")
    decoy.mkdir(parents=True, exist_ok=True)
    record = {"id": "evil", "pid": 1, "pidStart": 0, "cgroup": {}, "creating": False}
    (decoy / "state.json").write_text(json.dumps(record))
    path = bundle.write()
    flags = {"create": ["-b", path], "run": ["-b", path], "delete": ["--force"]}.get(command, [])
    rest = {"exec": ["true"], "kill": ["KILL"], "update": ["--pids-limit", "10"]}.get(command, [])
    try:
        names = TRAVERSING if command in ("create", "delete") else TRAVERSING[:10]
        for name in names:
            done = machine(command, *flags, "--", name, *rest)
            refused(done, 255 if command == "exec" else 1)
        assert sorted(p.name for p in decoy.iterdir()) == ["state.json"]
        assert json.loads((decoy / "state.json").read_text()) == record
    finally:
        (decoy / "state.json").unlink()
        decoy.rmdir()


def test_a_record_that_is_a_link_is_no_container(machine: Machine, bundle: Bundle) -> None:
    """The state folder holds real folders only: a link there leads nowhere."""
    victim = machine.folder / "linked"
    victim.mkdir()
    (victim / "state.json").write_text("{}")
    link = Path(f"{machine.root}/run/boxship/boxrun/linked")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    try:
        refused(machine("state", "linked"))
        machine("delete", "--force", "linked")
        assert (victim / "state.json").read_text() == "{}"
    finally:
        link.unlink()


def limited() -> None:
    """A process that may use 600 MB of address space in all."""
    resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize(
    "shape", ["padding", "string", "list", "deep-lists", "deep-objects", "deep-annotation", "digits", "binary", "endless", "folder", "fifo"]
)
def test_a_huge_or_deep_configuration_is_refused_soon(machine: Machine, bundle: Bundle, shape: str, warm: bool) -> None:
    """100 MB of config.json in several shapes, and 100,000 levels: an error within seconds, in little memory."""
    bundle.write()
    path = bundle.path / "config.json"
    text = path.read_text()
    size = 100 << 20
    if shape == "padding":
        path.write_text(text + " " * size)
    elif shape == "string":
        path.write_text(text[:-1] + ', "x": "' + "x" * size + '"}')
    elif shape == "list":
        path.write_text(text[:-1] + ', "x": [' + "[]," * (size // 3) + "[]]}")
    elif shape == "deep-lists":
        path.write_text("[" * 100_000 + "]" * 100_000)
    elif shape == "deep-objects":
        path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    elif shape == "deep-annotation":
        path.write_text(text[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}")
    elif shape == "digits":
        path.write_text(text.replace('"uid": 0', '"uid": ' + "9" * 1_000_000))
    elif shape == "binary":
        path.write_bytes(os.urandom(1 << 20))
    else:
        path.unlink()
        if shape == "endless":
            os.mknod(path, 0o20666, os.makedev(1, 5))
        elif shape == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
            # Somebody who writes nothing: a runtime that opened it would wait.
            os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    begun = time.monotonic()
    refused(machine("create", "-b", str(bundle.path), machine.name(), warm=warm, before=limited, timeout=30))
    assert time.monotonic() - begun < 15


def test_a_large_configuration_that_is_allowed_works(machine: Machine, bundle: Bundle) -> None:
    """4 MB of annotations, environment and arguments: what the kernel takes a container may have."""
    bundle.spec["annotations"] = {f"key{i}": "v" * 1000 for i in range(3000)}
    bundle.process["env"] = [*bundle.process["env"], *(f"V{i}={'x' * 500}" for i in range(1000))]  # type: ignore[misc]
    bundle.process["args"] = ["sh", "-c", "env | grep -c ^V; echo $#", *("y" * 100 for _ in range(5000))]
    assert machine.ok("run", "-b", bundle.write(), machine.name()).split() == ["1000", "4999"]


@pytest.mark.parametrize("what", ["argument", "arguments", "environment", "variable", "program", "cwd", "hostname", "path"])
def test_what_no_program_could_be_given_is_an_error(machine: Machine, bundle: Bundle, what: str) -> None:
    """Arguments and environment beyond the kernel's limits, or beyond what fits between runtime and init."""
    if what == "argument":
        bundle.process["args"] = ["true", "x" * (20 << 20)]
    elif what == "arguments":
        bundle.process["args"] = ["true", *("x" * 1000 for _ in range(30_000))]
    elif what == "environment":
        bundle.process["env"] = [f"V{i}={'x' * 1000}" for i in range(30_000)]
    elif what == "variable":
        bundle.process["env"] = ["PATH=/bin", "V=" + "x" * (200 << 10)]
    elif what == "program":
        bundle.process["args"] = ["/" + "x" * 5000]
    elif what == "cwd":
        bundle.process["cwd"] = "/" + "/".join("x" * 200 for _ in range(30))
    elif what == "hostname":
        bundle.spec["hostname"] = "x" * 65
    elif what == "path":
        bundle.process["env"] = ["PATH=" + ":".join("/x" * 100 for _ in range(20_000))]
    done = machine("run", "-b", bundle.write(), machine.name())
    # 255: execve(2) itself refused, which is the end of a process that was there.
    refused(done, 255 if what == "variable" else 1)


def test_ten_thousand_mounts_are_made_or_refused(machine: Machine, bundle: Bundle) -> None:
    """A configuration that is merely long works: 10,000 mounts, each seen inside."""
    bundle.without("/sys/fs/cgroup")
    bundle.mounts.extend({"type": "tmpfs", "source": "many", "destination": f"/tmp/m{i}"} for i in range(3))
    (bundle.rootfs / "tmp").chmod(0o777)
    bundle.writable()
    source = bundle.path / "source"
    source.mkdir()
    for i in range(10_000):
        (bundle.rootfs / "mnt" / str(i)).mkdir()
        bundle.mounts.append({"type": "bind", "source": str(source), "destination": f"/mnt/{i}", "options": ["bind", "ro"]})
    bundle.shell("grep -c ' /mnt/' /proc/self/mountinfo")
    assert machine.ok("run", "-b", bundle.write(), machine.name(), timeout=60).strip() == "10000"


def test_mounts_with_long_names_never_overflow_what_is_between_runtime_and_init(machine: Machine, bundle: Bundle) -> None:
    """CVE-2021-43784: lengths that wrap in the message to init. Ours are 64 bits; what is too much is sent in parts."""
    long = "/".join("d" * 200 for _ in range(19))
    bundle.writable()
    source = bundle.path / "source"
    source.mkdir()
    for _ in range(3000):
        bundle.mounts.append({"type": "bind", "source": str(source), "destination": f"/mnt/{long}", "options": ["bind"]})
    bundle.process["args"] = ["true"]
    done = machine("run", "-b", bundle.write(), machine.name(), timeout=60)
    assert "Traceback" not in done.err and "was killed" not in done.err, done
    assert done.code == 0, done


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 3, 1 << 20])
def test_a_mount_source_or_mapping_that_is_too_long_is_refused(machine: Machine, bundle: Bundle, size: int) -> None:
    """CVE-2021-43784, its own attack: a source of 64 KiB that ends in what init would take for a field of its own."""
    bundle.mounts.append({"type": "bind", "source": "/" + "a" * size, "destination": "/mnt", "options": ["bind"]})
    refused(machine("run", "-b", bundle.write(), machine.name()))


def test_more_id_mappings_than_the_kernel_takes_are_refused(machine: Machine, bundle: Bundle) -> None:
    """CVE-2021-43784, its other attack: thousands of mappings."""
    bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
    for kind in ("uidMappings", "gidMappings"):
        bundle.linux[kind] = [{"containerID": i, "hostID": i, "size": 1} for i in range(5000)]
    refused(machine("run", "-b", bundle.write(), machine.name()))


def rich(bundle: Bundle) -> dict[str, object]:
    """A configuration that has something in most places, and starts."""
    spec = copy.deepcopy(bundle.spec)
    linux, process = spec["linux"], spec["process"]
    assert isinstance(linux, dict) and isinstance(process, dict)
    process["args"] = ["true"]
    process["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": 100, "soft": 100}]
    process["user"] = {"uid": 0, "gid": 0, "umask": 18, "additionalGids": [5]}
    process["scheduler"] = {"policy": "SCHED_OTHER", "nice": 1}
    process["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 4}
    process["oomScoreAdj"] = 100
    process["consoleSize"] = {"height": 1, "width": 1}
    spec["domainname"] = "domain"
    spec["annotations"] = {"key": "value"}
    spec["hooks"] = {kind: [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 5}] for kind in
                     ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")}
    linux["sysctl"] = {"net.ipv4.ip_forward": "0"}
    linux["resources"] = {
        "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}],
        "pids": {"limit": 100}, "memory": {"limit": 1 << 28, "swap": -1}, "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0"},
    }
    linux["devices"] = [{"path": "/dev/own", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 0}]
    linux["rootfsPropagation"] = "private"
    linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}],
    }
    linux["cgroupsPath"] = ""
    return spec


def places(node: object, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], object]]:
    """Every value in a document, with the way to it; of equal elements of a list the first."""
    yield path, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from places(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node[:2]):
            yield from places(value, (*path, index))


def replaced(document: object, path: tuple[object, ...], value: object) -> object:
    document = copy.deepcopy(document)
    if not path:
        return value
    at = document
    for step in path[:-1]:
        at = at[step]  # type: ignore[index]
    at[path[-1]] = value  # type: ignore[index]
    return document


KEYS_THAT_REACH_NOBODY = ("annotations", "ociVersion")


def test_no_string_of_the_configuration_is_cut_at_a_nul_byte(machine: Machine, bundle: Bundle) -> None:
    """NUL bytes: "/mnt\\0/../.." must not become "/mnt" on its way to the kernel; every field refuses it."""
    machine.warm_up()
    spec = rich(bundle)
    path = bundle.path / "config.json"
    accepted = []
    tried = 0
    for way, value in places(spec):
        if not isinstance(value, str):
            continue
        tried += 1
        path.write_text(json.dumps(replaced(spec, way, value + "\0evil")))
        container = machine.name()
        done = machine("create", "-b", str(bundle.path), container)
        assert "Traceback" not in done.err and "was killed" not in done.err, (way, done)
        if done.code == 0:
            started = machine("start", container)
            assert "Traceback" not in started.err, (way, started)
            if started.code == 0 and way[0] not in KEYS_THAT_REACH_NOBODY:
                accepted.append(way)
            machine.ok("delete", "--force", container)
    assert tried > 60
    assert not accepted


def test_a_value_of_a_wrong_type_is_refused_or_harmless(machine: Machine, bundle: Bundle) -> None:
    """Every place of the configuration in turn holds something that it should not: never an exception, never a leak."""
    machine.warm_up()
    machine.ok("run", "-b", _written(bundle, rich(bundle)), machine.name())
    spec = rich(bundle)
    wrong = [None, True, -1, 1 << 70, 1.5, "", "x", [], {}, [None], {"x": 1}]
    count = 0
    for number, (way, value) in enumerate(places(spec)):
        # All values at each place would take a minute: each place gets two of them, each value a sixth of the places.
        for bad in wrong[number % 6 :: 6]:
            if type(bad) is type(value) and bad == value:
                continue
            count += 1
            container = machine.name()
            done = machine("create", "-b", _written(bundle, replaced(spec, way, bad)), container)
            assert "Traceback" not in done.err and "was killed" not in done.err, (way, bad, done)
            assert done.code in (0, 1), (way, bad, done)
            if done.code == 0:
                machine.ok("delete", "--force", container)
            else:
                assert done.err.strip(), (way, bad)
    assert count > 200


def _written(bundle: Bundle, spec: object) -> str:
    (bundle.path / "config.json").write_text(json.dumps(spec))
    return str(bundle.path)


@pytest.mark.parametrize("text", ["", "null", "[]", "1", '"x"', "{", '{"process":', "{}{}", "\ufeff{}", "NaN", '{"a": 1,}', "{'a': 1}", "// x"])
def test_what_is_no_configuration_is_refused(machine: Machine, bundle: Bundle, text: str) -> None:
    """Not an object, half of one, or more than one."""
    (bundle.path / "config.json").write_text(text)
    refused(machine("create", "-b", str(bundle.path), machine.name()))


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--preserve-fds", "-1", "ID"], ["run", "--preserve-fds", "1000000000", "ID"], ["run", "--preserve-fds", "99999999999999999999", "ID"],
        ["kill", "ID", "-9"], ["kill", "ID", "0x9"], ["kill", "ID", "65"], ["kill", "ID", "99999999999999999999"], ["kill", "ID", "KILL\n"],
        ["kill", "ID", ""], ["update", "--memory", "9" * 30, "ID"], ["update", "--memory", "-5", "ID"], ["update", "--cpu-share", "x", "ID"],
        ["update", "--resources", "/nowhere", "ID"], ["events", "--interval", "-1s", "ID"], ["events", "--interval", "9" * 400 + "s", "ID"],
        ["exec", "--process", "/dev/null", "ID"], ["exec", "--process", "/proc/self/mem", "ID"], ["exec", "--env", "noequals", "ID", "true"],
        ["exec", "--cgroup", "../../..", "ID", "true"], ["exec", "--cgroup", "/../escape", "ID", "true"], ["exec", "ID", ""],
        ["ps", "--format", "x", "ID"], ["--root", "/", "list"], ["--log-format", "x", "list"], ["--root", "/dev/null", "run", "ID"],
        ["spec", "-b", "/dev/null"], ["run", "--console-socket", "/dev/null", "ID"], ["run", "--pid-file", "/nowhere/pid", "ID"],
        ["run", "--pidfd-socket", "/dev/null", "ID"], ["exec", "--preserve-fds", "-5", "ID", "true"], ["exec", "--cap", "CAP_X", "--cwd", "x", "ID", "true"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_a_wrong_command_line_is_an_error_and_changes_nothing(machine: Machine, bundle: Bundle, words: list[str]) -> None:
    """Flags with values out of every range. The container that they name goes on."""
    container = machine.name()
    bundle.write()
    running = "run" not in words
    if running and "ID" in words:
        machine.ok("run", "-d", "-b", str(bundle.path), container)
    for warm in (True, False):
        given = [container if word == "ID" else word for word in words]
        if "run" in words:
            given[given.index("run") + 1 : given.index("run") + 1] = ["-b", str(bundle.path)]
        done = machine(*given, warm=warm, timeout=20)
        assert done.code not in (0, 137), done
        assert "Traceback" not in done.err and "was killed" not in done.err, done
    if running and "ID" in words:
        assert machine.state(container)["status"] == "running"
        machine.ok("delete", "--force", container)
