"""One test per rule: the configuration that obeys it passes, the one that breaks it is refused in the expected words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument
from boxship.linux import mounts
from boxship.oci import defaults, text
from boxship.oci.config import IDMapping, Process, Spec
from boxship.oci.validate import MOUNT_OPTIONS, dotted_sysctl, host_id, parse_list, validate, validate_process

IDS = [{"containerID": 0, "hostID": 100000, "size": 65536}]
DEFAULT = text.dumps(defaults.default_spec())


def spec_with(changes: dict[str, object]) -> Spec:
    """The default configuration with values at dotted paths; None removes, `+` at the end of a path appends."""
    obj: object = text.loads(DEFAULT, "default")
    for path, value in changes.items():
        *steps, last = path.removesuffix("+").split(".")
        at: dict[str, object] = obj  # type: ignore[assignment]
        for step in steps:
            at = at.setdefault(step, {})  # type: ignore[assignment]
        if path.endswith("+"):
            at[last] = [*at.get(last, []), value]  # type: ignore[misc]
        elif value is None:
            at.pop(last, None)
        else:
            at[last] = value
    return Spec.decode(obj)


def warnings(changes: dict[str, object], *, rootless: bool = False) -> list[str]:
    return validate(spec_with(changes), rootless=rootless)


def refused(changes: dict[str, object], *, rootless: bool = False, **options: object) -> str:
    with pytest.raises(InvalidArgument) as caught:
        validate(spec_with(changes), rootless=rootless, **options)  # type: ignore[arg-type]
    return str(caught.value)


USERNS: dict[str, object] = {"linux.namespaces+": {"type": "user"}, "linux.uidMappings": IDS, "linux.gidMappings": IDS}


def test_default_configuration_is_fine() -> None:
    assert warnings({}) == []
    assert warnings(USERNS) == []


def test_default_rootless_configuration_is_fine_rootless() -> None:
    obj = defaults.default_spec()
    defaults.to_rootless(obj)
    assert validate(Spec.decode(obj), rootless=True) == []


@pytest.mark.parametrize(
    "version", ["1.0.0", "1.0.2-dev", "1.0.0-rc5", "1.1.0+dev", "1.3.0", "1.99.7", "1.0.0-rc.1+build.5", "1.2.3--x"]
)
def test_any_version_of_major_one_is_read(version: str) -> None:
    assert warnings({"ociVersion": version}) == []


@pytest.mark.parametrize("version", ["0.9.0", "2.0.0", "10.0.0"])
def test_other_majors_are_refused(version: str) -> None:
    assert "unsupported version" in refused({"ociVersion": version})


@pytest.mark.parametrize(
    "version", ["", "1", "1.0", "1.0.x", "v1.0.0", "1.0.0.0", "1.01.0", "1.0.0-", "1.0.0+", "1.0.0-a..b", "1.0.\u0663"]
)
def test_what_is_no_version_is_refused(version: str) -> None:
    assert refused({"ociVersion": version}).startswith("ociVersion: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"process": None}, "process property must not be empty"),
        ({"process.cwd": ""}, "Cwd property must not be empty"),
        ({"process.cwd": "tmp"}, "Cwd must be an absolute path"),
        ({"process.args": []}, "args must not be empty"),
        ({"process.args": None}, "args must not be empty"),
        ({"process.env+": "FOO"}, "invalid environment variable: missing '='"),
        ({"process.env+": "=x"}, "invalid environment variable: name cannot be empty"),
        ({"root": None}, "root must be specified"),
        ({"root.path": ""}, "root.path: must not be empty"),
    ],
)
def test_process_and_root_must_be_there(changes: dict[str, object], words: str) -> None:
    assert refused(changes) == words


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            [{"type": "RLIMIT_CORE", "hard": 1, "soft": 1}, {"type": "RLIMIT_CORE", "hard": 2, "soft": 2}],
            "process.rlimits[1].type: duplicated rlimit RLIMIT_CORE",
        ),
        ([{"type": "RLIMIT_CORE", "hard": 1, "soft": 2}], "process.rlimits[0].soft: 2 is above the hard limit 1 of RLIMIT_CORE"),
    ],
)
def test_rlimits_must_make_sense(limits: list[object], words: str) -> None:
    assert refused({"process.rlimits": limits}) == words


def test_oom_score_adj_is_within_the_kernels_range() -> None:
    assert warnings({"process.oomScoreAdj": -1000}) == []
    assert refused({"process.oomScoreAdj": 1001}).startswith("process.oomScoreAdj: ")


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"policy": "SCHED_OTHER", "nice": 20}, "invalid scheduler.nice: 20 when scheduler.policy is SCHED_OTHER"),
        ({"policy": "SCHED_BATCH", "nice": -21}, "invalid scheduler.nice: -21 when scheduler.policy is SCHED_BATCH"),
        ({"policy": "SCHED_OTHER", "priority": 1}, "scheduler.priority can only be specified for SchedFIFO or SchedRR policy"),
        (
            {"policy": "SCHED_RR", "runtime": 1},
            "scheduler runtime/deadline/period can only be specified for SchedDeadline policy",
        ),
    ],
)
def test_scheduler_parameters_fit_the_policy(scheduler: object, words: str) -> None:
    assert refused({"process.scheduler": scheduler}) == words


@pytest.mark.parametrize(
    "scheduler",
    [
        {"policy": "SCHED_OTHER", "nice": -20},
        {"policy": "SCHED_FIFO", "priority": 99, "nice": 40},
        {"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3},
    ],
)
def test_fitting_scheduler_parameters_are_fine(scheduler: object) -> None:
    assert warnings({"process.scheduler": scheduler}) == []


def test_io_priority_is_from_0_to_7() -> None:
    assert warnings({"process.ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 7}}) == []
    for bad in (-1, 8):
        words = refused({"process.ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": bad}})
        assert words == f"invalid ioPriority.Priority: {bad}"


def test_cpu_affinity_is_a_list_of_cpus() -> None:
    assert warnings({"process.execCPUAffinity": {"initial": "0-1, 3", "final": ""}}) == []
    assert refused({"process.execCPUAffinity": {"initial": "x"}}).startswith("bad CPUAffinity.Initial: ")
    assert refused({"process.execCPUAffinity": {"final": "3-1"}}) == "bad CPUAffinity.Final: invalid range: 3-1"


def test_process_that_joins_is_checked_by_itself() -> None:
    validate_process(Process(args=["a"], cwd="/"))
    with pytest.raises(InvalidArgument, match=r"^Cwd must be an absolute path$"):
        validate_process(Process(args=["a"], cwd="x"))
    with pytest.raises(InvalidArgument, match=r"^p\.oomScoreAdj: "):
        validate_process(Process(args=["a"], cwd="/", oom_score_adj=5000), "p")


def test_relative_mount_destination_is_only_warned_of() -> None:
    said = warnings({"mounts+": {"destination": "tmp/x", "type": "tmpfs", "source": "tmpfs"}})
    assert len(said) == 1
    assert said[0].startswith("mount destination tmp/x is not absolute. Support for non-absolute")


def test_systemd_cgroup_path_has_three_parts() -> None:
    good = spec_with({"linux.cgroupsPath": "system.slice:docker:1234"})
    assert validate(good, rootless=False, systemd_cgroup=True) == []
    assert validate(spec_with({}), rootless=False, systemd_cgroup=True) == []
    assert refused({"linux.cgroupsPath": "/a/b"}, systemd_cgroup=True) == (
        'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, got "/a/b" instead'
    )
    assert warnings({"linux.cgroupsPath": "/a/b"}) == []


def test_namespace_may_not_come_twice() -> None:
    assert refused({"linux.namespaces+": {"type": "pid", "path": "/proc/1/ns/pid"}}) == (
        'malformed spec file: duplicated ns {"pid" "/proc/1/ns/pid"}'
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"linux.uidMappings": IDS},
            "user namespace mappings specified, but user namespace isn't enabled in the config",
        ),
        ({"linux.namespaces+": {"type": "user"}}, "user namespaces enabled, but no uid mappings found"),
        (
            {"linux.namespaces+": {"type": "user"}, "linux.uidMappings": IDS},
            "user namespaces enabled, but no gid mappings found",
        ),
        (
            USERNS | {"linux.uidMappings": [{"containerID": 1, "hostID": 1, "size": 5}]},
            "user namespaces enabled, but no mapping found for uid 0",
        ),
        (
            USERNS | {"linux.gidMappings": [{"containerID": 0, "hostID": 1, "size": 0}]},
            "linux.gidMappings[0].size: must not be 0",
        ),
        (
            USERNS | {"linux.uidMappings": [{"containerID": 0, "hostID": 2**32 - 2, "size": 2}]},
            "linux.uidMappings[0]: hostID 4294967294 and size 2 reach beyond id 4294967294",
        ),
        (
            USERNS | {"linux.uidMappings": [*IDS, {"containerID": 65535, "hostID": 0, "size": 1}]},
            "linux.uidMappings[1]: the range of containerID overlaps that of linux.uidMappings[0]",
        ),
        (
            USERNS | {"linux.uidMappings": [*IDS, {"containerID": 65536, "hostID": 99999, "size": 2}]},
            "linux.uidMappings[1]: the range of hostID overlaps that of linux.uidMappings[0]",
        ),
    ],
)
def test_id_mappings_go_with_a_user_namespace_and_do_not_overlap(changes: dict[str, object], words: str) -> None:
    assert refused(changes) == words


def test_there_are_no_more_mappings_than_the_kernel_takes() -> None:
    many = [{"containerID": 2 * index, "hostID": 3 * index, "size": 1} for index in range(341)]
    assert warnings(USERNS | {"linux.uidMappings": many[:340]}) == []
    words = refused(USERNS | {"linux.uidMappings": many})
    assert words == "linux.uidMappings: 341 mappings, the kernel takes 340"


def test_whole_range_of_ids_can_be_mapped_and_a_joined_namespace_needs_no_mappings() -> None:
    whole = [{"containerID": 0, "hostID": 0, "size": 2**32 - 1}]
    assert warnings(USERNS | {"linux.uidMappings": whole}) == []
    assert warnings({"linux.namespaces+": {"type": "user", "path": "/proc/1/ns/user"}}) == []


@pytest.mark.parametrize("kind", ["hostname", "domainname"])
def test_names_need_a_uts_namespace(kind: str) -> None:
    changes = {"hostname": None, kind: "x", "linux.namespaces": [{"type": "mount"}]}
    assert refused(changes) == f"unable to set {kind} without a private UTS namespace"
    assert refused({kind: "x" * 65}) == f"{kind}: longer than 64 bytes"
    assert warnings({kind: "x" * 64}) == []


def test_host_name_needs_a_linux_section() -> None:
    assert "UTS" in refused({"linux": None})
    assert warnings({"linux": None, "hostname": None}) == []


@pytest.mark.parametrize("kept", ["maskedPaths", "readonlyPaths"])
def test_masked_paths_need_a_mount_namespace(kept: str) -> None:
    changes: dict[str, object] = {"linux.namespaces": [{"type": "uts"}], "linux.maskedPaths": None, "linux.readonlyPaths": None}
    assert warnings(changes) == []
    said = refused(changes | {f"linux.{kept}": ["/proc/kcore"]})
    assert said == "unable to restrict sys entries without a private MNT namespace"


TIME = {"linux.namespaces+": {"type": "time"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"linux.timeOffsets": {"monotonic": {"secs": 1}}},
            "time namespace offsets specified, but time namespace isn't enabled in the config",
        ),
        (
            {"linux.namespaces+": {"type": "time", "path": "/x"}, "linux.timeOffsets": {"monotonic": {"secs": 1}}},
            "time namespace enabled, but both namespace path and time offsets specified -- you may only provide one",
        ),
        (
            TIME | {"linux.timeOffsets": {"realtime": {}}},
            'linux.timeOffsets: unknown clock "realtime" (one of boottime, monotonic)',
        ),
        (
            TIME | {"linux.timeOffsets": {"boottime": {"nanosecs": 10**9}}},
            "linux.timeOffsets.boottime.nanosecs: expected an integer from 0 to 999999999, got 1000000000",
        ),
    ],
)
def test_time_offsets_go_with_a_time_namespace(changes: dict[str, object], words: str) -> None:
    assert refused(changes) == words


def test_time_offsets_in_a_time_namespace_are_fine() -> None:
    assert warnings(TIME | {"linux.timeOffsets": {"boottime": {"secs": -5, "nanosecs": 10**9 - 1}}}) == []


NO_IPC = {"linux.namespaces": [{"type": "uts"}, {"type": "mount"}]}


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        (NO_IPC, "kernel.msgmax", 'sysctl "kernel.msgmax" is not allowed in the hosts ipc namespace'),
        (NO_IPC, "fs.mqueue.msg_max", 'sysctl "fs.mqueue.msg_max" is not allowed in the hosts ipc namespace'),
        (NO_IPC, "net.core.somaxconn", 'sysctl "net.core.somaxconn" not allowed in host network namespace'),
        (NO_IPC, "net/core/somaxconn", 'sysctl "net.core.somaxconn" not allowed in host network namespace'),
        ({}, "kernel.hostname", 'sysctl "kernel.hostname" is not allowed as it conflicts with the OCI "hostname" field'),
        ({}, "user.max_user_namespaces", "setting ucounts without a user namespace not allowed: user.max_user_namespaces"),
        ({}, "kernel.core_pattern", 'sysctl "kernel.core_pattern" is not in a separate kernel namespace'),
        ({}, "kernel/core_pattern", 'sysctl "kernel.core_pattern" is not in a separate kernel namespace'),
        ({}, "vm.swappiness", 'sysctl "vm.swappiness" is not in a separate kernel namespace'),
        ({}, "", 'sysctl "" is not in a separate kernel namespace'),
    ],
)
def test_sysctl_of_the_whole_machine_is_refused(changes: dict[str, object], name: str, words: str) -> None:
    assert refused(changes | {"linux.sysctl": {name: "1"}}) == words


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "kernel.shm_rmid_forced"),
        ({}, "fs.mqueue.msg_max"),
        ({}, "net.ipv4.ip_forward"),
        ({}, "net/ipv4/conf/eno2.100/rp_filter"),
        ({}, "kernel.domainname"),
        (USERNS, "user.max_user_namespaces"),
    ],
)
def test_sysctl_of_a_namespace_of_its_own_is_fine(changes: dict[str, object], name: str) -> None:
    assert warnings(changes | {"linux.sysctl": {name: "1"}}) == []


def test_network_sysctl_is_refused_when_the_joined_namespace_is_the_hosts() -> None:
    changes = NO_IPC | {"linux.namespaces+": {"type": "network", "path": "/n"}, "linux.sysctl": {"net.core.somaxconn": "1"}}
    spec = spec_with(changes)
    assert validate(spec, rootless=False) == []
    assert validate(spec, rootless=False, is_host_netns=lambda path: path != "/n") == []
    assert "not allowed in host network namespace" in refused(changes, is_host_netns=lambda path: path == "/n")


def test_first_separator_of_a_sysctl_tells_which_it_is() -> None:
    assert dotted_sysctl("net/ipv4/conf/eno2.100/rp_filter") == "net.ipv4.conf.eno2/100.rp_filter"
    assert dotted_sysctl("net.ipv4.conf.eno2/100.rp_filter") == "net.ipv4.conf.eno2/100.rp_filter"
    assert dotted_sysctl("nothing") == "nothing"


@pytest.mark.parametrize("clos", [".", "..", "a/b", "/a"])
def test_rdt_class_is_one_directory(clos: str) -> None:
    assert refused({"linux.intelRdt": {"closID": clos}}) == f'invalid intelRdt.ClosID "{clos}"'
    assert warnings({"linux.intelRdt": {"closID": "/"}}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"linux.netDevices": {"eth0": {}}, "linux.namespaces": [{"type": "mount"}, {"type": "uts"}]},
            "unable to move network devices without a NET namespace",
        ),
        ({"linux.netDevices": {"a/b": {}}}, 'invalid network device name "a/b"'),
        ({"linux.netDevices": {"": {}}}, 'invalid network device name ""'),
        ({"linux.netDevices": {"eth0": {"name": ".."}}}, 'invalid network device name ".."'),
        ({"linux.netDevices": {"eth0": {"name": "a b"}}}, 'invalid network device name "a b"'),
        ({"linux.netDevices": {"eth0": {"name": "a:b"}}}, 'invalid network device name "a:b"'),
        ({"linux.netDevices": {"x" * 16: {}}}, 'invalid network device name "xxxxxxxxxxxxxxxx"'),
        ({"linux.netDevices": {"a": {"name": "c"}, "b": {"name": "c"}}}, 'linux.netDevices: two devices would be named "c"'),
    ],
)
def test_network_devices_have_names_that_the_kernel_takes(changes: dict[str, object], words: str) -> None:
    assert refused(changes) == words


def test_network_devices_are_not_for_rootless_containers() -> None:
    changes = {"linux.netDevices": {"eth0": {"name": "x" * 15}}}
    assert warnings(changes) == []
    assert refused(changes, rootless=True) == "network devices are not supported for rootless containers"


def test_rootless_needs_a_user_namespace_with_mappings() -> None:
    assert refused({}, rootless=True) == "rootless container requires user namespaces"
    assert refused({"linux": None, "hostname": None}, rootless=True) == "rootless container requires user namespaces"
    assert warnings({"linux.namespaces+": {"type": "user", "path": "/x"}}, rootless=True) == []


def test_rootless_mount_options_name_mapped_ids() -> None:
    one = [{"containerID": 0, "hostID": 1000, "size": 1}]
    changes = USERNS | {"linux.uidMappings": one, "linux.gidMappings": one, "mounts": []}
    mount = {"destination": "/x", "type": "tmpfs", "source": "tmpfs"}
    assert warnings(changes | {"mounts+": mount | {"options": ["uid=0", "gid=0", "gid=x"]}}, rootless=True) == []
    for option in ("uid=1", "gid=5"):
        words = refused(changes | {"mounts+": mount | {"options": ["mode=755," + option]}}, rootless=True)
        assert words.startswith(f"cannot specify {option} mount option for rootless container: ")
    assert warnings(changes | {"mounts+": mount | {"options": ["gid=5"]}}) == []


BIND = {"destination": "/x", "type": "none", "source": "/y"}
MAPPED = {"uidMappings": IDS, "gidMappings": IDS}


@pytest.mark.parametrize(
    ("changes", "mount", "words"),
    [
        ({}, {"options": ["ro"], "type": "tmpfs"} | MAPPED, "id-mapped mounts are only supported for bind-mounts"),
        ({}, {"options": ["bind", "idmap"]}, "id-mapped mounts must have both uid and gid mappings specified"),
        ({}, {"options": ["bind"], "uidMappings": IDS}, "id-mapped mounts must have both uid and gid mappings specified"),
        (USERNS, {"options": ["ridmap"]}, "id-mapped mounts are only supported for bind-mounts"),
    ],
)
def test_bind_and_idmap_mounts_have_what_they_need(changes: dict[str, object], mount: dict[str, object], words: str) -> None:
    said = refused(changes | {"mounts+": BIND | mount})
    assert said.startswith(f"invalid mount /x: {words}")
    assert said.endswith("(mounts[7])")


@pytest.mark.parametrize(
    ("changes", "mount"),
    [
        ({}, {"options": sorted(MOUNT_OPTIONS - {"idmap", "ridmap"})}),
        ({}, {"options": ["bind", "idmap"]} | MAPPED),
        ({}, {"options": ["bind"]} | MAPPED),
        (USERNS, {"options": ["rbind", "ridmap"]}),
        ({"linux.namespaces+": {"type": "user", "path": "/x"}}, {"options": ["rbind", "idmap"]}),
    ],
)
def test_right_bind_and_idmap_mounts_are_fine(changes: dict[str, object], mount: dict[str, object]) -> None:
    assert warnings(changes | {"mounts+": BIND | mount}) == []


def test_idmap_mounts_are_not_for_rootless_containers() -> None:
    assert refused(USERNS | {"mounts": [], "mounts+": BIND | {"options": ["bind", "idmap"]}}, rootless=True).startswith(
        "invalid mount /x: id-mapped mounts are not supported for rootless containers"
    )


def test_mount_options_are_those_that_the_mount_code_knows() -> None:
    known = {*mounts.FLAGS, *mounts.PROPAGATION, *mounts.RECURSIVE, *mounts.EXTENSIONS, "idmap", "ridmap"}
    assert known == MOUNT_OPTIONS


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"mode": "MPOL_DEFAULT", "nodes": "0-7"}, "memory policy mode requires 0 nodes but got 8"),
        ({"mode": "MPOL_LOCAL", "nodes": "1"}, "memory policy mode requires 0 nodes but got 1"),
        ({"mode": "MPOL_BIND"}, "memory policy mode requires at least one node but got 0"),
        (
            {"mode": "MPOL_BIND", "nodes": "0-9876543210"},
            'invalid memory policy nodes "0-9876543210": values larger than 65536 are not supported',
        ),
        ({"mode": "MPOL_BIND", "nodes": "a"}, 'invalid memory policy nodes "a": parsing "a": invalid syntax'),
    ],
)
def test_memory_policy_has_the_nodes_that_its_mode_takes(policy: object, words: str) -> None:
    assert refused({"linux.memoryPolicy": policy}) == words


@pytest.mark.parametrize(
    "policy",
    [
        {"mode": "MPOL_DEFAULT"},
        {"mode": "MPOL_PREFERRED"},
        {"mode": "MPOL_PREFERRED", "nodes": "0"},
        {"mode": "MPOL_BIND", "nodes": "0"},
    ],
)
def test_right_memory_policy_is_fine(policy: object) -> None:
    assert warnings({"linux.memoryPolicy": policy}) == []


def test_personality_flags_are_warned_of() -> None:
    assert warnings({"linux.personality": {"domain": "LINUX", "flags": ["A", "B"]}}) == [
        "ignoring unsupported personality flags: [A B] because personality flag has not supported at this time"
    ]


@pytest.mark.parametrize(
    ("seccomp", "words"),
    [
        ({"syscalls": [{"names": ["a"], "action": "SCMP_ACT_ALLOW"}]}, "is not a valid action for seccomp"),
        ({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/s"}, "SCMP_ACT_NOTIFY cannot be used as default action"),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s",
                "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_NOTIFY"}],
            },
            "SCMP_ACT_NOTIFY cannot be used for the write syscall",
        ),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]},
            "seccomp listenerPath is not set",
        ),
        ({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"}, "must not be set without listenerPath"),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [""], "action": "SCMP_ACT_ERRNO"}]},
            "linux.seccomp.syscalls[0].names: empty string is not a valid syscall",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    {
                        "names": ["a"], "action": "SCMP_ACT_ERRNO",
                        "args": [{"index": 5, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}],
                    },
                ],
            },
            "linux.seccomp.syscalls[0].args[1].index: syscalls only have up to 6 arguments (6 given)",
        ),
    ],
)  # fmt: skip
def test_seccomp_profile_can_be_loaded(seccomp: object, words: str) -> None:
    assert words in refused({"linux.seccomp": seccomp})


def test_seccomp_without_action_and_rules_is_no_seccomp() -> None:
    assert warnings({"linux.seccomp": {}}) == []
    assert warnings({"linux.seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG"}]}}) == []


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"devices": [{"allow": True, "access": "r"}, {"allow": True}]}, "device access at 1 field cannot be empty"),
        ({"unified": {"a/b": ""}}, 'unified resource "a/b" must be a file name (no slashes)'),
        ({"unified": {"memory": ""}}, 'unified resource "memory" must be in the form CONTROLLER.PARAMETER'),
        ({"unified": {"..": ""}}, 'unified resource ".." must be in the form CONTROLLER.PARAMETER'),
        (
            {"hugepageLimits": [{"pageSize": "../2MB", "limit": 1}]},
            'linux.resources.hugepageLimits[0].pageSize: expected a size as in 2MB, got "../2MB"',
        ),
    ],
)
def test_resources_can_be_written(resources: object, words: str) -> None:
    assert refused({"linux.resources": resources}) == words


def test_kernel_memory_is_warned_of() -> None:
    for memory in ({"kernel": 5}, {"kernelTCP": 0}):
        said = warnings({"linux.resources": {"memory": memory}})
        assert said == ["Kernel memory settings are ignored and will be removed"]


def test_device_to_make_has_a_number() -> None:
    fifo = {"path": "/dev/p", "type": "p", "major": -1, "minor": -1}
    assert warnings({"linux.devices": [fifo, {"path": "/dev/x", "type": "c", "major": 4095, "minor": 1048575}]}) == []
    for major, minor in ((-1, 0), (0, -1), (4096, 0), (0, 1 << 20)):
        said = refused({"linux.devices": [{"path": "/dev/x", "type": "b", "major": major, "minor": minor}]})
        assert said == f"linux.devices[0]: {major}:{minor} is not the number of a device"


def test_hook_has_an_absolute_path_and_time_to_run() -> None:
    assert warnings({"hooks": {"poststop": [{"path": "/x", "timeout": 1}]}}) == []
    assert warnings({"hooks": {"poststop": [{"path": "x"}]}}) == ["hooks.poststop[0].path: x is not absolute"]
    for timeout in (0, -1):
        said = refused({"hooks": {"createRuntime": [{"path": "/x"}, {"path": "/x", "timeout": timeout}]}})
        assert said == f"hooks.createRuntime[1].timeout: must be greater than zero, got {timeout}"


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        ("", set()),
        ("0", {0}),
        ("0-1", {0, 1}),
        (",0,1,", {0, 1}),
        ("1, 2, 1-2", {1, 2}),
        ("    , 1   , 3  ,  5-7,    ", {1, 3, 5, 6, 7}),
        ("127-129, 1", {1, 127, 128, 129}),
        ("65536", {65536}),
    ],
)
def test_lists_of_numbers(written: str, numbers: set[int]) -> None:
    assert parse_list(written, "x") == numbers


@pytest.mark.parametrize(
    "written",
    ["-", "1-", "-3", ",", " ", "54-53", "1 - 2", "65537", "0-65537", "1-2-3", "+1", "\u0663", "0x1", "9" * 5000],
)
def test_what_is_no_list_of_numbers_is_refused(written: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^x: "):
        parse_list(written, "x")


@given(st.sets(st.integers(0, 65536), max_size=20))
def test_any_set_of_numbers_can_be_written_as_a_list(numbers: set[int]) -> None:
    assert parse_list(",".join(map(str, numbers)), "x") == numbers


def test_host_id_of_an_id_inside() -> None:
    mappings = [IDMapping(container_id=0, host_id=1000, size=1), IDMapping(container_id=5, host_id=70, size=3)]
    assert [host_id(mappings, number) for number in (0, 1, 4, 5, 7, 8)] == [1000, None, None, 70, 72, None]


def test_unknown_letters_of_device_access_are_only_warned_of() -> None:
    found = warnings({"linux.resources": {"devices": [{"allow": True, "access": "rx"}]}})
    assert found == ['linux.resources.devices[0].access: expected letters of rwm, got "rx"']


def test_options_of_file_systems_on_a_bind_mount_are_warned_of() -> None:
    found = warnings({"mounts+": BIND | {"options": ["rbind", "size=5"]}})
    assert found == ["mount /x: bind mounts cannot have filesystem-specific options, ignored: size=5"]


def test_a_configuration_without_process_can_be_created() -> None:
    assert validate(spec_with({"process": None}), rootless=False, needs_process=False) == []
