"""checkpoint and restore, with a CRIU that runs on this kernel: $CRIU, or the first in PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.handover import Receiver, read_until
from support.machine import Bundle, Machine

Ask = Callable[[Callable[[], object]], object]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture(scope="module")
def environ(machine: Machine) -> dict[str, str]:
    """Where CRIU is. Its cache in /run is there from now on."""
    path = os.environ.get("CRIU") or shutil.which("criu", path=PATH)
    if not path:
        pytest.skip("criu is not installed")
    check = machine.start([path, "check"]).wait()
    if check.code:
        lines = (check.out + check.err).strip().splitlines() or ["criu check failed"]
        pytest.skip(f"{path} does not run on this kernel: {lines[-1]}")
    return {"PATH": f"{os.path.dirname(path)}:{PATH}"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def counting(bundle: Bundle) -> Bundle:
    """Its program counts in memory and writes each number down: it is seen whether it goes on or begins anew."""
    bundle.writable()
    bundle.shell("n=0; while :; do n=$((n + 1)); echo $n >> /numbers; sleep 0.02; done")
    return bundle


def numbers(bundle: Bundle) -> list[int]:
    file = bundle.rootfs / "numbers"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def v2_options(machine: Machine) -> list[str]:
    with open(f"/proc/{machine.holder.pid}/mountinfo") as file:
        return sorted({line.split()[-1] for line in file if " - cgroup2 " in line})


def outside(bundle: Bundle, machine: Machine, box: str, *flags: str) -> None:
    """Run it with standard streams that CRIU does not have to care for."""
    machine.ok("run", "--detach", *flags, "--bundle", bundle.write(), box, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_it_goes_on_where_it_stood(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask, tmp_path: Path
) -> None:
    outside(counting, machine, box)
    eventually(lambda: len(numbers(counting)) > 5)
    before = v2_options(machine)
    for turn in range(2):
        path = images / str(turn)
        machine.ok("checkpoint", "--image-path", str(path), "--work-path", str(tmp_path / "work"), box, env=environ)
        gone = machine("state", box)
        assert gone.code == 1 and "container does not exist" in gone.err
        assert json.loads((path / "descriptors.json").read_text())[0] == "/dev/null"
        assert (path / "inventory.img").exists() and (tmp_path / "work/dump.log").exists()
        count = len(numbers(counting))
        machine.ok(
            "restore", "--detach", "--pid-file", str(tmp_path / "pid"), "--image-path", str(path), "--work-path", str(tmp_path / "work"),
            "--bundle", str(counting.path), box, env=environ,
        )
        assert (tmp_path / "pid").read_text() == str(machine.state(box)["pid"])
        assert machine.state(box)["status"] == "running"
        eventually(lambda count=count: len(numbers(counting)) > count + 5)  # type: ignore[misc]
        seen = numbers(counting)  # once: it goes on counting
        assert seen == list(range(1, len(seen) + 1))
        assert machine.ok("exec", box, "cat", "/proc/1/comm") == "sh\n"
        assert not os.path.exists(f"{machine.root}/run/boxship/boxrun/{box}/criu-root")
        assert v2_options(machine) == before, "CRIU mounts the hierarchy without, and that is everybody's"
    machine.ok("pause", box)
    machine.ok("resume", box)
    machine.ok("kill", box, "KILL")


def test_restored_in_the_foreground_its_end_is_the_commands(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask
) -> None:
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    count = len(numbers(counting))
    command = machine.begin("restore", "--image-path", str(images), "--bundle", str(counting.path), box, env=environ)
    eventually(lambda: len(numbers(counting)) > count)
    pid = machine.state(box)["pid"]
    assert int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) == command.pid
    machine.ok("kill", box, "KILL")
    assert command.wait().code == 137
    assert machine("state", box).code == 1


def test_left_running_it_stays(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask
) -> None:
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    pid = machine.state(box)["pid"]
    machine.ok("checkpoint", "--leave-running", "--image-path", str(images), box, env=environ)
    count = len(numbers(counting))
    eventually(lambda: len(numbers(counting)) > count)
    assert machine.state(box)["pid"] == pid


def test_a_paused_container_can_be_saved(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask
) -> None:
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    machine.ok("pause", box)
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    assert machine("state", box).code == 1


def test_pipes_become_the_restoring_callers(
    machine: Machine, bundle: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask
) -> None:
    bundle.shell("while read word; do echo got $word; echo oops $word >&2; done")
    pipes = [os.pipe() for _ in range(3)]
    (stdin, given), (heard, stdout), (complaints, stderr) = pipes
    machine.ok("run", "--detach", "--bundle", bundle.write(), box, stdin=stdin, stdout=stdout, stderr=stderr)
    os.write(given, b"one\n")
    assert os.read(heard, 100) == b"got one\n" and os.read(complaints, 100) == b"oops one\n"
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    links = json.loads((images / "descriptors.json").read_text())
    assert len(links) == 3 and all(link.startswith("pipe:[") for link in links)
    for pair in pipes:
        for fd in pair:
            os.close(fd)
    pipes = [os.pipe() for _ in range(3)]
    (stdin, given), (heard, stdout), (complaints, stderr) = pipes
    try:
        machine.ok(
            "restore", "--detach", "--image-path", str(images), "--bundle", str(bundle.path), box, env=environ, stdin=stdin, stdout=stdout,
            stderr=stderr,
        )
        os.write(given, b"two\n")
        assert os.read(heard, 100) == b"got two\n" and os.read(complaints, 100) == b"oops two\n"
        machine.ok("kill", box, "KILL")
    finally:
        for pair in pipes:
            for fd in pair:
                os.close(fd)


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(tmp_path / "console")
    yield made
    made.close()


def test_a_terminal_is_handed_out_again(
    machine: Machine, bundle: Bundle, box: str, images: Path, environ: dict[str, str], console: Receiver
) -> None:
    bundle.process["terminal"] = True
    bundle.shell("while read word; do echo got $word; done")
    machine.ok("run", "--detach", "--console-socket", console.path, "--bundle", bundle.write(), box)
    _, terminal = console.take()
    os.write(terminal, b"one\n")
    read_until(terminal, b"got one")
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    machine.ok(
        "restore", "--detach", "--console-socket", console.path, "--image-path", str(images), "--bundle", str(bundle.path), box, env=environ
    )
    _, terminal = console.take()
    assert os.isatty(terminal)
    os.write(terminal, b"two\n")
    read_until(terminal, b"got two")


def test_bind_mounts_are_made_again_from_the_configuration(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask, tmp_path: Path
) -> None:
    for name in ("one", "inner", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    (counting.rootfs / "real").mkdir()
    (counting.rootfs / "link").symlink_to("real")
    counting.bind(tmp_path / "one", "/link")
    counting.bind(tmp_path / "inner", "/link/deep/inner")
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    # What create made: restore makes it anew.
    shutil.rmtree(tmp_path / "one/deep")
    counting.mounts[-2]["source"] = str(tmp_path / "one")
    counting.mounts[-1]["source"] = str(tmp_path / "other")
    machine.ok("restore", "--detach", "--image-path", str(images), "--bundle", counting.write(), box, env=environ)
    assert machine.ok("exec", box, "cat", "/real/name", "/real/deep/inner/name") == "oneother"


def test_a_network_namespace_that_was_joined_is_joined_again(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask
) -> None:
    holder = machine.start(["unshare", "-n", "sleep", "1000"])
    own = os.readlink(f"/proc/{machine.holder.pid}/ns/net")
    eventually(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own)
    wanted = os.readlink(f"/proc/{holder.pid}/ns/net")
    try:
        for ns in counting.linux["namespaces"]:  # type: ignore[attr-defined]
            if ns["type"] == "network":
                ns["path"] = f"/proc/{holder.pid}/ns/net"
        outside(counting, machine, box)
        eventually(lambda: numbers(counting))
        machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
        machine.ok("restore", "--detach", "--image-path", str(images), "--bundle", str(counting.path), box, env=environ)
        assert os.readlink(f"/proc/{machine.state(box)['pid']}/ns/net") == wanted
    finally:
        os.kill(holder.pid, 9)
        holder.wait()


def test_limits_and_hooks_are_the_configurations(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    note.write_text(f"#!/bin/sh\necho $1 $(cat) >> {tmp_path}/notes\n")
    note.chmod(0o755)
    counting.spec["hooks"] = {kind: [{"path": str(note), "args": ["note", kind]}] for kind in ("createRuntime", "poststart", "poststop")}
    counting.linux.setdefault("resources", {})["pids"] = {"limit": 99}  # type: ignore[attr-defined]
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    kinds = [line.split()[0] for line in (tmp_path / "notes").read_text().splitlines()]
    assert kinds == ["createRuntime", "poststart", "poststop"]
    counting.linux["resources"]["pids"] = {"limit": 77}  # type: ignore[index]
    machine.ok(
        "restore", "--detach", "--manage-cgroups-mode", "ignore", "--image-path", str(images), "--bundle", counting.write(), box, env=environ
    )
    last = (tmp_path / "notes").read_text().splitlines()[-1]
    assert last.split()[0] == "createRuntime"
    told = json.loads(last.split(None, 1)[1])
    assert told["id"] == box and told["pid"] == machine.state(box)["pid"] and told["status"] == "creating"
    event = json.loads(machine.ok("events", "--stats", box))
    assert event["data"]["pids"]["limit"] == 77


def needs(machine: Machine, environ: dict[str, str], feature: str) -> None:
    """Skip where the kernel lacks what CRIU needs for this."""
    check = machine.start(["criu", "check", "--feature", feature], env=environ).wait()
    if check.code:
        pytest.skip(f"criu check --feature {feature}: {(check.out + check.err).strip()[-200:]}")


def test_memory_that_was_saved_before_is_not_saved_again(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask
) -> None:
    needs(machine, environ, "mem_dirty_track")
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    images.mkdir()
    for name, parent in (("first", []), ("second", ["--parent-path", "../first"])):
        machine.ok("checkpoint", "--pre-dump", *parent, "--image-path", str(images / name), box, env=environ)
        assert machine.state(box)["status"] == "running"
    machine.ok("checkpoint", "--parent-path", "../second", "--image-path", str(images / "last"), box, env=environ)
    assert machine("state", box).code == 1
    sizes = {name: sum(file.stat().st_size for file in (images / name).glob("pages-*.img")) for name in ("first", "second", "last")}
    # Of the second nothing is asked: on a slow machine the little that this program has was all touched again meanwhile.
    assert 0 < sizes["last"] < sizes["first"], sizes
    count = len(numbers(counting))
    machine.ok("restore", "--detach", "--image-path", str(images / "last"), "--bundle", str(counting.path), box, env=environ)
    eventually(lambda: len(numbers(counting)) > count + 5)
    seen = numbers(counting)  # once: it goes on counting
    assert seen == list(range(1, len(seen) + 1))


def test_memory_is_fetched_when_it_is_needed(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask, tmp_path: Path
) -> None:
    """Lazy pages: the saved container stays to serve its memory, and the restored one asks for it."""
    needs(machine, environ, "uffd-noncoop")
    if os.uname().release >= "6.13":
        pytest.skip("criu 4.2.1 cannot send pages on this kernel (page-pipe: splice: bad file descriptor), with runc neither")
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    ready, tell = os.pipe()
    saving = machine.begin(
        "checkpoint", "--lazy-pages", "--page-server", "127.0.0.1:27277", "--status-fd", str(tell), "--image-path", str(images),
        "--work-path", str(tmp_path / "saving"), box, env=environ, pass_fds=[tell],
    )
    os.close(tell)
    assert os.read(ready, 1) == b"\0", saving.wait()
    os.close(ready)
    words = ["criu", "lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", "27277", "-vv", "-D", str(images)]
    serving = machine.start([*words, "-W", str(tmp_path)], env=environ)
    eventually((tmp_path / "lazy-pages.socket").exists)
    other = machine.name()
    machine.ok(
        "restore", "--lazy-pages", "--detach", "--image-path", str(images), "--work-path", str(tmp_path), "--bundle", str(counting.path), other,
        env=environ,
    )
    try:
        assert serving.wait().code == 0 and saving.wait().code == 0
        count = len(numbers(counting))
        eventually(lambda: len(numbers(counting)) > count + 5)
        seen = numbers(counting)  # once: it goes on counting
        assert seen == list(range(1, len(seen) + 1))
    finally:
        machine.ok("delete", "--force", other)


def test_a_container_in_a_user_namespace_goes_on_with_its_ids(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask
) -> None:
    counting.linux["namespaces"].append({"type": "user"})  # type: ignore[attr-defined]
    for kind in ("uidMappings", "gidMappings"):
        counting.linux[kind] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    subprocess.run(["chown", "-R", "100000:100000", str(counting.rootfs)], check=True)
    for path in [counting.path, *counting.path.parents]:
        if path not in (Path("/"), Path("/tmp")):
            path.chmod(0o755)
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    count = len(numbers(counting))
    machine.ok("restore", "--detach", "--image-path", str(images), "--bundle", str(counting.path), box, env=environ)
    eventually(lambda: len(numbers(counting)) > count + 5)
    seen = numbers(counting)  # once: it goes on counting
    assert seen == list(range(1, len(seen) + 1))
    assert Path(f"/proc/{machine.state(box)['pid']}/uid_map").read_text().split() == ["0", "100000", "65536"]
    assert os.stat(f"/proc/{machine.state(box)['pid']}").st_uid == 100000
    assert machine.ok("exec", box, "id", "-u") == "0\n"
    assert not (images / "core-1.img").stat().st_mode & 0o007
    reading = {"user": 100001, "group": 100001, "extra_groups": []}
    assert subprocess.run(["cat", str(images / "core-1.img")], capture_output=True, **reading).returncode, "others may not read it"  # type: ignore[call-overload]


def test_a_container_that_does_not_run_cannot_be_saved(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str]
) -> None:
    machine.ok("create", "--bundle", counting.write(), box)
    refused = machine("checkpoint", "--image-path", str(images), box, env=environ)
    assert refused.code == 1 and "Container cannot be checkpointed in created state" in refused.err
    assert machine.state(box)["status"] == "created"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--parent-path", "/absolute"], "--parent-path must be relative"),
        (["--parent-path", "../nothing"], "invalid --parent-path: stat"),
        (["--page-server", "host"], "Use --page-server ADDRESS:PORT to specify page server"),
        (["--page-server", "host:x"], "Invalid port number"),
        (["--empty-ns", "pid"], 'namespace \\"pid\\" is not supported'),
        (["--manage-cgroups-mode", "some"], "invalid manage-cgroups-mode value"),
        (["--lazy-pages", "--status-fd", "77"], "invalid --status-fd argument 77: bad file descriptor"),
    ],
)
def test_flags_are_checked_and_nothing_happens_to_the_container(
    machine: Machine, running: str, images: Path, environ: dict[str, str], flags: list[str], complaint: str
) -> None:
    refused = machine("checkpoint", "--image-path", str(images), *flags, running, env=environ)
    assert refused.code == 1 and complaint in refused.err, refused
    assert machine.state(running)["status"] == "running"


def test_a_failing_dump_leaves_the_container_alone_and_quotes_the_log(
    machine: Machine, bundle: Bundle, box: str, images: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    # A file of the host that is open in the container, which cannot be named from inside.
    bundle.process["args"] = ["sleep", "1000"]
    with open(tmp_path / "outside", "w") as file:
        machine.ok("run", "--detach", "--bundle", bundle.write(), box, stdout=file)
        refused = machine("checkpoint", "--image-path", str(images), box, env=environ)
    assert refused.code == 1 and "criu failed: type DUMP errno 0" in refused.err
    assert f"log file: {images}/dump.log" in refused.err and "--- Quoting" in refused.err
    assert machine.state(box)["status"] == "running"


def test_a_failing_restore_leaves_nothing(machine: Machine, counting: Bundle, images: Path, environ: dict[str, str], tmp_path: Path) -> None:
    box = machine.name()
    refused = machine("restore", "--detach", "--image-path", str(images), "--bundle", counting.write(), box, env=environ)
    assert refused.code == 1 and f"restore failed: open {images}/descriptors.json: no such file or directory" in refused.err
    (images / "descriptors.json").write_text('["", "", ""]')
    refused = machine("restore", "--detach", "--image-path", str(images), "--bundle", str(counting.path), box, env=environ)
    assert refused.code == 1 and "restore failed: criu failed: type RESTORE errno" in refused.err
    assert machine("state", box).code == 1


def test_without_criu_it_says_what_is_missing(machine: Machine, running: str, images: Path) -> None:
    refused = machine("checkpoint", "--image-path", str(images), running, env={"PATH": "/nonexistent"})
    assert refused.code == 1 and 'exec: \\"criu\\": executable file not found in $PATH' in refused.err
    assert machine.state(running)["status"] == "running"


@pytest.mark.parametrize("point", ["points", "born", "started", "setup-namespaces", "post-restore", "pre-resume", "post-resume"])
def test_a_restore_that_is_killed_leaves_what_delete_finds(
    machine: Machine, counting: Bundle, box: str, images: Path, environ: dict[str, str], eventually: Ask, point: str
) -> None:
    outside(counting, machine, box)
    eventually(lambda: numbers(counting))
    machine.ok("checkpoint", "--image-path", str(images), box, env=environ)
    killed = machine(
        "restore", "--detach", "--image-path", str(images), "--bundle", str(counting.path), box,
        env=environ | {"BOXSHIP_FAILPOINT": f"restore.{point}=kill"},
    )
    assert killed.code == -9, killed
    state = machine("state", box)
    assert state.code == 0, state
    machine.ok("delete", "--force", box)
