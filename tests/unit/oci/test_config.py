"""config.json of runtime-spec 1.3.0."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument
from boxship.oci import config, text
from boxship.oci.config import Spec
from boxship.oci.struct import Struct, _schema

IDS = [{"containerID": 0, "hostID": 1000, "size": 10}]
HOOK = [{"path": "/bin/hook", "args": ["hook"], "env": ["A=b"], "timeout": 5}]
SHARED: dict[str, object] = {
    "ociVersion": "1.3.0",
    "process": {
        "terminal": True, "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3, 4], "username": "u"},
        "args": ["sh", "-c", "true"], "commandLine": "sh", "env": ["PATH=/bin"], "cwd": "/",
        "capabilities": {kind: ["CAP_KILL"] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2**64 - 1, "soft": 1024}],
        "noNewPrivileges": True, "apparmorProfile": "p", "oomScoreAdj": -100,
        "scheduler": {
            "policy": "SCHED_DEADLINE", "nice": -5, "priority": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"], "runtime": 1,
            "deadline": 2, "period": 3,
        },
        "selinuxLabel": "l", "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "execCPUAffinity": {"initial": "0", "final": "0-1"},
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "h", "domainname": "d",
    "mounts": [
        {"destination": "/x", "type": "bind", "source": "/y", "options": ["rbind"], "uidMappings": IDS, "gidMappings": IDS},
    ],
    "hooks": {
        "prestart": HOOK, "createRuntime": HOOK, "createContainer": HOOK, "startContainer": HOOK, "poststart": HOOK,
        "poststop": HOOK,
    },
    "annotations": {"a.b/c": "d"},
    "linux": {
        "uidMappings": IDS, "gidMappings": IDS, "sysctl": {"net.core.somaxconn": "1"},
        "resources": {
            "devices": [{"allow": False, "type": "c", "major": 1, "minor": -1, "access": "rwm"}, {"allow": True}],
            "memory": {
                "limit": -1, "reservation": 1, "swap": 2, "kernel": 3, "kernelTCP": 4, "swappiness": 0,
                "disableOOMKiller": False, "useHierarchy": True, "checkBeforeUpdate": True,
            },
            "cpu": {
                "shares": 0, "quota": -1, "burst": 1, "period": 2, "realtimeRuntime": 3, "realtimePeriod": 4,
                "cpus": "0-1", "mems": "0", "idle": 1,
            },
            "pids": {"limit": -1},
            "blockIO": {
                "weight": 10, "leafWeight": 20,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 500, "leafWeight": 300}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 600}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 600}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 9223372036854772000}],
            "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
            "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}},
            "unified": {"memory.high": "1"},
        },
        "cgroupsPath": "/p", "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"}],
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0}],
        "netDevices": {"eth0": {"name": "container_eth0"}},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerPath": "/s", "listenerMetadata": "m",
            "syscalls": [
                {
                    "names": ["clone"], "action": "SCMP_ACT_ALLOW", "errnoRet": 38,
                    "args": [{"index": 0, "value": 2114060288, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}],
                },
            ],
        },
        "rootfsPropagation": "rslave", "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "mountLabel": "l",
        "intelRdt": {
            "closID": "c", "schemata": ["L3:0=f"], "l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20",
            "enableMonitoring": True,
        },
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"]},
        "personality": {"domain": "LINUX32", "flags": ["x"]},
        "timeOffsets": {"monotonic": {"secs": -172800, "nanosecs": 5}},
    },
    "vm": {
        "hypervisor": {"path": "/h", "parameters": ["a"]},
        "kernel": {"path": "/k", "parameters": ["b"], "initrd": "/i"},
        "image": {"path": "/r", "format": "raw"},
        "hwconfig": {
            "deviceTree": "/t", "vcpus": 2, "memory": 3, "dtdevs": ["d"],
            "iomems": [{"firstGFN": 1, "firstMFN": 2, "nrMFNs": 3}], "irqs": [4],
        },
    },
}  # fmt: skip
FULL: dict[str, object] = text.loads(text.dumps(SHARED), "full")  # type: ignore[assignment]  # each part an object of its own


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all scalars and empty containers in a JSON value."""
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in places(item, (*path, key))]
    if isinstance(value, list):
        return [place for index, item in enumerate(value) for place in places(item, (*path, index))]
    return [path]


def at(value: object, path: tuple[str | int, ...]) -> object:
    for step in path:
        value = value[step]  # type: ignore[index]
    return value


def with_value(path: tuple[str | int, ...], new: object) -> dict[str, object]:
    changed: dict[str, object] = text.loads(text.dumps(FULL), "full")  # type: ignore[assignment]
    at(changed, path[:-1])[path[-1]] = new  # type: ignore[index]
    return changed


def test_every_field_of_the_specification_is_typed_and_written_back_in_its_order() -> None:
    spec = Spec.decode(FULL)
    assert text.dumps(spec.encode()) == text.dumps(FULL)

    def no_extra(value: object) -> None:
        if isinstance(value, Struct):
            assert value.extra == {}, value
            value = list(vars(value).values())
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                no_extra(item)

    no_extra(spec)


def test_no_structure_has_a_field_that_the_full_example_lacks() -> None:
    """So that the test above covers every field that there is."""
    seen: set[type] = set()

    def visit(value: object) -> None:
        if isinstance(value, Struct):
            seen.add(type(value))
            for name, field in _schema(type(value)).fields.items():
                assert name in vars(value) or field.default is not ..., (value, name)
            for item in vars(value).values():
                visit(item)
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)

    visit(Spec.decode(FULL))
    all_structures = {
        found for _, found in inspect.getmembers(config, inspect.isclass) if issubclass(found, Struct)
    } - {Struct, config.BlockIODevice}  # fmt: skip
    assert seen == all_structures


@pytest.mark.parametrize("path", places(FULL), ids=lambda path: ".".join(map(str, path)))
def test_wrong_type_anywhere_names_its_place(path: tuple[str | int, ...]) -> None:
    shown = text.dumps(path[-1]) if path[0] == "annotations" or "." in str(path[-1]) else path[-1]
    for wrong in ({}, 1.5):
        if at(FULL, path) == wrong:
            continue
        with pytest.raises(InvalidArgument) as caught:
            Spec.decode(with_value(path, wrong))
        where = str(caught.value).split(": ")[0]
        assert str(shown).strip('"') in where
        assert where.startswith(str(path[0]))


@pytest.mark.parametrize(
    "path", [place for place in places(FULL) if isinstance(at(FULL, place), str)], ids=lambda path: ".".join(map(str, path))
)  # fmt: skip
def test_null_byte_in_any_string_is_refused(path: tuple[str | int, ...]) -> None:
    with pytest.raises(InvalidArgument):
        Spec.decode(with_value(path, f"{at(FULL, path)}\0"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("linux", "namespaces", 0, "type"), 'linux.namespaces[0].type: namespace "BAD" does not exist'),
        (("linux", "devices", 0, "type"), 'linux.devices[0].type: invalid device type "BAD"'),
        (("linux", "resources", "devices", 0, "type"), 'invalid cgroup device type "BAD"'),
        (("process", "rlimits", 0, "type"), "process.rlimits[0].type: wrong rlimit value: BAD"),
        (("linux", "rootfsPropagation"), "rootfsPropagation=BAD is not supported"),
        (("process", "ioPriority", "class"), 'invalid ioPriority.Class: "BAD"'),
        (("process", "scheduler", "policy"), "invalid scheduler policy: BAD"),
        (("process", "scheduler", "flags", 0), "process.scheduler.flags[0]: invalid scheduler flag: BAD"),
        (("linux", "memoryPolicy", "mode"), 'linux.memoryPolicy.mode: invalid memory policy mode "BAD"'),
        (("linux", "memoryPolicy", "flags", 0), 'invalid memory policy flag "BAD"'),
        (("linux", "personality", "domain"), "invalid personality domain BAD"),
        (("linux", "seccomp", "defaultAction"), "string BAD is not a valid action for seccomp"),
        (("linux", "seccomp", "syscalls", 0, "action"), "string BAD is not a valid action for seccomp"),
        (("linux", "seccomp", "syscalls", 0, "args", 0, "op"), "string BAD is not a valid operator for seccomp"),
        (("linux", "seccomp", "architectures", 0), "string BAD is not a valid arch for seccomp"),
        (("linux", "seccomp", "flags", 0), "seccomp flag BAD is not known to runc"),
    ],
)  # fmt: skip
def test_unknown_choice_is_refused_in_the_words_of_runc(path: tuple[str | int, ...], words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Spec.decode(with_value(path, "BAD"))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("process", "user", "uid"), 2**32),
        (("process", "user", "uid"), -1),
        (("process", "user", "additionalGids", 0), 2**32),
        (("process", "rlimits", 0, "hard"), 2**64),
        (("process", "scheduler", "nice"), 2**31),
        (("linux", "uidMappings", 0, "size"), 2**32),
        (("linux", "resources", "memory", "limit"), 2**63),
        (("linux", "resources", "blockIO", "weight"), 2**16),
        (("linux", "timeOffsets", "monotonic", "nanosecs"), -1),
        (("linux", "seccomp", "syscalls", 0, "args", 0, "value"), -1),
    ],
)
def test_integer_out_of_range_is_refused(path: tuple[str | int, ...], value: int) -> None:
    with pytest.raises(InvalidArgument, match="expected an integer from"):
        Spec.decode(with_value(path, value))


def test_what_go_reads_as_zero_is_zero() -> None:
    spec = Spec.decode({"ociVersion": "1.0.0", "process": {"args": ["a"], "cwd": "/"}, "linux": {"resources": {"devices": [{}]}}})
    assert spec.process is not None and spec.linux is not None and spec.linux.resources is not None
    assert (spec.process.user.uid, spec.process.user.gid, spec.process.user.umask) == (0, 0, None)
    assert spec.linux.resources.devices[0].allow is False
    assert spec.linux.resources.devices[0].major is None


def test_absent_seccomp_flags_differ_from_none_at_all() -> None:
    absent = config.Seccomp.decode({"defaultAction": "SCMP_ACT_ALLOW"})
    empty = config.Seccomp.decode({"defaultAction": "SCMP_ACT_ALLOW", "flags": []})
    assert absent.flags is None
    assert empty.flags == []
    assert empty.encode() == {"defaultAction": "SCMP_ACT_ALLOW", "flags": []}


def test_parts_for_other_systems_are_kept() -> None:
    obj = {"ociVersion": "1.0.0", "windows": {"layerFolders": ["x"]}, "solaris": {"milestone": "m"}}
    assert Spec.decode(obj).encode() == obj


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(places(FULL)), json_values)
def test_any_value_anywhere_is_read_or_refused_and_survives_a_round_trip(path: tuple[str | int, ...], value: object) -> None:
    try:
        spec = Spec.decode(with_value(path, value))
    except InvalidArgument as error:
        assert str(path[0]) in str(error)
        return
    assert Spec.decode(spec.encode()) == spec
