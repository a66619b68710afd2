"""SIGKILL for the runtime at any moment: what is left can be looked at and deleted, and then nothing is left at all."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import boxship
from support.machine import Bundle, Look, Machine

SOURCE = Path(boxship.__file__).parent / "runtime"
STATES = {"creating", "created", "running", "stopped", "paused"}


def points(prefix: str) -> list[str]:
    """The names of the points at which a command may be killed, as the source has them."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        found |= set(re.findall(rf'failpoint\.hit\("({prefix}\.[a-z]+)"\)', path.read_text()))
    return sorted(found)


def plain(bundle: Bundle) -> None:
    pass


def user_namespace(bundle: Bundle) -> None:
    bundle.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
    for kind in ("uidMappings", "gidMappings"):
        bundle.linux[kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]


def everything(bundle: Bundle) -> None:
    """Hooks on every occasion, seccomp, devices, a volume, limits, a cgroup namespace; own path for the group."""
    hook = [{"path": "/bin/true"}]
    bundle.spec["hooks"] = dict.fromkeys(("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"), hook)
    bundle.spec["hooks"]["startContainer"] = [{"path": "/bin/true"}]  # type: ignore[index]
    bundle.linux["namespaces"].append({"type": "cgroup"})  # type: ignore[attr-defined]
    bundle.linux["resources"] = {"pids": {"limit": 50}, "memory": {"limit": 1 << 28}, "devices": [{"allow": False, "access": "rwm"}]}
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO"}]}
    bundle.linux["devices"] = [{"path": "/dev/own", "type": "c", "major": 1, "minor": 3}]
    bundle.bind("/tmp", "/mnt", "ro")


def shared(bundle: Bundle) -> None:
    """No namespace but that of mounts: nothing ends by the end of init."""
    bundle.linux["namespaces"] = [{"type": "mount"}]
    del bundle.spec["hostname"]
    bundle.process["args"] = ["sh", "-c", "sleep 1000 & sleep 1000 & wait"]


VARIANTS: list[Callable[[Bundle], None]] = [plain, user_namespace, everything, shared]


def check(machine: Machine, container: str, before: Look, when: object) -> None:
    """state answers, delete --force succeeds, and nothing is left."""
    done = machine("state", container)
    if done.code == 0:
        assert json.loads(done.out)["status"] in STATES, (when, done)
    else:
        assert done.code == 1 and "container does not exist" in done.err, (when, done)
    listed = machine.ok("list", "--format", "json")
    for entry in json.loads(listed) or []:
        assert entry["status"] in STATES, when
    done = machine("delete", "--force", container)
    assert done.code == 0, (when, done)
    assert machine("state", container).code == 1, when
    left = machine.left(before)
    assert not left, (when, left)


@pytest.mark.parametrize(
    ("command", "variant"), [*(("create", variant) for variant in VARIANTS), ("run", everything)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_killed_at_each_point_of_its_making_a_container_can_be_deleted(
    machine: Machine, bundle: Bundle, command: str, variant: Callable[[Bundle], None]
) -> None:
    """`create` and `run -d`, killed at the first point, at the second, and so on until one run comes through."""
    variant(bundle)
    path = bundle.write()
    machine.warm_up()
    before = machine.look()
    for number in range(1, 100):
        container = machine.name()
        flags = ["-d"] if command == "run" else []
        done = machine(command, *flags, "-b", path, container, env={"BOXSHIP_FAILPOINT": f"*=count:{number}"})
        check(machine, container, before, number)
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done
    assert number > 8, "there are so many points"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__)
def test_killed_at_each_point_start_leaves_a_container_that_can_be_deleted(
    machine: Machine, bundle: Bundle, variant: Callable[[Bundle], None]
) -> None:
    """`start`: init waits still, or it runs; what `state` says is what is the case."""
    variant(bundle)
    path = bundle.write()
    before = machine.look()
    for number in range(1, 100):
        container = machine.name()
        machine.ok("create", "-b", path, container)
        pid = machine.state(container)["pid"]
        done = machine("start", container, env={"BOXSHIP_FAILPOINT": f"*=count:{number}"})
        status = machine.state(container)["status"]
        assert status in ("created", "running"), (number, status)
        if status == "running":
            deadline = time.monotonic() + 10
            while _command(pid).startswith("boxrun") and time.monotonic() < deadline:
                time.sleep(0.01)
        assert _command(pid).startswith("boxrun") == (status == "created"), (number, status, _command(pid))
        check(machine, container, before, number)
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done
    assert number > 2


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__)
def test_killed_at_each_point_exec_harms_nobody(
    machine: Machine, bundle: Bundle, variant: Callable[[Bundle], None]
) -> None:
    """`exec -d`: the container goes on, and of the process that was to join nothing stays but itself, if it runs."""
    variant(bundle)
    whole = machine.look()
    container = machine.name()
    machine.ok("run", "-d", "-b", bundle.write(), container)
    machine.left(whole, 0)
    time.sleep(0.1)
    before = machine.look()
    for number in range(1, 100):
        done = machine("exec", "-d", container, "true", env={"BOXSHIP_FAILPOINT": f"*=count:{number}"})
        left = machine.left(before)
        assert not left, (number, left)
        assert machine.state(container)["status"] == "running"
        assert machine.ok("exec", container, "echo", "fine") == "fine\n"
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done
    assert number > 2
    check(machine, container, whole, "end")


@pytest.mark.parametrize("running", [False, True], ids=["created", "running"])
@pytest.mark.parametrize("variant", [everything, shared], ids=lambda v: v.__name__)
def test_killed_at_each_point_delete_can_be_repeated(
    machine: Machine, bundle: Bundle, variant: Callable[[Bundle], None], running: bool
) -> None:
    """`delete --force`: the second one finds whatever the first has left."""
    variant(bundle)
    path = bundle.write()
    before = machine.look()
    for number in range(1, 100):
        container = machine.name()
        machine.ok(*(["run", "-d"] if running else ["create"]), "-b", path, container)
        done = machine("delete", "--force", container, env={"BOXSHIP_FAILPOINT": f"*=count:{number}"})
        check(machine, container, before, number)
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done
    assert number > 4


@pytest.mark.parametrize("error", ["enospc", "emfile"])
@pytest.mark.parametrize("variant", [plain, everything], ids=lambda v: v.__name__)
def test_an_error_at_any_point_undoes_a_create(
    machine: Machine, bundle: Bundle, variant: Callable[[Bundle], None], error: str
) -> None:
    """Whatever step fails, `create` says so, and leaves nothing: no `delete` is needed."""
    variant(bundle)
    path = bundle.write()
    before = machine.look()
    for point in points("create"):
        container = machine.name()
        done = machine("create", "-b", path, container, env={"BOXSHIP_FAILPOINT": f"{point}={error}"})
        if done.code == 0:
            assert point in ("create.files", "create.hooks") and variant is plain, point
            machine.ok("delete", "--force", container)
            continue
        assert done.code == 1 and "Traceback" not in done.err and done.err.strip(), (point, done)
        left = machine.left(before)
        assert not left, (point, left)


@pytest.mark.parametrize("error", ["enospc", "emfile"])
def test_an_error_at_any_point_undoes_an_exec(machine: Machine, bundle: Bundle, error: str) -> None:
    """`exec` that fails half-way ends its process; the container goes on."""
    container = machine.name()
    machine.ok("run", "-d", "-b", bundle.write(), container)
    time.sleep(0.1)
    before = machine.look()
    for point in points("exec"):
        done = machine("exec", container, "true", env={"BOXSHIP_FAILPOINT": f"{point}={error}"})
        assert done.code == 255 and "Traceback" not in done.err, (point, done)
        left = machine.left(before)
        assert not left, (point, left)
    assert machine.state(container)["status"] == "running"
    machine.ok("delete", "-f", container)


def _command(pid: object) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


# --- at random moments -----------------------------------------------------------------------------------------------


def length_of(machine: Machine, path: str, warm: bool) -> float:
    """How long a create takes here and now."""
    container = machine.name()
    begun = time.monotonic()
    machine.ok("create", "-b", path, container, warm=warm)
    spent = time.monotonic() - begun
    machine.ok("delete", "--force", container)
    return spent


@pytest.mark.parametrize("victim", ["caller", "worker", "both", "cold"])
@pytest.mark.parametrize("variant", [everything, shared], ids=lambda v: v.__name__)
def test_killed_at_any_moment_of_its_making_a_container_can_be_deleted(
    machine: Machine, bundle: Bundle, variant: Callable[[Bundle], None], victim: str
) -> None:
    """The native process, the worker that does its work, or both at once, after a delay of any length."""
    variant(bundle)
    path = bundle.write()
    machine.warm_up()
    warm = victim != "cold"
    before = machine.look()
    length = min(length_of(machine, path, warm) for _ in range(3))
    random.seed(f"{victim}{variant.__name__}")
    killed = 0
    for turn in range(30 if warm else 12):
        if warm:
            machine.warm_up()
        container = machine.name()
        command = ["create"] if turn % 2 else ["run", "-d"]
        begun = machine.begin(*command, "-b", path, container, warm=warm)
        time.sleep(random.uniform(0, length * 1.2))
        if victim in ("worker", "both"):
            _kill(machine.warm_workers())
        if victim != "worker":
            _kill([begun.pid])
        done = begun.wait()
        killed += done.code != 0
        assert "Traceback" not in done.err
        check(machine, container, before, (turn, done))
    # To start a process from this one, or to find the workers, may take longer than a warm create: then those are hit at its end
    # only, which is a moment too.
    assert killed > 2 or warm, "some were hit before they were through"


@pytest.mark.parametrize("victim", ["caller", "worker", "cold"])
@pytest.mark.parametrize("command", ["start", "exec", "delete"])
def test_killed_at_any_moment_a_command_leaves_a_container_that_can_be_deleted(
    machine: Machine, bundle: Bundle, command: str, victim: str
) -> None:
    """`start`, `exec` and `delete --force`, hit at random."""
    everything(bundle)
    path = bundle.write()
    machine.warm_up()
    warm = victim != "cold"
    before = machine.look()
    random.seed(f"{victim}{command}")
    for turn in range(16 if warm else 7):
        container = machine.name()
        machine.ok(*(["create"] if command == "start" else ["run", "-d"]), "-b", path, container)
        if warm:
            machine.warm_up()
        words = {"start": ["start", container], "exec": ["exec", container, "true"], "delete": ["delete", "-f", container]}[command]
        begun = machine.begin(*words, warm=warm)
        time.sleep(random.uniform(0, 0.02 if warm else 0.15))
        _kill(machine.warm_workers() if victim == "worker" else [begun.pid])
        begun.wait()
        check(machine, container, before, (turn, victim))


def test_the_server_killed_in_the_middle_of_a_command_is_not_missed(machine: Machine, bundle: Bundle) -> None:
    """A worker at work finishes what it does; the next command has no server, does without, and starts one."""
    path = bundle.write()
    before = machine.look()
    random.seed("server")
    for turn in range(15):
        machine.warm_up()
        container = machine.name()
        begun = machine.begin("create", "-b", path, container)
        time.sleep(random.uniform(0, 0.02))
        _kill([machine.warm_server()])
        done = begun.wait()
        assert done.code == 0, (turn, done)
        assert machine.state(container)["status"] == "created"
        check(machine, container, before, turn)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
