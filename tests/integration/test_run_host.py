"""`boxship run host`, on the real kernel: what a container sees, what it cannot, and that nothing of it stays.

Each promise holds by the daemon, which is how root runs it, and without one, which is how users do, and root with --no-daemon.
"""

from __future__ import annotations

import json
import os
import pty
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.command import Command, public_copy, public_interpreter
from support.daemon import clear

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

Finish = Callable[[], None]


@pytest.fixture(scope="module")
def package() -> Iterator[str]:
    with public_copy() as folder:
        yield folder


@pytest.fixture(scope="module")
def interpreter() -> str:
    found = public_interpreter()
    assert found, "no Python that ordinary users can run"
    return found


@pytest.fixture(scope="module")
def subordinate() -> Iterator[tuple[int, int]]:
    """A user made for these tests, with a range of subordinate ids."""
    if not shutil.which("newuidmap"):
        pytest.skip("newuidmap is not installed")
    name = f"boxship-{secrets.token_hex(3)}"
    subprocess.run(["useradd", "--no-create-home", "--shell", "/bin/sh", name], check=True)
    try:
        uid, gid = (int(subprocess.run(["id", flag, name], check=True, capture_output=True, text=True).stdout) for flag in ("-u", "-g"))
        for file in ("/etc/subuid", "/etc/subgid"):
            assert any(line.startswith(f"{name}:") for line in Path(file).read_text().splitlines()), f"useradd gave no range in {file}"
        yield uid, gid
    finally:
        subprocess.run(["userdel", name], check=True)


@pytest.fixture(scope="module")
def daemons() -> Iterator[Path]:
    """The folder of a daemon that the first command starts."""
    folder = Path("/tmp", f"bd-{secrets.token_hex(4)}")
    folder.mkdir(mode=0o755)
    yield folder
    assert (folder / "state/docker.sock").is_socket(), "no daemon was started: the tests have shown the other way twice"
    clear(folder)
    for group in (Path("/sys/fs/cgroup", folder.name), *Path("/sys/fs/cgroup").glob(f"*/{folder.name}")):
        if group.is_dir():  # hierarchies have several names
            group.rmdir()


@pytest.fixture(params=["daemon", "root", "single", "subordinate"])
def boxship(request: pytest.FixtureRequest, package: str, interpreter: str) -> Iterator[Command]:
    """The command as root by the daemon, as root without, as a user with one id, and as a user with many."""
    if request.param == "daemon":
        folder = request.getfixturevalue("daemons")
        # The daemon is started by the interpreter that has what it needs.
        flags = ("--rm", "--cgroup-parent", f"/{folder.name}")
        yield from _command(package, sys.executable, 0, 0, *flags, BOXSHIP_ROOT=f"{folder}/root", BOXSHIP_STATE=f"{folder}/state")
        return
    uid, gid = {"root": (0, 0), "single": (64999, 64999)}.get(request.param) or request.getfixturevalue("subordinate")
    yield from _command(package, interpreter, uid, gid, *([] if uid else ["--no-daemon"]))


@pytest.fixture
def as_root(package: str, interpreter: str) -> Iterator[Command]:
    """As root, without the daemon."""
    yield from _command(package, interpreter, 0, 0, "--no-daemon")


@pytest.fixture
def as_user(package: str, interpreter: str) -> Iterator[Command]:
    yield from _command(package, interpreter, 64999, 64999)


def _places(command: Command) -> list[Path]:
    if root := command.environ.get("BOXSHIP_ROOT"):
        return [Path(root, "engine/containers")]
    if command.uid == 0:
        return [Path("/var/lib/boxship/scratch"), Path("/run/boxship/boxrun")]
    return [Path(command.home, ".local/share/boxship/scratch"), Path(f"/tmp/boxship-{command.uid}/boxrun")]


def _traces(command: Command) -> set[str]:
    """What a container could leave: mounts, cgroups, scratch folders, records."""
    found = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    root = command.environ.get("BOXSHIP_ROOT")
    if root:  # what a daemon keeps mounted of an image's layers is no container's
        found = {point for point in found if point.startswith(os.path.dirname(root)) and "/io.containerd.snapshotter." not in point}
    # Other daemons of this machine have /boxship/ID.
    mark = f"/{Path(root).parent.name}/" if root else "/boxship-"
    for hierarchy, _, _ in os.walk("/sys/fs/cgroup"):
        if mark in hierarchy:
            found.add(hierarchy)
    for place in _places(command):
        if place.is_dir():
            # What begins with "@" is kept from run to run.
            found |= {str(child) for child in place.iterdir() if not child.name.startswith("@")}
    return found


def _command(package: str, interpreter: str, uid: int, gid: int, *run_flags: str, **environ: str) -> Iterator[Command]:
    home = f"/tmp/boxship-home-{secrets.token_hex(4)}"
    os.mkdir(home, 0o700)
    os.chown(home, uid, gid)
    command = Command(interpreter, package, uid, gid, home, *run_flags, **environ)
    before = _traces(command)
    try:
        yield command
        if "BOXSHIP_ROOT" in environ:
            # By then the container has been forgotten; the daemon takes down what it had when who waits has the answer.
            wait_for(lambda: not _traces(command) - before)
        assert _traces(command) - before == set()
    finally:
        shutil.rmtree(home)
        if uid:
            shutil.rmtree(f"/tmp/boxship-{uid}", ignore_errors=True)


def wait_for(condition: Callable[[], bool]) -> None:
    """Look again and again until it is so; fails after ten seconds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "did not come about in ten seconds"
        time.sleep(0.02)


# --- what it is ------------------------------------------------------------------------------------------------------


def test_the_process_is_the_first_of_its_own_world(boxship: Command) -> None:
    out = boxship.shell("echo $$; uname -n; ls /proc | grep -c '^[0-9]'; id -u; cat /etc/hostname", "--name", "t-first", "-h", "t-first")
    pid, host, processes, uid, hostname = out.split()
    assert (pid, host, uid, hostname) == ("1", "t-first", "0", "t-first")
    assert int(processes) <= 3  # the shell, ls and grep


def test_every_namespace_is_its_own(boxship: Command) -> None:
    kinds = ("mnt", "pid", "ipc", "uts", "net", "cgroup", "user")
    inside = dict(zip(kinds, boxship.shell(f"for n in {' '.join(kinds)}; do readlink /proc/self/ns/$n; done").split(), strict=True))
    assert not set(inside.values()) & {os.readlink(f"/proc/self/ns/{kind}") for kind in kinds}


def test_the_machines_programs_are_there(boxship: Command) -> None:
    assert set(boxship.shell("ls /usr/bin").split()) == set(os.listdir("/usr/bin"))


def test_without_a_network_there_is_loopback_alone_and_it_works(boxship: Command) -> None:
    out = boxship.shell("sed 1,2d /proc/net/dev; cat /etc/resolv.conf; python3 -c 'import socket as s; a = s.create_server((\"127.0.0.1\", 0)); "
                        "s.create_connection(a.getsockname()); print(\"connected\")'")
    assert [line.split(":")[0].strip() for line in out.splitlines() if ":" in line] == ["lo"]
    assert "connected" in out
    if "BOXSHIP_ROOT" not in boxship.environ:  # the engine shows the machine's, as dockerd does
        assert "nameserver" not in out


def test_the_callers_network_is_shared_when_asked_for(boxship: Command) -> None:
    assert boxship.shell("readlink /proc/self/ns/net", "--network", "host").strip() == os.readlink("/proc/self/ns/net")
    # The host's cgroups come along with its /sys, unless something is done about it.
    assert boxship.shell("test -w /sys/kernel && echo writable; grep -c ' /sys/fs/cgroup' /proc/self/mountinfo || true", "--network", "host")


# --- what it cannot see ----------------------------------------------------------------------------------------------


@pytest.fixture
def canary() -> Iterator[str]:
    """A secret planted where programs keep secrets; fails when a place is not there to be planted in."""
    secret = f"canary-{secrets.token_hex(16)}"
    name = f".boxship-canary-{secrets.token_hex(4)}"
    planted = []
    for folder in ("/root", "/home", "/var/lib", "/var/tmp", "/tmp", "/etc", "/opt", "/srv", "/run", "/mnt", "/usr/local/etc", "/"):
        path = Path(folder, name)
        path.write_text(secret)
        path.chmod(0o644)
        planted.append(path)
    os.makedirs(f"/root/{name}.ssh")
    Path(f"/root/{name}.ssh/id_ed25519").write_text(secret)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/run/{name}.sock")
    listener.listen()
    holder = subprocess.Popen(["sleep", "600"], env={"SECRET": secret})
    try:
        yield secret
    finally:
        holder.kill()
        holder.wait()
        listener.close()
        os.unlink(f"/run/{name}.sock")
        shutil.rmtree(f"/root/{name}.ssh")
        for path in planted:
            path.unlink()


# /usr is the machine's and large; what is listed of it is where secrets could be. In /dev, find takes the placeholders below
# bound devices for files, and grep reads the devices to no end.
SEARCH = r"""
secret=$(cat)
test -n "$secret" || exit 9
elsewhere="-path /usr -prune -o -path /proc -prune -o -path /sys -prune -o -path /dev -prune -o"
find / /usr/local/etc $elsewhere -name '*boxship-canary*' -print 2>/dev/null
find / $elsewhere -type s -print 2>/dev/null
find / /usr/local/etc $elsewhere -type f -exec grep -l -e "$secret" {} + 2>/dev/null
cat /proc/[0-9]*/environ | tr '\0' '\n' | grep -e "$secret"
ls /etc/shadow /etc/shadow- /etc/gshadow /etc/ssh /etc/ssl/private /etc/sudoers /root/.ssh /var/run/docker.sock 2>/dev/null
ls -A /root /home
true
"""


def test_no_planted_secret_is_visible(boxship: Command, canary: str) -> None:
    done = boxship("run", "-i", "host", "--", "sh", "-c", SEARCH, text=canary)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["/root:", "/home:"] or set(done.stdout.split()) == {"/home:", "/root:"}


def test_the_search_would_find_what_is_shown_on_purpose(as_root: Command, canary: str) -> None:
    """The test before this one can fail."""
    shown = [word for path in ("/srv", "/run", "/etc/shadow") for word in ("-v", f"{path}:{path}:ro")]
    done = as_root("run", "-i", *shown, "host", "--", "sh", "-c", SEARCH, text=canary)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert "/etc/shadow" in found
    assert [path for path in found if path.startswith("/run/.boxship-canary") and path.endswith(".sock")]
    assert len([path for path in found if path.startswith("/srv/.boxship-canary")]) == 2  # its name, and what it says


def test_names_of_users_come_without_hashes(as_root: Command) -> None:
    lines = as_root.shell("cat /etc/passwd").splitlines()
    assert lines
    assert {line.split(":")[1] for line in lines} == {"x"}


# --- what it can do --------------------------------------------------------------------------------------------------


def test_writing_works_anywhere_and_nothing_stays(boxship: Command) -> None:
    mark = f"boxship-{secrets.token_hex(4)}"
    files = [f"{folder}/{mark}" for folder in ("", "/usr", "/usr/bin", "/usr/local/bin", "/etc", "/root", "/home", "/var/lib", "/tmp", "/opt")]
    boxship.shell(f"for f in {' '.join(files)}; do echo x > $f && test -s $f || exit 1; done; rm /usr/bin/env && ! test -e /usr/bin/env")
    assert not [path for path in files if os.path.exists(path)]
    assert os.path.exists("/usr/bin/env")


def test_a_machines_program_can_be_replaced(as_root: Command) -> None:
    before = Path("/usr/bin/env").read_bytes()
    assert as_root.shell("printf '#!/bin/sh\\necho replaced\\n' > /usr/bin/env; env").strip() == "replaced"
    assert Path("/usr/bin/env").read_bytes() == before


def test_read_only_means_all_of_it(boxship: Command) -> None:
    out = boxship.shell("for d in / /usr /usr/bin /etc /root /tmp; do touch $d/x 2>/dev/null && echo $d; done; touch /dev/shm/x", "--read-only")
    assert out == ""


def test_set_user_id_programs_give_nothing(as_root: Command) -> None:
    status = as_root.shell("grep NoNewPrivs /proc/self/status; grep ' /usr ' /proc/self/mountinfo")
    assert "NoNewPrivs:\t1" in status
    assert "nosuid" in status


def test_system_calls_are_filtered_unless_asked_otherwise(boxship: Command) -> None:
    script = "grep Seccomp: /proc/self/status; unshare -U true 2>/dev/null && echo made a namespace"
    assert boxship("run", "host", "--", "sh", "-c", script).stdout == "Seccomp:\t2\n"
    done = boxship("run", "--security-opt", "seccomp=unconfined", "host", "--", "sh", "-c", script)
    assert done.stdout == "Seccomp:\t0\nmade a namespace\n"


def test_a_volume_is_shared_both_ways(boxship: Command) -> None:
    folder = Path(boxship.home, "data")
    folder.mkdir()
    os.chown(folder, boxship.uid, boxship.gid)
    (folder / "in").write_text("from outside\n")
    assert boxship.shell("cat /data/in; echo from inside > /data/out", "-v", f"{folder}:/data") == "from outside\n"
    assert (folder / "out").read_text() == "from inside\n"
    assert (folder / "out").stat().st_uid == boxship.uid


def test_a_read_only_volume_cannot_be_written_to(boxship: Command) -> None:
    folder = Path(boxship.home, "data")
    folder.mkdir()
    os.chown(folder, boxship.uid, boxship.gid)
    assert boxship.shell("touch /data/x 2>/dev/null || echo refused", "-v", f"{folder}:/data:ro") == "refused\n"


def test_a_file_can_be_shown_over_one_that_is_there(boxship: Command) -> None:
    file = Path(boxship.home, "issue")
    file.write_text("mine\n")
    file.chmod(0o644)
    assert boxship.shell("cat /etc/issue", "-v", "./issue:/etc/issue:ro") == "mine\n"


def test_environment_directory_and_user(as_root: Command) -> None:
    out = as_root.shell("echo $A $HOME; pwd; id -u; id -g; grep CapEff /proc/self/status", "-e", "A=b c", "-w", "/new/folder", "-u", "nobody")
    assert out.splitlines()[:2] == ["b c /nonexistent", "/new/folder"]
    assert out.splitlines()[2] == "65534"
    assert out.splitlines()[-1].endswith("0000000000000000")


def test_another_user_where_ids_are_mapped(boxship: Command) -> None:
    done = boxship("run", "-u", "1000:1000", "host", "id", "-u")
    if boxship.uid == 64999:
        assert done.returncode == 125
        assert "user 1000:1000 is not mapped" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "1000\n")


def test_files_of_a_containers_other_ids_are_removed_too(boxship: Command) -> None:
    if boxship.uid == 64999:
        pytest.skip("has no other ids")
    boxship.shell("mkdir -p /a/b && touch /a/b/c && chown -R 1234:1234 /a && chmod 700 /a /a/b; chown 77 /usr/local/bin")


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$; sleep 1"], 0), (["no-such-program"], 127),
        (["/no/such/program"], 127), (["/etc/passwd"], 126), (["/etc"], 126),
    ],
)
def test_exit_codes_are_dockers(as_root: Command, command: list[str], code: int) -> None:
    # The first process of a pid namespace is not killed by its own signals: the third ends by itself.
    assert as_root("run", "host", "--", *command).returncode == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frob", "host"], "unknown flag: --frob"),
        ([], "requires at least 1 argument"),
        (["./nothing"], "unable to find image './nothing'"),
        (["--memory", "lots", "host"], "invalid size: 'lots'"),
        (["-v", "name:/data", "host"], "named volumes are not supported"),
        (["-u", "nosuchuser", "host"], "unable to find user nosuchuser: no matching entries in passwd file"),
        (["--name", "a/b", "host"], "invalid container ID format"),
        (["--network", "bridge", "host"], "network bridge not found"),
        (["-w", "relative", "host"], "it needs to be an absolute path"),
    ],
)
def test_mistakes_end_with_125_and_are_named(as_root: Command, arguments: list[str], message: str) -> None:
    done = as_root("run", *arguments)
    # A line without an image is no run at all: docker ends it with 1.
    assert done.returncode == (125 if arguments else 1)
    assert message in done.stderr


def test_a_signal_to_boxship_is_the_containers(boxship: Command) -> None:
    process = boxship.start("run", "host", "--", "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 9
    process.communicate()


def test_standard_input_is_connected_only_when_asked_for(boxship: Command) -> None:
    assert boxship("run", "-i", "host", "cat", text="hello").stdout == "hello"
    assert boxship("run", "host", "cat", text="hello").stdout == ""


def test_a_terminal_is_a_terminal(boxship: Command) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        boxship.line("run", "-it", "host", "--", "sh", "-c", "test -t 0 && test -t 1 && tty; read line; echo got $line; exit 3"),
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, **boxship.settings,  # type: ignore[call-overload]
    )
    os.close(slave)
    output = b""
    sent = False
    while True:
        ready, _, _ = select.select([master], [], [], 20)
        assert ready, output
        try:
            part = os.read(master, 4096)
        except OSError:
            break  # the other side is closed
        output += part
        if b"/dev/" in output and not sent:
            os.write(master, b"words\n")
            sent = True
        if not part:
            break
    os.close(master)
    assert process.wait(20) == 3, output
    assert b"got words" in output


def test_a_terminal_needs_one_to_connect(as_root: Command) -> None:
    done = as_root("run", "-it", "host", "true")
    assert (done.returncode, done.stderr) == (1, "boxship: the input device is not a TTY\n")


def test_a_name_is_taken_once(as_root: Command) -> None:
    process = as_root.start("run", "--name", "t-taken", "host", "--", "sh", "-c", "echo up; exec sleep 60")
    assert process.stdout is not None
    process.stdout.readline()
    done = as_root("run", "--name", "t-taken", "host", "true")
    process.kill()
    process.wait()
    _kill_container("t-taken")
    as_root("run", "host", "true")  # clears up
    assert done.returncode == 125
    assert "already in use" in done.stderr


def _kill_container(name: str) -> None:
    record = json.loads(Path(f"/run/boxship/boxrun/{name}/state.json").read_text())
    os.kill(record["pid"], signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{record['pid']}") or "Z" in Path(f"/proc/{record['pid']}/stat").read_text())


def test_a_killed_boxship_is_cleared_up_after_by_the_next(as_root: Command) -> None:
    process = as_root.start("run", "--name", "t-killed", "host", "--", "sh", "-c", "echo up; exec sleep 600")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    # The container goes on, so its files have to stay.
    as_root("run", "host", "true")
    assert os.path.isdir("/var/lib/boxship/scratch/t-killed")
    _kill_container("t-killed")
    as_root("run", "host", "true")
    assert not os.path.exists("/var/lib/boxship/scratch/t-killed")
    assert not os.path.exists("/run/boxship/boxrun/t-killed")


def test_limits_are_set(as_root: Command) -> None:
    process = as_root.start("run", "--name", "t-limits", "-m", "64m", "--cpus", "0.5", "--pids-limit", "33", "host", "--", "sh", "-c", "echo up; exec sleep 60")
    assert process.stdout is not None
    process.stdout.readline()
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        wanted = {"memory.max": str(64 << 20), "cpu.max": "50000 100000", "pids.max": "33"}
        found = {name: Path(f"/sys/fs/cgroup/boxship-t-limits/{name}").read_text().strip() for name in wanted}
    else:
        wanted = {"memory/{}/memory.limit_in_bytes": str(64 << 20), "cpu/{}/cpu.cfs_quota_us": "50000", "pids/{}/pids.max": "33"}
        found = {name: Path("/sys/fs/cgroup", name.format("boxship-t-limits")).read_text().strip() for name in wanted}
    _kill_container("t-limits")
    process.communicate()
    assert found == wanted


def test_memory_is_limited_in_deed(as_root: Command) -> None:
    done = as_root("run", "-m", "32m", "host", "python3", "-c", "x = b'x' * (256 << 20); print(len(x))")
    assert done.stdout == ""
    assert done.returncode == 137


# --- other images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root file system with a shell and cat, and the libraries that they need."""
    root = Path(f"/tmp/boxship-rootfs-{secrets.token_hex(4)}")
    for program in ("/bin/sh", "/bin/cat", "/usr/bin/id"):
        lines = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout.split()
        for file in [program, *(word for word in lines if word.startswith("/"))]:
            target = root / file.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(os.path.realpath(file), target)
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text("ann:x:1234:1234::/home/ann:/bin/sh\n")
    (root / "etc/hostname").write_text("image\n")
    for name in ("data", "proc", "sys", "dev"):
        (root / name).mkdir()
    (root / "data/file").write_text("of the image\n")
    (root / "top").write_text("at the top\n")
    (root / "link").symlink_to("/data/file")
    subprocess.run(["chmod", "-R", "a+rX", str(root)], check=True)
    try:
        yield root
    finally:
        shutil.rmtree(root)


def _listing(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_mode, path.lstat().st_mtime_ns) for path in root.rglob("*"))


def test_a_directory_is_an_image_and_stays_as_it_is(boxship: Command, rootfs: Path) -> None:
    before = _listing(rootfs)
    script = "cat /data/file /link /top /etc/hostname; echo new > /data/other; echo new > /data/file 2>/dev/null; echo x > /x; cat /data/other"
    done = boxship("run", "-h", "box", str(rootfs), "/bin/sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "of the image\nof the image\nat the top\nbox\nnew\n"
    assert _listing(rootfs) == before


def test_users_of_a_directory_are_the_images(as_root: Command, rootfs: Path) -> None:
    done = as_root("run", "-u", "ann", str(rootfs), "/bin/sh", "-c", "/usr/bin/id -u; echo $HOME")
    assert done.stdout == "1234\n/home/ann\n"


def test_a_directory_needs_a_command(as_root: Command, rootfs: Path) -> None:
    done = as_root("run", str(rootfs))
    assert done.returncode == 125
    assert "no command specified" in done.stderr


@pytest.fixture
def bundle(rootfs: Path) -> Iterator[Path]:
    folder = Path(f"/tmp/boxship-bundle-{secrets.token_hex(4)}")
    folder.mkdir()
    config = {
        "ociVersion": "1.0.2", "root": {"path": str(rootfs)}, "hostname": "bundle",
        "process": {"args": ["/bin/sh", "-c", "cat /proc/sys/kernel/hostname; echo $A $B; pwd"], "cwd": "/data", "env": ["A=1", "B=2"], "user": {"uid": 0, "gid": 0}},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        ],
        "linux": {"namespaces": [{"type": name} for name in ("pid", "mount", "uts", "ipc", "network")]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_bundle_runs_as_its_config_says(as_root: Command, bundle: Path) -> None:
    assert as_root("run", str(bundle)).stdout == "bundle\n1 2\n/data\n"


def test_flags_change_what_a_bundle_says(as_root: Command, bundle: Path) -> None:
    before = (bundle / "config.json").read_bytes()
    done = as_root("run", "-e", "B=3", "-w", "/etc", "-h", "flag", str(bundle))
    assert done.stdout == "flag\n1 3\n/etc\n"
    assert as_root("run", "--read-only", str(bundle), "/bin/sh", "-c", "echo x > /data/x || echo refused").stdout == "refused\n"
    assert (bundle / "config.json").read_bytes() == before


def test_a_bundle_gets_a_user_namespace_when_the_caller_needs_one(as_user: Command, bundle: Path) -> None:
    done = as_user("run", str(bundle), "/usr/bin/id", "-u")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_says_that_containers_can_be_run_here(boxship: Command) -> None:
    done = boxship("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["usable"] is True
    assert {check["status"] for check in report["checks"]} <= {"yes", "partly", "no"}
    assert not [check for check in report["checks"] if "could not be found out" in check["found"]]
    lacks = [check for check in report["checks"] if check["status"] != "yes"]
    assert all(check["costs"] for check in lacks)
