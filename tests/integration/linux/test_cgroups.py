"""Control groups on the machine's own kernel: v1, or the v2 mount of a hybrid machine, or v2."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound
from boxship.linux.cgroups import Cgroup, DeviceRule, Limits
from boxship.linux.cgroups.arrangement import arrangement
from boxship.linux.cgroups.v1 import V1Group
from boxship.linux.cgroups.v2 import V2Group

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
needs_v1 = pytest.mark.skipif(arrangement().pure_v2, reason="needs v1 controllers")
needs_v2 = pytest.mark.skipif(not arrangement().unified, reason="needs a v2 mount")
needs_memsw = pytest.mark.skipif(
    not os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"), reason="needs swap accounting"
)


@contextlib.contextmanager
def removed(group: Cgroup) -> Iterator[Cgroup]:
    try:
        yield group
    finally:
        with contextlib.suppress(BoxshipError):
            group.kill(signal.SIGKILL)
        group.delete()
        assert not group.exists()


def name() -> str:
    return f"boxship-test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A group of the machine's arrangement, planned and not made."""
    planned = Cgroup.plan("/" + name(), "id", systemd=False, rootless=False)
    assert planned is not None
    with removed(planned):
        yield planned


@pytest.fixture
def v2() -> Iterator[V2Group]:
    """A group in the v2 mount, planned and not made."""
    with removed(V2Group(f"{arrangement().unified}/{name()}", rootless=False, explicit=True)) as planned:
        assert isinstance(planned, V2Group)
        yield planned


def inside(group: Cgroup, *command: str, **options: object) -> subprocess.Popen[bytes]:
    """A process that entered by writing to the group's files itself."""
    fds = group.join_fds()

    def enter() -> None:
        for fd in fds:
            os.write(fd, b"0")

    try:
        return subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.PIPE, **options)  # type: ignore  # noqa: PGH003, PLW1509
    finally:
        for fd in fds:
            os.close(fd)


def text(group: Cgroup, controller: str, file: str) -> str:
    assert isinstance(group, V1Group)
    with open(f"{group.paths[controller]}/{file}") as opened:
        return opened.read().strip()


def test_planning_makes_nothing(group: Cgroup) -> None:
    assert not group.exists()
    assert group.pids() == []
    assert not group.frozen()
    group.delete()


def test_a_process_enters_every_hierarchy_by_its_own_write(group: Cgroup) -> None:
    group.create(Limits())
    process = inside(group, "cat", "/proc/self/cgroup")
    lines = process.communicate()[0].decode().split()
    assert process.returncode == 0
    where = group.v2_path.removeprefix(arrangement().unified) if group.v2_path else ""
    known = {"0::" + where} if where else set()
    if isinstance(group, V1Group):
        relative = "/" + os.path.basename(group.paths["devices"])
        for hierarchy in arrangement().hierarchies:
            assert any(line.endswith(f":{','.join(hierarchy.controllers)}:{relative}") for line in lines), lines
    assert known <= set(lines)


def test_a_relative_path_is_below_the_callers_own_group() -> None:
    planned = Cgroup.plan("../../" + name(), "id", systemd=False, rootless=False)
    assert planned is not None
    with removed(planned):
        planned.create(Limits())
        assert planned.exists()
        if isinstance(planned, V1Group):
            from boxship.linux.cgroups.arrangement import membership

            own = membership()["memory"]
            assert planned.paths["memory"].startswith(f"/sys/fs/cgroup/memory{own}".rstrip("/") + "/boxship-test-")


def test_the_id_is_the_path_when_none_is_given() -> None:
    planned = Cgroup.plan("", "some-id", systemd=False, rootless=False)
    assert isinstance(planned, V1Group | V2Group)
    assert planned.encode()["explicit"] is False
    assert all(path.endswith("/some-id") for path in planned.encode()["paths"].values())  # type: ignore[attr-defined]


def test_the_record_leads_to_the_same_group(group: Cgroup) -> None:
    group.create(Limits())
    again = Cgroup.decode(group.encode())
    assert again.exists()
    assert again.encode() == group.encode()
    again.delete()
    assert not group.exists()


def test_freezing_stops_and_thawing_continues(group: Cgroup) -> None:
    group.create(Limits())
    with inside(group, "sh", "-c", "read x; echo done", stdin=subprocess.PIPE) as process:
        group.freeze()
        assert group.frozen()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], 0.2)[0] == []
        group.thaw()
        assert not group.frozen()
        assert process.stdout.read() == b"done\n"


def test_kill_reaches_all_below_even_when_frozen(group: Cgroup) -> None:
    group.create(Limits())
    with inside(group, "sh", "-c", "sleep 100 & sleep 100 & echo; wait") as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(group.pids()) == 3
        group.freeze()
        group.kill(signal.SIGKILL)
        assert process.wait(5) == -signal.SIGKILL
        group.delete()
        assert not group.exists()
    with pytest.raises(NotFound, match="cgroup not exist"):
        group.kill(signal.SIGKILL)


def test_kill_sends_any_signal(group: Cgroup) -> None:
    group.create(Limits())
    script = "trap 'echo got; exit 3' TERM; echo; while :; do read x; done"
    with inside(group, "sh", "-c", script, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        group.kill(signal.SIGTERM)
        assert process.stdout.read() == b"got\n"
        assert process.wait(5) == 3


def test_deletion_takes_what_is_below(group: Cgroup) -> None:
    group.create(Limits())
    for path in set(group.encode()["paths"].values()):  # type: ignore[attr-defined]
        os.makedirs(path + "/a/b")
        os.mkdir(path + "/c")
    group.delete()
    assert not group.exists()
    group.delete()


def test_a_busy_group_is_not_deleted(group: Cgroup) -> None:
    group.create(Limits())
    with inside(group, "sleep", "100") as process:
        with pytest.raises(FailedPrecondition, match="Failed to remove paths: map"):
            group.delete()
        process.kill()


def test_deletion_waits_for_processes_that_are_about_to_go(group: Cgroup) -> None:
    group.create(Limits())
    with inside(group, "sleep", "0.05"):
        group.delete()
        assert not group.exists()


def test_a_group_with_processes_is_refused(group: Cgroup) -> None:
    group.create(Limits())
    with inside(group, "sleep", "100") as process:
        with pytest.raises(FailedPrecondition, match=r"container's cgroup is not empty: 1 process\(es\) found"):
            again = Cgroup.decode(group.encode())
            again.create(Limits())
        # Who is refused must not do harm while it cleans up.
        again.kill(signal.SIGKILL)
        again.delete()
        again.abandon()
        assert process.poll() is None
        assert group.pids() == [process.pid]
        process.kill()


def test_abandoning_undoes_a_creation_however_far_it_came(group: Cgroup) -> None:
    group.abandon()
    group.create(Limits())
    with inside(group, "sleep", "100") as process:
        group.abandon()
        assert process.wait(5) == -signal.SIGKILL
    assert not group.exists()
    group.abandon()


def test_a_frozen_group_is_refused(group: Cgroup) -> None:
    group.create(Limits())
    group.freeze()
    with pytest.raises(FailedPrecondition, match="container's cgroup unexpectedly frozen"):
        Cgroup.decode(group.encode()).create(Limits())
    group.thaw()
    again = Cgroup.decode(group.encode())
    again.create(Limits())
    assert not again.fresh


def test_add_moves_another_process(group: Cgroup) -> None:
    group.create(Limits())
    with subprocess.Popen(["sleep", "100"]) as process:
        group.add(process.pid)
        assert group.pids() == [process.pid]
        process.kill()


def test_a_process_may_enter_a_group_below(group: Cgroup) -> None:
    group.create(Limits())
    for path in set(group.encode()["paths"].values()):  # type: ignore[attr-defined]
        os.mkdir(path + "/sub")
        for cpuset in ("cpuset.cpus", "cpuset.mems"):
            if "/cpuset/" in path:
                with open(f"{path}/{cpuset}") as above, open(f"{path}/sub/{cpuset}", "w") as below:
                    below.write(above.read())
    for fd in group.sub("sub"):
        assert os.readlink(f"/proc/self/fd/{fd}").rsplit("/", 2)[1] == "sub"
        os.close(fd)
    with pytest.raises(InvalidArgument, match="bad sub cgroup path"):
        group.sub("..")
    with pytest.raises(NotFound, match=r"nonexistent.*no such file or directory"):
        group.sub("nonexistent")


@needs_v1
def test_a_foreign_group_in_one_hierarchy_only_is_left_as_it_was(group: Cgroup) -> None:
    assert isinstance(group, V1Group)
    freezer = group.paths["freezer"]
    os.mkdir(freezer)
    with open(freezer + "/freezer.state", "w") as state:
        state.write("FROZEN")
    again = Cgroup.decode(group.encode())
    with pytest.raises(FailedPrecondition, match="unexpectedly frozen"):
        again.create(Limits())
    again.abandon()
    assert os.path.isdir(freezer)
    assert [path for path in set(group.paths.values()) if os.path.isdir(path)] == [freezer]


# --- v1 --------------------------------------------------------------------------------------------------------------


@needs_v1
def test_one_controller_may_be_entered_below_and_the_others_at_the_top(group: Cgroup) -> None:
    group.create(Limits())
    assert isinstance(group, V1Group)
    os.mkdir(group.paths["memory"] + "/sub")
    opened = group.join_fds({"memory": "sub"})
    folders = [os.path.dirname(os.readlink(f"/proc/self/fd/{fd}")) for fd in opened]
    for fd in opened:
        os.close(fd)
    assert group.paths["memory"] + "/sub" in folders
    assert group.paths["memory"] not in folders
    assert group.paths["devices"] in folders
    with pytest.raises(InvalidArgument, match="unknown controller whaaat"):
        group.join_fds({"whaaat": "/"})


@needs_v1
def test_v1_limits_are_set(group: Cgroup) -> None:
    limits = Limits()
    limits.memory_limit, limits.memory_reservation, limits.memory_swappiness = 32 << 20, 24 << 20, 30
    limits.pids_limit = 20
    limits.cpu_shares, limits.cpu_quota, limits.cpu_period, limits.cpu_burst = 100, 500000, 1000000, 1000
    limits.cpu_cpus = "0"
    group.create(limits)
    group.apply(limits)
    expected = {
        ("memory", "memory.limit_in_bytes"): str(32 << 20), ("memory", "memory.soft_limit_in_bytes"): str(24 << 20),
        ("memory", "memory.swappiness"): "30", ("pids", "pids.max"): "20", ("cpu", "cpu.shares"): "100",
        ("cpu", "cpu.cfs_quota_us"): "500000", ("cpu", "cpu.cfs_period_us"): "1000000", ("cpu", "cpu.cfs_burst_us"): "1000",
        ("cpuset", "cpuset.cpus"): "0",
    }
    assert {key: text(group, *key) for key in expected} == expected
    limits = Limits()
    limits.pids_limit, limits.cpu_quota, limits.memory_limit = -1, -1, -1
    group.apply(limits)
    assert text(group, "pids", "pids.max") == "max"
    assert text(group, "cpu", "cpu.cfs_quota_us") == "-1"
    assert int(text(group, "memory", "memory.limit_in_bytes")) > 1 << 60
    assert text(group, "cpu", "cpu.shares") == "100"


@needs_v1
@needs_memsw
def test_memory_and_swap_grow_and_shrink_together(group: Cgroup) -> None:
    group.create(Limits())
    for memory, swap in ((30, 50), (60, 80), (20, 25), (100, 100)):
        limits = Limits()
        limits.memory_limit, limits.memory_swap = memory << 20, swap << 20
        group.apply(limits)
        assert text(group, "memory", "memory.limit_in_bytes") == str(memory << 20)
        assert text(group, "memory", "memory.memsw.limit_in_bytes") == str(swap << 20)
    limits = Limits()
    limits.memory_limit = -1
    group.apply(limits)
    assert int(text(group, "memory", "memory.memsw.limit_in_bytes")) > 1 << 60


@needs_v1
def test_what_the_kernel_refuses_names_file_and_value(group: Cgroup) -> None:
    group.create(Limits())
    limits = Limits()
    limits.cpu_period = 1
    with pytest.raises(InvalidArgument, match=r'^failed to write "1": write /sys/.*/cpu.cfs_period_us: invalid argument$'):
        group.apply(limits)
    limits = Limits()
    limits.cpu_shares = 1
    with pytest.raises(InvalidArgument, match="the minimum allowed cpu-shares is 2"):
        group.apply(limits)


@needs_v1
def test_a_period_that_only_fits_the_new_quota_is_set(group: Cgroup) -> None:
    limits = Limits()
    limits.cpu_quota, limits.cpu_period = 500000, 1000000
    group.create(limits)
    group.apply(limits)
    assert isinstance(group, V1Group)
    os.mkdir(group.paths["cpu"] + "/pod")
    inner = V1Group({"cpu": group.paths["cpu"] + "/pod"}, rootless=False, explicit=True)
    limits.cpu_quota, limits.cpu_period = 400000, 1000000
    inner.apply(limits)
    limits.cpu_quota, limits.cpu_period = 40000, 100000
    inner.apply(limits)
    assert text(inner, "cpu", "cpu.cfs_period_us") == "100000"


@needs_v1
def test_a_limit_without_its_controller_is_refused(group: Cgroup) -> None:
    group.create(Limits())
    assert isinstance(group, V1Group)
    for controller, attribute, value in (
        ("net_cls", "net_classid", 5), ("net_prio", "net_priorities", [("lo", 1)]), ("hugetlb", "hugepages", [("2MB", 1)]),
        ("rdma", "rdma", {"x": (1, 1)}),
    ):
        if controller in group.paths:
            continue
        limits = Limits()
        setattr(limits, attribute, value)
        with pytest.raises(FailedPrecondition) as caught:
            group.apply(limits)
        assert str(caught.value) == f"cannot set {controller} limit: container could not join or create cgroup"
    limits = Limits()
    limits.unified = {"memory.max": "5"}
    with pytest.raises(InvalidArgument, match="invalid configuration: cannot use unified on cgroup v1"):
        group.create(limits)


@needs_v1
def test_devices_follow_the_rules_and_change_gently(group: Cgroup) -> None:
    limits = Limits()
    limits.devices = [DeviceRule(False), DeviceRule(True, "c", 1, 3, "rwm"), DeviceRule(True, "c", 1, 5, "r")]
    group.create(limits)
    group.apply(limits)
    assert text(group, "devices", "devices.list") == "c 1:3 rwm\nc 1:5 r"
    script = "echo > /dev/null && head -c1 /dev/zero > /dev/null && ! head -c1 /dev/full > /dev/null && ! true > /dev/zero"
    with inside(group, "sh", "-c", script, stderr=subprocess.DEVNULL) as process:
        assert process.wait(5) == 0
    again = Cgroup.decode(group.encode())
    limits.devices = [DeviceRule(True, "c", 1, 7, "rwm"), DeviceRule(True, "c", 1, 3, "rw")]
    again.apply(limits)
    assert text(group, "devices", "devices.list") == "c 1:3 rw\nc 1:7 rwm"
    limits.devices = [DeviceRule(True)]
    again.apply(limits)
    assert text(group, "devices", "devices.list") == "a *:* rwm"


@needs_v1
def test_new_cpusets_on_the_way_are_filled() -> None:
    outer = name()
    planned = Cgroup.plan(f"/{outer}/a/b", "id", systemd=False, rootless=False)
    assert isinstance(planned, V1Group)
    try:
        with removed(planned):
            limits = Limits()
            limits.cpu_cpus = "0"
            planned.create(limits)
            planned.apply(limits)
            assert text(planned, "cpuset", "cpuset.cpus") == "0"
            assert text(planned, "cpuset", "cpuset.mems") == "0"
            with inside(planned, "true") as process:
                assert process.wait(5) == 0
    finally:
        for path in set(planned.paths.values()):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(os.path.dirname(path))
                os.rmdir(os.path.dirname(os.path.dirname(path)))


@needs_v1
def test_rootless_without_permission_does_without_unless_a_limit_is_asked_for() -> None:
    planned = Cgroup.plan("", name(), systemd=False, rootless=True)
    assert isinstance(planned, V1Group)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            planned.create(Limits())
            assert planned.paths == {}
            limits = Limits()
            limits.devices = []
            planned.apply(limits)
            assert planned.join_fds() == []
            limits.pids_limit = 5
            try:
                planned.apply(limits)
            except BoxshipError as error:
                assert str(error) == "cannot set pids limit: container could not join or create cgroup"
                explicit = Cgroup.plan("/" + name(), "id", systemd=False, rootless=True)
                assert explicit is not None
                try:
                    explicit.create(Limits())
                except BoxshipError as refusal:
                    assert str(refusal).startswith("mkdir ")
                    assert str(refusal).endswith(": permission denied")
                    code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@needs_v1
def test_lack_of_memory_is_told(group: Cgroup) -> None:
    limits = Limits()
    limits.memory_limit = 8 << 20
    group.create(limits)
    group.apply(limits)
    events = group.oom_events()
    try:
        with inside(group, "sh", "-c", "x=a; while :; do x=$x$x; done", stderr=subprocess.DEVNULL) as process:
            assert select.select([events], [], [], 20)[0]
            assert events.read() is True
            assert process.wait(20) != 0
        assert group.oom_kills() >= 1
        group.delete()
        assert select.select([events], [], [], 5)[0]
        assert events.read() is False
    finally:
        events.close()


@needs_v1
def test_mounts_name_folder_option_and_directory(group: Cgroup) -> None:
    group.create(Limits())
    assert isinstance(group, V1Group)
    mounts = group.v1_mounts()
    assert [folder for folder, _, _ in mounts] == [os.path.basename(h.mountpoint) for h in arrangement().hierarchies]
    for _, option, directory in mounts:
        assert os.path.isdir(directory)
        first = option.split(",")[0]
        assert directory == group.paths.get(first, directory)


@needs_v1
def test_v1_statistics(group: Cgroup) -> None:
    limits = Limits()
    limits.memory_limit, limits.pids_limit = 64 << 20, 7
    group.create(limits)
    group.apply(limits)
    script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo; read x"
    with inside(group, "sh", "-c", script, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        from boxship.runtime.stats import describe

        data = describe(group)
    assert list(data) == ["cpu", "cpuset", "memory", "pids", "blkio", "hugetlb", "intel_rdt", "network_interfaces"]
    assert data["pids"] == {"current": 1, "limit": 7}
    memory, cpu, cpuset = data["memory"], data["cpu"], data["cpuset"]
    assert isinstance(memory, dict) and isinstance(cpu, dict) and isinstance(cpuset, dict)
    assert memory["usage"]["limit"] == 64 << 20
    assert memory["usage"]["usage"] > 0
    assert memory["raw"]["hierarchical_memory_limit"] == 64 << 20
    assert cpu["usage"]["total"] > 1_000_000
    assert len(cpu["usage"]["percpu"]) >= os.cpu_count()  # type: ignore[operator]
    assert cpuset["mems"] == [0]


@needs_v1
def test_events_are_lines_until_the_group_is_gone(group: Cgroup) -> None:
    import json
    import threading

    from boxship.runtime.events import _watch

    group.create(Limits())
    lines: list[str] = []
    three = threading.Event()

    def show(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            three.set()

    watcher = threading.Thread(target=_watch, args=(None, "some-id", group, show, 0.02), daemon=True)
    watcher.start()
    assert three.wait(10)
    group.delete()
    watcher.join(10)
    assert not watcher.is_alive()
    event = json.loads(lines[0])
    assert (event["type"], event["id"], event["data"]["pids"]) == ("stats", "some-id", {})


# --- v2 --------------------------------------------------------------------------------------------------------------


@needs_v2
def test_a_v2_group_lives_and_dies(v2: V2Group) -> None:
    v2.create(Limits())
    assert v2.fresh
    with inside(v2, "sleep", "100") as process:
        assert v2.pids() == [process.pid]
        v2.freeze()
        assert v2.frozen()
        v2.thaw()
        assert not v2.frozen()
        with pytest.raises(FailedPrecondition, match="not empty"):
            Cgroup.decode(v2.encode()).create(Limits())
        v2.freeze()
        v2.kill(signal.SIGKILL)
        assert process.wait(5) == -signal.SIGKILL
    v2.delete()
    assert not v2.exists()


@needs_v2
def test_v2_device_rules_are_enforced_and_replaced(v2: V2Group) -> None:
    limits = Limits()
    limits.devices = [DeviceRule(True, "c", 1, -1, "rwm"), DeviceRule(False, "c", 1, 5, "w")]
    v2.create(limits)
    v2.apply(limits)
    script = "echo > /dev/null && head -c1 /dev/zero > /dev/null && ! true > /dev/zero && ! true < /dev/tty"
    with inside(v2, "sh", "-c", script, stderr=subprocess.DEVNULL) as process:
        assert process.wait(5) == 0
    limits.devices = [DeviceRule(True, "c", 1, 3, "rw")]
    v2.apply(limits)
    from boxship.linux.cgroups.bpf import attached

    directory = os.open(v2.v2_path, os.O_RDONLY)
    programs = attached(directory)
    assert len(programs) == 1
    for fd in (*programs, directory):
        os.close(fd)
    with inside(v2, "sh", "-c", "echo > /dev/null && ! head -c1 /dev/zero", stderr=subprocess.DEVNULL) as process:
        assert process.wait(5) == 0


@needs_v2
def test_a_v2_file_that_is_not_there_is_explained(v2: V2Group) -> None:
    v2.create(Limits())
    for key, message in (
        ("a/b", 'unified resource "a/b" must be a file name (no slashes)'),
        ("nodot", 'unified resource "nodot" must be in the form CONTROLLER.PARAMETER'),
        ("foo.bar", 'unified resource "foo.bar" can\'t be set: controller "foo" not available'),
    ):
        limits = Limits()
        limits.unified = {key: "1"}
        with pytest.raises(BoxshipError) as caught:
            v2.apply(limits)
        assert str(caught.value) == message
    limits = Limits()
    limits.unified = {"cgroup.max.depth": "3"}
    v2.apply(limits)
    with open(v2.v2_path + "/cgroup.max.depth") as opened:
        assert opened.read() == "3\n"


@needs_v2
def test_a_process_can_be_cloned_into_v2(v2: V2Group) -> None:
    v2.create(Limits())
    fd = v2.clone_fd()
    assert os.readlink(f"/proc/self/fd/{fd}") == v2.v2_path
    os.close(fd)


@needs_v2
def test_exec_follows_init_out_of_a_group_that_takes_no_process(v2: V2Group) -> None:
    v2.create(Limits())
    os.mkdir(v2.v2_path + "/inner")

    def folder(fd: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    with inside(v2, "sleep", "100") as process:
        assert folder(v2.join_fds(init_pid=process.pid)[0]) == v2.v2_path + "/cgroup.procs"
        with open(v2.v2_path + "/inner/cgroup.procs", "w") as procs:
            procs.write(str(process.pid))
        assert folder(v2.clone_fd(process.pid)) == v2.v2_path
        controllers = (open(v2.v2_path + "/cgroup.controllers").read()).split()
        if controllers:
            with open(v2.v2_path + "/cgroup.subtree_control", "w") as control:
                control.write("+" + controllers[0])
            assert folder(v2.clone_fd(process.pid)) == v2.v2_path + "/inner"
            assert folder(v2.join_fds(init_pid=process.pid)[0]) == v2.v2_path + "/inner/cgroup.procs"
            assert folder(v2.join_fds({"": "/"}, init_pid=process.pid)[0]) == v2.v2_path + "/cgroup.procs"
        process.kill()


@needs_v2
def test_v2_statistics(v2: V2Group) -> None:
    v2.create(Limits())
    with inside(v2, "sleep", "100") as process:
        stats = v2.stats()
        process.kill()
    assert stats["pids"] == {"current": 1, "limit": 0}
    cpu = stats["cpu"]
    assert isinstance(cpu, dict)
    assert cpu["usage"]["total"] > 0
    if os.path.exists(arrangement().unified + "/cpu.pressure"):
        assert set(cpu["psi"]) == {"some", "full"}
