"""The states of a container, and which command is allowed in which."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from support.machine import Bundle, Done, Machine

Ask = Callable[[Callable[[], object]], object]


def test_create_start_and_the_end_are_told_by_state(machine: Machine, bundle: Bundle, box: str, eventually: Ask, way: bool) -> None:
    bundle.spec["annotations"] = {"a.b": "c"}
    bundle.shell("read word < /tmp/gate")
    os.mkfifo(bundle.rootfs / "tmp/gate")
    bundle.without("/tmp")
    machine.ok("create", "--bundle", bundle.write(), box, warm=way)
    created = machine.state(box)
    assert created["status"] == "created"
    assert created["bundle"] == str(bundle.path) and created["rootfs"] == str(bundle.rootfs)
    assert created["annotations"] == {"a.b": "c"} and created["ociVersion"] == bundle.spec["ociVersion"]
    pid = created["pid"]
    assert isinstance(pid, int) and os.path.exists(f"/proc/{pid}")
    machine.ok("start", box, warm=way)
    assert machine.state(box) | {"status": ""} == created | {"status": ""}
    assert machine.state(box)["status"] == "running"
    (bundle.rootfs / "tmp/gate").write_text("go\n")
    eventually(lambda: machine.state(box)["status"] == "stopped")
    assert machine.state(box)["pid"] == 0
    machine.ok("delete", box, warm=way)
    gone = machine("state", box)
    assert gone.code == 1 and "container does not exist" in gone.err


def test_the_program_does_not_run_before_start(machine: Machine, bundle: Bundle, box: str, eventually: Ask) -> None:
    bundle.writable()
    bundle.shell("touch /done; sleep 1000")
    machine.ok("create", "--bundle", bundle.write(), box)
    assert Path(f"/proc/{machine.state(box)['pid']}/comm").read_text() != "sh\n"
    assert not (bundle.rootfs / "done").exists()
    machine.ok("start", box)
    eventually((bundle.rootfs / "done").exists)


def test_an_id_is_taken_once(machine: Machine, bundle: Bundle, running: str) -> None:
    second = machine("create", "--bundle", str(bundle.path), running)
    assert second.code == 1 and "container with given ID already exists" in second.err
    assert machine.state(running)["status"] == "running"


def test_a_running_container_is_neither_started_nor_deleted(machine: Machine, running: str) -> None:
    again = machine("start", running)
    assert again.code == 1 and "cannot start an already running container" in again.err
    refused = machine("delete", running)
    assert refused.code == 1 and f"cannot delete container {running} that is not stopped: running" in refused.err
    assert machine.state(running)["status"] == "running"


def test_a_stopped_container_is_not_started(machine: Machine, running: str, eventually: Ask) -> None:
    machine.ok("kill", running, "KILL")
    eventually(lambda: machine.state(running)["status"] == "stopped")
    refused = machine("start", running)
    assert refused.code == 1 and "cannot start a container that has stopped" in refused.err


def test_a_created_container_can_be_deleted(machine: Machine, bundle: Bundle, box: str) -> None:
    machine.ok("create", "--bundle", bundle.write(), box)
    pid = machine.state(box)["pid"]
    machine.ok("delete", box)
    assert not os.path.exists(f"/proc/{pid}/exe")


def test_delete_force_of_nothing_is_a_success(machine: Machine) -> None:
    assert machine("delete", "--force", machine.name()).code == 0
    refused = machine("delete", machine.name())
    assert refused.code == 1 and "container does not exist" in refused.err


def test_kill_sends_the_signal_by_name_and_by_number(machine: Machine, bundle: Bundle, box: str, eventually: Ask) -> None:
    bundle.writable()
    bundle.shell("trap 'echo usr1 >> /log' USR1; trap 'echo term >> /log; exit 0' TERM; echo up >> /log; while :; do sleep 0.05; done")
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    log = bundle.rootfs / "log"
    eventually(lambda: log.exists() and "up" in log.read_text())
    machine.ok("kill", box, "SIGUSR1")
    eventually(lambda: "usr1" in log.read_text())
    machine.ok("kill", box, str(int(signal.SIGUSR1)))
    eventually(lambda: log.read_text().count("usr1") == 2)
    machine.ok("kill", box)
    eventually(lambda: machine.state(box)["status"] == "stopped")
    assert log.read_text().endswith("term\n")


def test_kill_of_a_stopped_container_says_so(machine: Machine, running: str, eventually: Ask) -> None:
    machine.ok("kill", running, "9")
    eventually(lambda: machine.state(running)["status"] == "stopped")
    refused = machine("kill", running, "TERM")
    assert refused.code == 1 and "container not running" in refused.err
    unknown = machine("kill", running, "SIGNOSUCH")
    assert unknown.code == 1 and "unknown signal" in unknown.err


def test_without_a_pid_namespace_kill_reaches_everybody(machine: Machine, bundle: Bundle, box: str, eventually: Ask) -> None:
    bundle.linux["namespaces"] = [ns for ns in bundle.linux["namespaces"] if ns["type"] != "pid"]  # type: ignore[attr-defined]
    bundle.shell("sleep 1000 & sleep 1000 & wait")
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    eventually(lambda: len(json.loads(machine.ok("ps", "--format", "json", box))) == 3)
    pids = json.loads(machine.ok("ps", "--format", "json", box))
    machine.ok("kill", box, "KILL")
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids))


def test_pause_stops_everything_and_resume_lets_it_go_on(machine: Machine, bundle: Bundle, box: str, eventually: Ask) -> None:
    bundle.writable()
    bundle.shell("while :; do echo . >> /log; sleep 0.01; done")
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    log = bundle.rootfs / "log"
    eventually(lambda: log.exists() and log.stat().st_size > 6)
    machine.ok("pause", box)
    assert machine.state(box)["status"] == "paused"
    size = log.stat().st_size
    assert machine("pause", box).code == 1
    refused = machine("exec", box, "true")
    assert refused.code == 255 and "cannot exec in a paused container (use --ignore-paused to override)" in refused.err
    assert machine("delete", box).code == 1
    assert log.stat().st_size == size
    machine.ok("resume", box)
    assert machine.state(box)["status"] == "running"
    eventually(lambda: log.stat().st_size > size)
    again = machine("resume", box)
    assert again.code == 1 and "container not paused" in again.err


def test_a_paused_container_dies_by_kill(machine: Machine, running: str, eventually: Ask) -> None:
    machine.ok("pause", running)
    machine.ok("kill", running, "KILL")
    eventually(lambda: machine.state(running)["status"] == "stopped")
    machine.ok("delete", running)


def test_a_paused_container_is_deleted_by_force(machine: Machine, running: str) -> None:
    machine.ok("pause", running)
    machine.ok("delete", "--force", running)


def test_ps_shows_the_processes_of_the_container_alone(machine: Machine, bundle: Bundle, box: str, eventually: Ask) -> None:
    bundle.shell("sleep 1001 & sleep 1002 & wait")
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    eventually(lambda: len(json.loads(machine.ok("ps", "--format", "json", box))) == 3)
    table = machine.ok("ps", box).splitlines()
    assert table[0].split()[:2] == ["UID", "PID"] and len(table) == 4
    assert sum("sleep 100" in line for line in table) >= 2
    own = machine.ok("ps", box, "-e", "-o", "pid,args").splitlines()
    assert own[0].split() == ["PID", "COMMAND"] and len(own) == 4
    bad = machine("ps", "--format", "xml", box)
    assert bad.code == 1 and "invalid format option" in bad.err


def test_list_shows_all_in_each_form(machine: Machine, bundle: Bundle, running: str) -> None:
    other = machine.name()
    machine.ok("create", "--bundle", str(bundle.path), other)
    try:
        rows = {row["id"]: row for row in json.loads(machine.ok("list", "--format", "json"))}
        assert rows[running]["status"] == "running" and rows[other]["status"] == "created"
        assert rows[running]["owner"] == "root"
        assert set(machine.ok("list", "-q").split()) >= {running, other}
        table = machine.ok("list").splitlines()
        assert table[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
        assert any(line.split()[:1] == [running] and "running" in line for line in table)
    finally:
        machine.ok("delete", "--force", other)


def test_run_gives_the_exit_status_of_the_program(machine: Machine, bundle: Bundle, way: bool) -> None:
    for script, code in (("exit 7", 7), ("kill -TERM $$; sleep 5", 128 + 15), ("true", 0)):
        # Pid 1 is not killed by a signal of its own: a child's status stands for it.
        bundle.shell(f"sh -c '{script}'; exit $?")
        done = machine("run", "--bundle", bundle.write(), machine.name(), warm=way)
        assert done.code == code, (script, done)


def test_run_passes_signals_on(machine: Machine, bundle: Bundle, box: str, eventually: Ask, way: bool) -> None:
    bundle.writable()
    bundle.shell("trap 'exit 42' TERM; touch /up; while :; do sleep 0.05; done")
    command = machine.begin("run", "--bundle", bundle.write(), box, warm=way)
    eventually((bundle.rootfs / "up").exists)
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait().code == 42


def test_run_keep_leaves_the_record(machine: Machine, bundle: Bundle, box: str) -> None:
    bundle.process["args"] = ["true"]
    assert machine("run", "--keep", "--bundle", bundle.write(), box).code == 0
    assert machine.state(box)["status"] == "stopped"
    machine.ok("delete", box)


def test_the_pid_file_holds_the_number_and_nothing_else(machine: Machine, bundle: Bundle, box: str, tmp_path: Path) -> None:
    machine.ok("create", "--bundle", bundle.write(), "--pid-file", str(tmp_path / "pid"), box)
    assert (tmp_path / "pid").read_text() == str(machine.state(box)["pid"])
    machine.ok("start", box)
    machine.ok("exec", "--detach", "--pid-file", str(tmp_path / "exec"), box, "sleep", "1000")
    pid = int((tmp_path / "exec").read_text())
    assert pid in json.loads(machine.ok("ps", "--format", "json", box))


def test_a_program_that_is_not_there_is_named_and_nothing_stays(machine: Machine, bundle: Bundle) -> None:
    bundle.process["args"] = ["/no/such"]
    refused = machine("run", "--detach", "--bundle", bundle.write(), machine.name())
    assert refused.code == 1 and "/no/such" in refused.err and "no such file or directory" in refused.err


# --- two commands at once --------------------------------------------------------------------------------------------


def together(*calls: Callable[[], Done]) -> list[Done]:
    results: list[Done | None] = [None] * len(calls)

    def one(i: int) -> None:
        results[i] = calls[i]()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None]


def test_of_two_creates_of_one_id_one_wins(machine: Machine, bundle: Bundle, box: str) -> None:
    bundle.write()
    for _ in range(3):
        done = together(*[lambda: machine("create", "--bundle", str(bundle.path), box)] * 4)
        assert sorted(d.code for d in done) == [0, 1, 1, 1], done
        assert all("container with given ID already exists" in d.err for d in done if d.code)
        assert machine.state(box)["status"] == "created"
        machine.ok("delete", box)


def test_of_two_starts_one_wins(machine: Machine, bundle: Bundle, box: str) -> None:
    machine.ok("create", "--bundle", bundle.write(), box)
    done = together(*[lambda: machine("start", box)] * 4)
    assert sorted(d.code for d in done) == [0, 1, 1, 1], done
    assert all("cannot start an already running container" in d.err for d in done if d.code)
    assert machine.state(box)["status"] == "running"


def test_of_two_deletes_one_wins_and_forced_ones_do_not_mind(machine: Machine, bundle: Bundle, box: str) -> None:
    machine.ok("create", "--bundle", bundle.write(), box)
    done = together(*[lambda: machine("delete", box)] * 3)
    assert sorted(d.code for d in done) == [0, 1, 1], done
    machine.ok("run", "--detach", "--bundle", str(bundle.path), box)
    done = together(*[lambda: machine("delete", "--force", box)] * 3)
    assert [d.code for d in done] == [0, 0, 0], done


def test_exec_and_delete_at_once_leave_nothing(machine: Machine, bundle: Bundle, box: str) -> None:
    bundle.write()
    for _ in range(3):
        machine.ok("run", "--detach", "--bundle", str(bundle.path), box)
        done = together(
            lambda: machine("exec", box, "sleep", "1000"), lambda: machine("exec", box, "true"), lambda: machine("delete", "--force", box)
        )
        assert done[2].code == 0, done
        assert machine("state", box).code == 1


def test_pause_resume_update_and_state_at_once_do_no_harm(machine: Machine, running: str) -> None:
    calls = [
        lambda: machine("pause", running), lambda: machine("resume", running), lambda: machine("update", "--pids-limit", "50", running),
        lambda: machine("state", running),
    ]
    for _ in range(3):
        done = together(*calls)
        assert done[2].code == 0 and done[3].code == 0, done
        if machine.state(running)["status"] == "paused":
            machine.ok("resume", running)
    assert machine.state(running)["status"] == "running"
    machine.ok("exec", running, "true")
