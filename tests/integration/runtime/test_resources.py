"""update and events: limits that change, and what the container uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.machine import Bundle, Machine

Ask = Callable[[Callable[[], object]], object]


def cgroup_file(machine: Machine, box: str, controller: str, name: str) -> Path:
    """A file of the container's cgroup, in the controller's v1 hierarchy; skips where there is none."""
    pid = machine.state(box)["pid"]
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            for mounted in (controllers, controller):
                file = Path(f"/sys/fs/cgroup/{mounted}{path}/{name}")
                if file.exists():
                    return file
    pytest.skip(f"no v1 hierarchy of {controller} here: tests of v2 are in the guest lane")


def test_update_by_flags_changes_the_kernels_limits(machine: Machine, running: str) -> None:
    machine.ok("update", "--memory", "64M", "--pids-limit", "33", "--cpu-quota", "20000", "--cpu-period", "100000", running)
    assert cgroup_file(machine, running, "memory", "memory.limit_in_bytes").read_text() == f"{64 << 20}\n"
    assert cgroup_file(machine, running, "pids", "pids.max").read_text() == "33\n"
    assert cgroup_file(machine, running, "cpu", "cpu.cfs_quota_us").read_text() == "20000\n"
    machine.ok("update", "--pids-limit", "-1", running)
    assert cgroup_file(machine, running, "pids", "pids.max").read_text() == "max\n"
    # What was not mentioned stays.
    assert cgroup_file(machine, running, "memory", "memory.limit_in_bytes").read_text() == f"{64 << 20}\n"


def test_update_by_a_file_and_by_standard_input(machine: Machine, running: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"pids": {"limit": 44}}))
    machine.ok("update", "--resources", str(tmp_path / "r.json"), running)
    assert cgroup_file(machine, running, "pids", "pids.max").read_text() == "44\n"
    (tmp_path / "r.json").write_text(json.dumps({"pids": {"limit": 55}}))
    with open(tmp_path / "r.json") as given:
        machine.ok("update", "-r", "-", running, stdin=given)
    assert cgroup_file(machine, running, "pids", "pids.max").read_text() == "55\n"


def test_a_refused_update_changes_nothing(machine: Machine, running: str, tmp_path: Path) -> None:
    file = cgroup_file(machine, running, "pids", "pids.max")
    before = file.read_text()
    for text in ("{", "[]", '{"pids": {"limit": "many"}}'):
        (tmp_path / "r.json").write_text(text)
        assert machine("update", "-r", str(tmp_path / "r.json"), running).code == 1
    assert machine("update", "--memory", "lots", running).code == 1
    assert file.read_text() == before


def test_a_stopped_container_is_not_updated(machine: Machine, running: str, eventually: Ask) -> None:
    machine.ok("kill", running, "KILL")
    eventually(lambda: machine.state(running)["status"] == "stopped")
    refused = machine("update", "--pids-limit", "5", running)
    assert refused.code == 1 and "container not running" in refused.err


def test_events_stats_shows_what_is_used(machine: Machine, bundle: Bundle, box: str) -> None:
    bundle.linux.setdefault("resources", {})["pids"] = {"limit": 77}  # type: ignore[attr-defined]
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    event = json.loads(machine.ok("events", "--stats", box))
    assert (event["type"], event["id"]) == ("stats", box)
    assert event["data"]["pids"] == {"current": 1, "limit": 77}
    assert event["data"]["memory"]["usage"]["usage"] > 0
    assert event["data"]["cpu"]["usage"]["total"] > 0


def test_events_come_every_interval_until_the_container_is_gone(machine: Machine, running: str, eventually: Ask) -> None:
    command = machine.begin("events", "--interval", "50ms", running)
    eventually(lambda: command.output().count("\n") >= 3)
    machine.ok("delete", "--force", running)
    done = command.wait(20)
    assert done.code == 0
    assert {json.loads(line)["type"] for line in done.out.splitlines()} == {"stats"}


def test_events_tell_of_a_lack_of_memory(machine: Machine, bundle: Bundle, box: str, eventually: Ask) -> None:
    bundle.linux.setdefault("resources", {})["memory"] = {"limit": 16 << 20, "swap": 16 << 20}  # type: ignore[attr-defined]
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    cgroup_file(machine, box, "memory", "memory.limit_in_bytes")
    command = machine.begin("events", "--interval", "100ms", box)
    eventually(lambda: '"stats"' in command.output())
    machine("exec", box, "sh", "-c", "x=$(head -c 100000000 /dev/zero | tr '\\0' x)")
    eventually(lambda: '"oom"' in command.output())
    machine.ok("delete", "--force", box)
    assert command.wait(20).code == 0


def test_events_of_a_stopped_container_are_refused(machine: Machine, running: str, eventually: Ask) -> None:
    machine.ok("kill", running, "KILL")
    eventually(lambda: machine.state(running)["status"] == "stopped")
    refused = machine("events", "--stats", running)
    assert refused.code == 1 and f"container with id {running} is not running" in refused.err
    assert machine("events", "--interval", "0s", running).code == 1
