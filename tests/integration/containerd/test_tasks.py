"""Tasks held by the real containerd-shim-runc-v2 with the real runc: life, exits, and a daemon that goes and comes back."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from boxship.api.any import PROCESS
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call
from boxship.containerd.tasks import shims
from boxship.kit.errors import AlreadyExists, BoxshipError, InvalidArgument, NotFound, Unavailable
from support import image
from support.tasks import Daemon, specification

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not shutil.which("containerd-shim-runc-v2"), reason="containerd-shim-runc-v2 is not installed"),
]
CALL = Call("ns")
t = pb.tasks


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory):
    path = tmp_path_factory.mktemp("rootfs") / "r"
    image.unpack(path)
    return path


@pytest.fixture
def folder(tmp_path):
    # The state folder's path is part of the sockets' names, which are short.
    path = Path("/tmp") / f"bt-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    yield path
    for pid in shims_below(path):
        os.kill(pid, signal.SIGKILL)
    subprocess.run(["sh", "-c", f"for m in $(grep -o '{path}[^ ]*' /proc/mounts); do umount -l $m; done"])
    shutil.rmtree(path)


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request):
    """How to make the event loop: the daemon's own, and the standard library's."""
    if request.param == "asyncio":
        return asyncio.new_event_loop
    return pytest.importorskip("uvloop").new_event_loop


def run_on(loop, work):
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)


def shims_below(path):
    """Pids of shims whose daemon was the one at `path`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"shim" in line[0] and str(path).encode() in b" ".join(line):
                found.append(int(entry.name))
    return found


def dead(pid):
    """Whether the process has ended (who is left to reap it is not always us)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def spec_of(rootfs, *args):
    return specification(rootfs, list(args), f"/bt-{uuid.uuid4().hex[:8]}")


async def until(condition, what, seconds=10):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(what)


async def wait_stopped(daemon, name):
    async with asyncio.timeout(20):
        return await daemon.tasks.Wait(t.WaitRequest(container_id=name), CALL)


def test_a_task_lives_and_its_exit_code_comes_back(folder, rootfs, loop):
    out = folder / "out"
    out.touch()

    async def run():
        async with Daemon(folder) as daemon:
            daemon.record("c", spec_of(rootfs, "sh", "-c", "echo hello; exit 7"))
            created = await daemon.tasks.Create(t.CreateTaskRequest(container_id="c", stdout=f"file://{out}", stderr=f"file://{out}"), CALL)
            assert os.path.exists(f"/proc/{created.pid}")
            with pytest.raises(AlreadyExists):
                await daemon.tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
            started = await daemon.tasks.Start(t.StartRequest(container_id="c"), CALL)
            assert started.pid == created.pid
            exited = await wait_stopped(daemon, "c")
            state = await daemon.tasks.Get(t.GetRequest(container_id="c"), CALL)
            deleted = await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="c"), CALL)
            await until(lambda: not shims_below(folder), "the shim stays")
            with pytest.raises(NotFound):
                await daemon.tasks.Get(t.GetRequest(container_id="c"), CALL)
            await daemon.shims.close()
            return exited.exit_status, state.process.status, deleted.exit_status, daemon.topics()

    exited, status, deleted, topics = run_on(loop, run())
    assert (exited, status, deleted) == (7, pb.types.STOPPED, 7)
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert out.read_text() == "hello\n"
    assert [*(folder / "state/io.containerd.runtime.v2.task/ns").iterdir(),
            *(folder / "root/io.containerd.runtime.v2.task/ns").iterdir()] == []


def test_a_name_is_free_again_at_once(folder, rootfs, loop):
    async def run():
        async with Daemon(folder) as daemon:
            daemon.record("c", spec_of(rootfs, "true"))
            for _ in range(5):
                await daemon.tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
                await daemon.tasks.Start(t.StartRequest(container_id="c"), CALL)
                await wait_stopped(daemon, "c")
                await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="c"), CALL)

    run_on(loop, run())
    run_on(loop, until(lambda: not shims_below(folder), "shims stay"))


def test_methods_of_a_running_task(folder, rootfs, loop):
    async def run():
        async with Daemon(folder) as daemon:
            tasks = daemon.tasks
            daemon.record("c", spec_of(rootfs, "sleep", "1000"))
            await tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
            await tasks.Start(t.StartRequest(container_id="c"), CALL)
            await tasks.Pause(t.PauseTaskRequest(container_id="c"), CALL)
            listed = (await tasks.List(t.ListTasksRequest(), CALL)).tasks
            assert [(p.id, p.status) for p in listed] == [("c", pb.types.PAUSED)]
            await tasks.Resume(t.ResumeTaskRequest(container_id="c"), CALL)
            process = {"args": ["sh", "-c", "exit 3"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
            request = t.ExecProcessRequest(container_id="c", exec_id="e")
            request.spec.type_url, request.spec.value = PROCESS, json.dumps(process).encode()
            await tasks.Exec(request, CALL)
            await tasks.Start(t.StartRequest(container_id="c", exec_id="e"), CALL)
            waited = await tasks.Wait(t.WaitRequest(container_id="c", exec_id="e"), CALL)
            deleted = await tasks.DeleteProcess(t.DeleteProcessRequest(container_id="c", exec_id="e"), CALL)
            assert (waited.exit_status, deleted.exit_status, deleted.id) == (3, 3, "e")
            pids = (await tasks.ListPids(t.ListPidsRequest(container_id="c"), CALL)).processes
            assert len(pids) == 1
            metrics = (await tasks.Metrics(t.MetricsRequest(filters=["id==c"]), CALL)).metrics
            assert [(m.id, m.data.type_url) for m in metrics] == [("c", "io.containerd.cgroups.v1.Metrics")]
            assert not (await tasks.Metrics(t.MetricsRequest(filters=["id==other"]), CALL)).metrics
            with pytest.raises(InvalidArgument):
                await tasks.Exec(t.ExecProcessRequest(container_id="c"), CALL)
            with pytest.raises(NotFound):
                await tasks.Kill(t.KillRequest(container_id="c", exec_id="none", signal=9), CALL)
            await tasks.Kill(t.KillRequest(container_id="c", signal=9), CALL)
            assert (await wait_stopped(daemon, "c")).exit_status == 137
            await tasks.Delete(t.DeleteTaskRequest(container_id="c"), CALL)

    run_on(loop, run())


def test_an_exit_while_the_daemon_is_away_is_not_lost(folder, rootfs, loop):
    go = rootfs / "tmp" / f"go-{folder.name}"

    async def before():
        async with Daemon(folder) as daemon:
            for name in ("stays", "ends"):
                daemon.record(name, spec_of(rootfs, "sh", "-c", f"while [ ! -e /tmp/{go.name}-{name} ]; do sleep 0.05; done; exit 9"))
                await daemon.tasks.Create(t.CreateTaskRequest(container_id=name), CALL)
                await daemon.tasks.Start(t.StartRequest(container_id=name), CALL)
            return daemon.containers, (await daemon.tasks.Get(t.GetRequest(container_id="ends"), CALL)).process.pid

    async def after(containers):
        async with Daemon(folder, containers) as daemon:
            states = {p.id: p.status for p in (await daemon.tasks.List(t.ListTasksRequest(), CALL)).tasks}
            ended = await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="ends"), CALL)
            await daemon.tasks.Kill(t.KillRequest(container_id="stays", signal=9), CALL)
            stayed = await wait_stopped(daemon, "stays")
            await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="stays"), CALL)
            return states, ended.exit_status, stayed.exit_status

    containers, pid = run_on(loop, before())
    Path(f"{go}-ends").touch()
    run_on(loop, until(lambda: dead(pid), "it does not end"))
    states, ended, stayed = run_on(loop, after(containers))
    Path(f"{go}-ends").unlink()
    assert states == {"stays": pb.types.RUNNING, "ends": pb.types.STOPPED}
    assert (ended, stayed) == (9, 137)


def test_a_shim_that_is_killed_takes_its_container_with_it_and_the_exit_is_told(folder, rootfs, loop):
    async def run():
        async with Daemon(folder) as daemon:
            daemon.record("c", spec_of(rootfs, "sleep", "1000"))
            created = await daemon.tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
            await daemon.tasks.Start(t.StartRequest(container_id="c"), CALL)
            waiting = asyncio.ensure_future(wait_stopped(daemon, "c"))
            await asyncio.sleep(0.1)
            [shim] = shims_below(folder)
            os.kill(shim, signal.SIGKILL)
            exited = await waiting
            with pytest.raises(NotFound):
                await daemon.tasks.Get(t.GetRequest(container_id="c"), CALL)
            assert dead(created.pid)
            return exited.exit_status, daemon.topics()

    status, topics = run_on(loop, run())
    assert status == 137
    assert topics[-2:] == ["/tasks/exit", "/tasks/delete"]


def test_who_waits_is_let_go_when_the_daemon_leaves(folder, rootfs, loop):
    async def run():
        async with Daemon(folder) as daemon:
            daemon.record("c", spec_of(rootfs, "sleep", "1000"))
            await daemon.tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
            await daemon.tasks.Start(t.StartRequest(container_id="c"), CALL)
            waiting = asyncio.ensure_future(wait_stopped(daemon, "c"))
            await asyncio.sleep(0.05)
            daemon.shims.leave()
            with pytest.raises(Unavailable, match="stopping"):
                await waiting
            await daemon.tasks.Kill(t.KillRequest(container_id="c", signal=9), CALL)  # other calls still have their time
            async with asyncio.timeout(10):
                while (await daemon.tasks.Get(t.GetRequest(container_id="c"), CALL)).process.status != pb.types.STOPPED:
                    await asyncio.sleep(0.02)
            await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="c"), CALL)

    run_on(loop, run())


def test_a_shim_that_is_slow_keeps_its_container(folder, rootfs, loop, monkeypatch):
    monkeypatch.setattr(shims, "LOAD_TIMEOUT_S", 0.3)

    async def before():
        async with Daemon(folder) as daemon:
            daemon.record("c", spec_of(rootfs, "sleep", "1000"))
            await daemon.tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
            return daemon.containers

    async def after(containers, shim):
        async with Daemon(folder, containers) as daemon:
            os.kill(shim, signal.SIGCONT)
            state = await daemon.tasks.Get(t.GetRequest(container_id="c"), CALL)
            await daemon.tasks.Kill(t.KillRequest(container_id="c", signal=9), CALL)
            await wait_stopped(daemon, "c")
            await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="c"), CALL)
            return state.process.status

    containers = run_on(loop, before())
    [shim] = shims_below(folder)
    os.kill(shim, signal.SIGSTOP)
    assert run_on(loop, after(containers, shim)) == pb.types.CREATED


def test_what_an_earlier_daemon_left_half_done_is_cleaned(folder, rootfs, loop):
    async def before():
        async with Daemon(folder) as daemon:
            daemon.record("dead", spec_of(rootfs, "sleep", "1000"))
            created = await daemon.tasks.Create(t.CreateTaskRequest(container_id="dead"), CALL)
            await daemon.shims.start("ns", "untasked", json.dumps(spec_of(rootfs, "true")).encode(), "io.containerd.runc.v2", None)
            return daemon.containers, created.pid

    containers, pid = run_on(loop, before())
    bundles = folder / "state/io.containerd.runtime.v2.task/ns"
    address = json.loads((bundles / "dead/bootstrap.json").read_bytes())["address"]
    [shim] = [p for p in shims_below(folder) if b"-id\0dead" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(shim, signal.SIGKILL)
    (bundles / "never").mkdir()
    (bundles / ".gone.1.2").mkdir()
    work = folder / "root/io.containerd.runtime.v2.task/ns"
    (work / "forgotten").mkdir()

    async def after():
        async with Daemon(folder, containers):
            await until(lambda: not shims_below(folder), "shims stay")

    run_on(loop, after())
    assert dead(pid)
    assert list(bundles.iterdir()) == []
    assert list(work.iterdir()) == []
    assert address.startswith("unix://")


def test_a_shim_that_the_killed_daemon_had_not_heard_of_is_found(folder, rootfs, loop):
    async def before():
        async with Daemon(folder) as daemon:
            daemon.record("c", spec_of(rootfs, "sleep", "1000"))
            await daemon.tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
            return daemon.containers

    async def after(containers):
        async with Daemon(folder, containers) as daemon:
            state = await daemon.tasks.Get(t.GetRequest(container_id="c"), CALL)
            await daemon.tasks.Kill(t.KillRequest(container_id="c", signal=9), CALL)
            await wait_stopped(daemon, "c")
            await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="c"), CALL)
            return state.process.status

    containers = run_on(loop, before())
    for name in ("bootstrap.json", "address"):
        (folder / "state/io.containerd.runtime.v2.task/ns/c" / name).unlink(missing_ok=True)
    assert run_on(loop, after(containers)) == pb.types.CREATED
    run_on(loop, until(lambda: not shims_below(folder), "the shim stays"))


def test_what_cannot_be_created_leaves_nothing(folder, rootfs, loop):
    async def run():
        async with Daemon(folder) as daemon:
            create = daemon.tasks.Create
            with pytest.raises(NotFound):
                await create(t.CreateTaskRequest(container_id="none"), CALL)
            daemon.record("a", spec_of(rootfs, "no-such-program"))
            with pytest.raises(BoxshipError, match="no-such-program"):
                await create(t.CreateTaskRequest(container_id="a"), CALL)
            daemon.record("b", spec_of(rootfs, "true"), runtime="io.containerd.nothing.v9")
            with pytest.raises(NotFound, match=r"containerd-shim-nothing-v9"):
                await create(t.CreateTaskRequest(container_id="b"), CALL)
            daemon.record("c", spec_of(rootfs, "true"), runtime="nothing")
            with pytest.raises(InvalidArgument, match="invalid runtime name"):
                await create(t.CreateTaskRequest(container_id="c"), CALL)
            await until(lambda: not shims_below(folder), "shims stay")

    run_on(loop, run())
    assert list((folder / "state/io.containerd.runtime.v2.task/ns").iterdir()) == []


def test_other_runtimes_by_the_options(folder, rootfs, loop):
    other = folder / "other-runtime"
    other.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\nexec runc "$@"\n')
    other.chmod(0o755)

    async def run():
        async with Daemon(folder) as daemon:
            daemon.record("c", spec_of(rootfs, "sh", "-c", "exit 5"), binary_name=str(other))
            await daemon.tasks.Create(t.CreateTaskRequest(container_id="c"), CALL)
            await daemon.tasks.Start(t.StartRequest(container_id="c"), CALL)
            await wait_stopped(daemon, "c")
            return (await daemon.tasks.Delete(t.DeleteTaskRequest(container_id="c"), CALL)).exit_status

    assert run_on(loop, run()) == 5
    assert " create --bundle " in (folder / "calls").read_text()
