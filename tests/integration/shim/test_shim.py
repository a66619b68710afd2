"""The shim, called as containerd calls it, one thing at a time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from boxship.api.any import RESOURCES, pack, unpack
from boxship.api.task import pb
from boxship.api.task.services import TASK_V3
from boxship.api.ttrpc.client import Client
from boxship.kit.errors import (
    AlreadyExists,
    BoxshipError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from support.shim import NAMESPACE, SHIM, Daemon, Task, eventually

RUNNING, CREATED, STOPPED, PAUSED = pb.types.RUNNING, pb.types.CREATED, pb.types.STOPPED, pb.types.PAUSED


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not SHIM.exists():
        pytest.fail("the shim is not built: make build")
    daemon = Daemon(os.environ.get("BOXSHIP_TEST_SHIM", SHIM))
    yield daemon
    assert daemon.close() == []


# --- life


def test_a_container_lives_through_all_states(daemon: Daemon) -> None:
    task = daemon.task("life", "sh", "-c", "exit 7").start_shim()
    pid = task.create()
    assert task.call("State").status == CREATED
    assert task.start() == pid
    assert task.wait() == 7
    state = task.call("State")
    assert (state.status, state.exit_status, state.pid) == (STOPPED, 7, pid)
    assert abs(state.exited_at.ToNanoseconds() / 1e9 - time.time()) < 10
    deleted = task.delete()
    assert (deleted.pid, deleted.exit_status) == (pid, 7)
    eventually(lambda: daemon.events.topics == ["create", "start", "exit", "delete"], "four events in order")
    exited = daemon.events.got[2][1]
    assert (exited.container_id, exited.id, exited.pid, exited.exit_status) == (task.id, task.id, pid, 7)
    eventually(lambda: not Path(task.address.removeprefix("unix://")).exists(), "the socket goes with the shim")


def test_version_3_of_the_service_is_the_same(daemon: Daemon) -> None:
    task = daemon.task("v3").run()
    assert task.call("State", service=TASK_V3).status == RUNNING
    with pytest.raises(Unsupported, match=r"service containerd\.task\.v9\.Task"):
        task.call("State", service="containerd.task.v9.Task")


def test_a_container_that_is_not_there_is_not_found(daemon: Daemon) -> None:
    task = daemon.task("none").start_shim()
    for method in ("State", "Kill", "Wait", "Pids", "Stats", "Delete", "Connect"):
        with pytest.raises(NotFound, match="not created"):
            task.call(method)
    task.call("Shutdown")


def test_a_create_that_fails_leaves_nothing_and_says_why(daemon: Daemon) -> None:
    task = daemon.task("wrong", "/nothing/here").start_shim()
    with pytest.raises(BoxshipError, match=r"OCI runtime create failed: .*/nothing/here"):
        task.create()
    assert str(task.bundle) not in Path("/proc/mounts").read_text()
    with pytest.raises(NotFound):
        task.call("State")
    task.call("Shutdown")
    eventually(lambda: not Path(task.address.removeprefix("unix://")).exists())
    assert daemon.events.got == []


def test_a_mount_that_fails_undoes_those_before_it(daemon: Daemon) -> None:
    task = daemon.task("mounts").start_shim()
    task.mounts.append(pb.types.Mount(type="bind", source="/nothing/here", options=["bind"]))
    with pytest.raises(BoxshipError, match="failed to mount rootfs component"):
        task.create()
    assert str(task.bundle) not in Path("/proc/mounts").read_text()


def test_a_created_container_can_be_deleted(daemon: Daemon) -> None:
    task = daemon.task("created").start_shim()
    pid = task.create()
    task.call("Delete")
    assert not Path(f"/proc/{pid}").exists()
    eventually(lambda: daemon.events.topics == ["create", "exit", "delete"])


def test_a_running_container_is_not_deleted(daemon: Daemon) -> None:
    task = daemon.task("running").run()
    with pytest.raises(FailedPrecondition, match="running"):
        task.call("Delete")
    assert task.call("State").status == RUNNING


def test_many_short_processes_are_all_told(daemon: Daemon) -> None:
    """Each may be over before `Start` has answered."""
    task = daemon.task("many").run()
    for number in range(20):
        pid = task.exec(f"e{number}", "sh", "-c", f"exit {number}")
        assert task.wait(f"e{number}") == number
        assert task.call("Delete", exec_id=f"e{number}").pid == pid
    exits = [event for topic, event in daemon.events.got if topic == "/tasks/exit"]
    assert [event.exit_status for event in exits] == list(range(20))
    order = daemon.events.topics[2:]
    assert order == ["exec-added", "exec-started", "exit"] * 20


def test_the_first_process_may_be_over_before_start_has_answered(daemon: Daemon) -> None:
    for number in range(8):
        task = daemon.task(f"short{number}", "true").run()
        assert task.wait() == 0
        task.delete()
        eventually(lambda: daemon.events.topics[-1:] == ["delete"])
        assert daemon.events.topics == ["create", "start", "exit", "delete"]
        daemon.events.got.clear()


def test_exits_of_added_processes_come_before_the_first_ones(daemon: Daemon) -> None:
    task = daemon.task("order").run()
    for name in ("a", "b", "c"):
        task.exec(name, "sleep", "1000")
    task.call("Kill", signal=signal.SIGKILL)
    assert task.wait() == 137
    eventually(lambda: daemon.events.topics.count("exit") == 4)
    exits = [event.id for topic, event in daemon.events.got if topic == "/tasks/exit"]
    assert exits[-1] == task.id
    assert sorted(exits[:3]) == ["a", "b", "c"]
    with pytest.raises(FailedPrecondition, match="not running"):
        task.exec("late", "true")


def test_processes_without_a_pid_namespace_end_with_the_first(daemon: Daemon) -> None:
    def share_pids(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"] = [ns for ns in config["linux"]["namespaces"] if ns["type"] != "pid"]

    task = daemon.task("shared", "sh", "-c", "sleep 1000 & sleep 1000; true", change=share_pids).run()
    pids = [info.pid for info in eventually(lambda: len(task.call("Pids").processes) == 3 and task.call("Pids").processes)]
    os.kill(task.call("State").pid, signal.SIGKILL)
    assert task.wait() == 137
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all of them are gone")


def test_waiters_are_all_answered(daemon: Daemon) -> None:
    task = daemon.task("waiters").run()
    clients = [Client(task.address) for _ in range(3)]
    streams = [client.begin("containerd.task.v2.Task", "Wait", pb.task.WaitRequest(id=task.id)) for client in clients]
    task.call("Kill", signal=signal.SIGTERM)
    task.call("Kill", signal=signal.SIGKILL)
    for client, stream in zip(clients, streams, strict=True):
        assert client.finish(stream, pb.task.WaitResponse).exit_status == 137
        client.close()


def test_signals_and_their_errors(daemon: Daemon) -> None:
    task = daemon.task("signals", "sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.05; done").run()
    time.sleep(0.2)
    task.call("Kill", signal=signal.SIGTERM)
    assert task.wait() == 5
    with pytest.raises(NotFound, match="process already finished"):
        task.call("Kill", signal=signal.SIGTERM)


def test_exec_has_its_own_rules(daemon: Daemon) -> None:
    task = daemon.task("exec").run()
    pid = task.exec("one", "sleep", "1000")
    infos = {info.pid: info for info in task.call("Pids").processes}
    details = unpack(infos[pid].info)
    assert details is not None
    assert details.exec_id == "one"
    with pytest.raises(AlreadyExists):
        task.call("Exec", exec_id="one", spec=AnyMessage())
    for name in ("", "../x", ".."):
        with pytest.raises(InvalidArgument):
            task.call("Exec", exec_id=name, spec=AnyMessage())
    with pytest.raises(FailedPrecondition):
        task.call("Delete", exec_id="one")
    task.call("Kill", exec_id="one", signal=9)
    assert task.wait("one") == 137
    with pytest.raises(NotFound):
        task.call("Kill", exec_id="one", signal=9)
    task.call("Delete", exec_id="one")
    with pytest.raises(NotFound):
        task.call("State", exec_id="one")
    with pytest.raises(BoxshipError, match=r"OCI runtime exec failed: .*/nothing"):
        task.exec("two", "/nothing")
    assert task.call("State", exec_id="two").status == STOPPED
    task.call("Delete", exec_id="two")


# --- what can be done to it


def test_pause_and_resume(daemon: Daemon) -> None:
    task = daemon.task("pause").run()
    task.call("Pause")
    assert task.call("State").status == PAUSED
    task.call("Resume")
    assert task.call("State").status == RUNNING
    assert daemon.events.topics[2:] == ["paused", "resumed"]
    task.call("Pause")
    task.call("Kill", signal=signal.SIGKILL)
    assert task.wait() == 137, "a frozen one dies too"


def test_limits_change_and_are_counted(daemon: Daemon) -> None:
    task = daemon.task("limits").run()
    change = json.dumps({"memory": {"limit": 64 << 20}, "pids": {"limit": 77}}).encode()
    task.call("Update", resources=AnyMessage(type_url=RESOURCES, value=change))
    metrics = unpack(task.call("Stats").stats)
    assert metrics is not None
    assert metrics.pids.current == 1
    assert metrics.pids.limit == 77
    memory = metrics.memory
    assert (memory.usage.limit if hasattr(memory.usage, "limit") else memory.usage_limit) == 64 << 20


def test_lack_of_memory_is_told_before_the_exit(daemon: Daemon) -> None:
    def limit(config: dict[str, Any]) -> None:
        config["linux"]["resources"] = config["linux"].get("resources", {}) | {"memory": {"limit": 16 << 20}}

    task = daemon.task("oom", "sh", "-c", "exec tail /dev/zero", change=limit).run()
    assert task.wait() == 137
    eventually(lambda: daemon.events.topics[-1] == "exit")
    assert daemon.events.topics[2:] and daemon.events.topics[2] == "oom"


def test_a_checkpoint_that_cannot_be_made_is_an_error_and_no_more(daemon: Daemon) -> None:
    task = daemon.task("checkpoint").run()
    with pytest.raises(BoxshipError, match="OCI runtime checkpoint failed"):
        task.call("Checkpoint", path="/dev/null/nothing")
    assert task.call("State").status == RUNNING


# --- streams


def test_output_comes_out_and_ends(daemon: Daemon) -> None:
    task = daemon.task("output", "sh", "-c", "echo out; echo err >&2")
    task.fifos("stdout", "stderr")
    task.run()
    assert task.read("stdout") == b"out\n"
    assert task.read("stderr") == b"err\n"


def test_input_ends_with_closeio(daemon: Daemon) -> None:
    task = daemon.task("input", "sort")
    task.fifos("stdin", "stdout")
    task.run()
    os.write(task.fds["stdin"], b"b\na\n")
    os.close(task.fds.pop("stdin"))  # a client that goes away is no end of file
    time.sleep(0.1)
    assert task.call("State").status == RUNNING
    task.call("CloseIO", stdin=True)
    assert task.read("stdout") == b"a\nb\n"
    assert task.wait() == 0


def test_nothing_is_lost_while_the_client_is_away(daemon: Daemon) -> None:
    task = daemon.task("away", "sh", "-c", "echo before; read x; echo after; exit 3")
    task.fifos("stdin", "stdout")
    task.run()
    assert task.read("stdout", until=b"before\n") == b"before\n"
    os.close(task.fds.pop("stdout"))
    os.write(task.fds["stdin"], b"go\n")
    assert task.wait() == 3
    task.fds["stdout"] = os.open(task.streams["stdout"], os.O_RDONLY | os.O_NONBLOCK)
    assert task.read("stdout") == b"after\n"


def test_large_output_waits_for_a_slow_reader(daemon: Daemon) -> None:
    task = daemon.task("large", "sh", "-c", "yes 0123456789abcde | head -c 1048576")
    task.fifos("stdout")
    task.run()
    time.sleep(0.2)
    assert task.call("State").status == RUNNING
    assert len(task.read("stdout")) == 1048576
    assert task.wait() == 0


def test_delete_waits_for_what_was_written(daemon: Daemon) -> None:
    """More than the FIFO holds, from a process that is over before anybody reads."""
    task = daemon.task("delete", "sh", "-c", "yes 0123456789abcde | head -c 100000")
    task.fifos("stdout")
    task.run()
    assert task.wait() == 0
    assert task.client is not None
    stream = task.client.begin("containerd.task.v2.Task", "Delete", pb.task.DeleteRequest(id=task.id))
    time.sleep(0.2)
    assert len(task.read("stdout")) == 100000
    assert task.client.finish(stream, pb.task.DeleteResponse).exit_status == 0


def test_a_process_that_closes_its_input_does_not_stop_the_writer(daemon: Daemon) -> None:
    task = daemon.task("closed", "sh", "-c", "exec <&-; sleep 1000")
    task.fifos("stdin")
    task.run()
    time.sleep(0.1)
    os.write(task.fds["stdin"], b"x" * 1000)
    time.sleep(0.1)
    os.set_blocking(task.fds["stdin"], False)
    assert task.call("State").status == RUNNING
    busy = Path(f"/proc/{task.shim_pid()}/stat").read_text().split()[13:15]
    time.sleep(0.3)
    assert Path(f"/proc/{task.shim_pid()}/stat").read_text().split()[13:15] == busy, "the shim does not spin"


def test_a_terminal_with_a_size(daemon: Daemon) -> None:
    task = daemon.task("tty", "sh", "-c", "read x; stty size; tty; exit 4", terminal=True)
    task.fifos("stdin", "stdout")
    task.start_shim()
    task.create()
    task.call("ResizePty", width=101, height=33)
    task.start()
    os.write(task.fds["stdin"], b"x\n")
    seen = task.read("stdout")
    assert b"33 101" in seen
    assert b"/dev/pts/0" in seen
    assert task.wait() == 4


def test_a_terminal_for_an_added_process(daemon: Daemon) -> None:
    task = daemon.task("exectty").run()
    streams = task.fifos("stdin", "stdout", where="e-")
    task.exec("e", "sh", "-c", "tty; yes | head -c 200000", terminal=True, **streams)
    seen = task.read("e-stdout")
    assert seen.startswith(b"/dev/pts/")
    assert len(seen) > 200000
    assert task.wait("e") == 0


def test_output_to_a_file(daemon: Daemon) -> None:
    task = daemon.task("file", "sh", "-c", "echo out; echo err >&2")
    log = daemon.folder / "logs" / "one.log"
    task.streams = {"stdout": f"file://{log}", "stderr": f"file://{log}"}
    task.run()
    task.wait()
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_a_terminal_to_a_file(daemon: Daemon) -> None:
    task = daemon.task("ttyfile", "sh", "-c", "echo out", terminal=True)
    log = daemon.folder / "tty.log"
    task.streams = {"stdout": f"file://{log}"}
    task.run()
    task.wait()
    eventually(lambda: log.read_bytes() == b"out\r\n")


def test_output_to_a_program(daemon: Daemon) -> None:
    program = daemon.folder / "logger"
    result = daemon.folder / "result"
    program.write_text(f"#!/bin/sh\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE $1 $2\" >{result}\nexec 5>&-\n"
                       f"cat <&3 >>{result} & cat <&4 >>{result} & trap 'echo end >>{result}; exit' TERM; wait; sleep 60 & wait\n")
    program.chmod(0o755)
    task = daemon.task("binary", "sh", "-c", "echo out; echo err >&2")
    task.streams = {"stdout": f"binary://{program}?key=a%20value"}
    task.run()
    task.wait()
    eventually(lambda: "out" in result.read_text() and "err" in result.read_text())
    task.delete()
    eventually(lambda: "end" in result.read_text())
    assert result.read_text().splitlines()[0] == f"{task.id} {NAMESPACE} key a value"


def test_a_logging_program_that_is_not_there_is_an_error(daemon: Daemon) -> None:
    task = daemon.task("nolog").start_shim()
    task.streams = {"stdout": "binary:///nothing/here"}
    with pytest.raises(Unavailable, match="/nothing/here"):
        task.create()


def test_streams_of_an_unknown_kind_are_refused(daemon: Daemon) -> None:
    task = daemon.task("scheme").start_shim()
    task.streams = {"stdout": "carrier-pigeon:///x"}
    with pytest.raises(Unsupported, match="carrier-pigeon"):
        task.create()


# --- pods


def test_a_pod_has_one_shim(daemon: Daemon) -> None:
    def join(config: dict[str, Any]) -> None:
        config["annotations"] = {"io.kubernetes.cri.sandbox-id": daemon.folder.name}

    first = daemon.task("first", change=join).run()
    second = daemon.task("second", change=join).run()
    assert first.address == second.address
    assert first.shim_pid() == second.shim_pid()
    first.call("Kill", signal=9)
    assert first.wait() == 137
    first.delete()  # and Shutdown, which must not end the other
    assert second.call("State").status == RUNNING


def test_two_tasks_without_a_pod_have_a_shim_each(daemon: Daemon) -> None:
    assert daemon.task("one").run().shim_pid() != daemon.task("two").run().shim_pid()


# --- containerd goes, the shim stays


def test_events_wait_for_containerd(daemon: Daemon) -> None:
    task = daemon.task("down", "sh", "-c", "sleep 0.3; exit 9").run()
    eventually(lambda: daemon.events.topics == ["create", "start"])
    daemon.events.down()
    task.connect()
    assert task.wait() == 9
    time.sleep(0.5)
    begun = time.monotonic()
    daemon.events.up()
    eventually(lambda: daemon.events.topics == ["create", "start", "exit"])
    assert time.monotonic() - begun < 0.5, "at once, and not at the next try"


def test_without_a_ttrpc_address_events_go_by_the_publish_program(daemon: Daemon) -> None:
    program = daemon.folder / "publish"
    program.write_text(f"#!/bin/sh\necho \"$@\" >>{daemon.folder}/published\n")
    program.chmod(0o755)
    daemon.environ["TTRPC_ADDRESS"] = ""
    daemon.publish = str(program)
    task = daemon.task("publish", "true").run()
    task.wait()
    task.delete()
    published = daemon.folder / "published"
    eventually(lambda: published.exists() and len(published.read_text().splitlines()) == 4)
    topics = [line.split("--topic ")[1].split()[0] for line in published.read_text().splitlines()]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


# --- other runtimes


@pytest.mark.parametrize("binary", ["runc", "crun"])
def test_another_runtime_by_name(daemon: Daemon, binary: str) -> None:
    unified = Path("/sys/fs/cgroup/unified/cgroup.controllers")
    if binary == "crun" and unified.exists() and unified.read_text().split():
        pytest.skip("crun does not run here: it refuses a v2 hierarchy with controllers beside v1's")
    daemon.options.binary_name = binary
    task = daemon.task(binary, "sh", "-c", "echo out; read x; exit 6")
    task.fifos("stdin", "stdout")
    task.run()
    assert task.read("stdout", until=b"out\n") == b"out\n"
    assert task.exec("e", "sh", "-c", "exit 3") and task.wait("e") == 3
    task.call("Pause")
    task.call("Resume")
    assert len(task.call("Pids").processes) == 1
    os.write(task.fds["stdin"], b"\n")
    assert task.wait() == 6
    with pytest.raises(BoxshipError):
        task.exec("late", "true")
    task.delete()


def test_a_runtime_that_is_not_there_is_an_error(daemon: Daemon) -> None:
    daemon.options.binary_name = "/nothing/here"
    task = daemon.task("norun").start_shim()
    with pytest.raises(BoxshipError, match="/nothing/here"):
        task.create()


# --- the command line


def test_the_address_in_each_form(daemon: Daemon) -> None:
    plain = daemon.task("text").start_shim()
    assert plain.address.startswith("unix:///run/containerd/s/")
    assert (plain.bundle / "address").read_text() == plain.address
    daemon.environ["MAX_SHIM_VERSION"] = "2"
    found = json.loads(daemon.task("json").run_shim("start", given=b"").stdout)
    assert (found["version"], found["protocol"]) == (2, "ttrpc")
    daemon.environ["MAX_SHIM_VERSION"] = "4"
    assert json.loads(daemon.task("json3").run_shim("start", given=b"").stdout)["version"] == 3
    task = daemon.task("proto")
    params = pb.bootstrap.BootstrapParams(instance_id=task.id, namespace=NAMESPACE)
    params.extensions.add().value.CopyFrom(pack(daemon.options))
    result = pb.bootstrap.BootstrapResult.FromString(task.run_shim("start", given=params.SerializeToString()).stdout)
    assert (result.version, result.protocol) == (3, "ttrpc")
    assert Path(result.address.removeprefix("unix://")).is_socket()
    for other in daemon.tasks:
        Client((other.bundle / "address").read_text()).call(TASK_V3, "Shutdown", pb.task.ShutdownRequest(), pb.task.ShutdownRequest)


def test_flags_of_newer_versions_are_passed_over(daemon: Daemon) -> None:
    task = daemon.task("flags")
    done = task.run_shim("-new-flag", "value", "--newer=1", "-debug", "start")
    assert done.returncode == 0, done
    task.address = done.stdout.decode()
    task.connect()
    task.call("Shutdown")


def test_what_is_wrong_is_said(daemon: Daemon) -> None:
    done = daemon.task("bad").run_shim("dance")
    assert done.returncode == 1
    assert b"dance" in done.stderr
    assert done.stdout == b""


def test_info_and_version(daemon: Daemon) -> None:
    task = daemon.task("info")
    assert b"Version:" in task.run_shim("-v").stdout
    info = pb.types.RuntimeInfo.FromString(task.run_shim("-info").stdout)
    assert info.name == "io.containerd.boxship.v1"
    assert "mountOptions" in json.loads(info.features.value)


# --- bad input


def test_frames_that_break_the_rules(daemon: Daemon) -> None:
    import socket

    from boxship.api.ttrpc import wire
    from boxship.api.ttrpc.client import socket_address

    task = daemon.task("frames").run()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(socket_address(task.address))
        request = wire.request(1, "containerd.task.v2.Task", "State", pb.task.StateRequest(id=task.id).SerializeToString())
        raw.sendall(request)
        raw.sendall(request)  # the same stream again
        raw.sendall(wire.HEADER.pack(0, 2, wire.REQUEST, 0))  # an even one
        raw.sendall(wire.HEADER.pack(wire.DATA_MAX + 5, 5, wire.REQUEST, 0) + bytes(wire.DATA_MAX + 5))
        raw.sendall(wire.frame(7, wire.REQUEST, 0, b"\xff\xff\xff"))
        frames = wire.Frames()
        answers: dict[int, list[Any]] = {}
        while sum(map(len, answers.values())) < 5:
            for stream, _, _, payload in frames.feed(raw.recv(65536)):
                answers.setdefault(stream, []).append(payload)
    assert wire.result(answers[1][0], pb.task.StateResponse).status == RUNNING
    for stream, index, kind in ((1, 1, InvalidArgument), (2, 0, InvalidArgument), (5, 0, ResourceExhausted), (7, 0, InvalidArgument)):
        with pytest.raises(kind):
            wire.result(answers[stream][index], pb.task.StateResponse)
    assert task.call("State").status == RUNNING


def test_the_shim_runs_as_containerd_expects_it(daemon: Daemon) -> None:
    task: Task = daemon.task("place").run()
    pid = task.shim_pid()
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"PPid:\t{pid}" in Path(f"/proc/{task.call('State').pid}/status").read_text(), "the parent of its container"
    assert os.getsid(pid) == pid
    assert "Threads:\t1\n" in status
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    open_files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert len(open_files) < 24, open_files
