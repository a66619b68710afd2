"""A private corner of this machine, in which boxrun may be attacked and killed: mounts, /run and kin of its own.

Commands run in a mount namespace of the tests' own, with a /run of its own, so that warm workers and containers of others
are never met; orphans come back to the process that runs the tests. So whatever is left behind is seen: see `Machine.look`.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from boxship.linux import _sys
from boxship.oci.defaults import default_spec

SETNS, CLONE_NEWNS = 308 if os.uname().machine == "x86_64" else 268, 0x20000
PR_SET_CHILD_SUBREAPER = 36
PRCTL = 157 if os.uname().machine == "x86_64" else 167
PREFIX = f"bx{os.getpid()}-"
"""What every container id of the tests begins with: by it their cgroups are told from those of others."""

APPLETS = (
    "[", "ash", "cat", "chmod", "cp", "dd", "echo", "env", "false", "find", "grep", "head", "hostname", "id", "kill", "ln", "ls",
    "mkdir", "mknod", "mount", "mv", "nc", "printf", "ps", "pwd", "readlink", "rm", "sed", "sh", "sleep", "sort", "stat", "tail",
    "test", "touch", "tr", "true", "tty", "umount", "wc", "yes",
)


def find_boxrun() -> str:
    """The native boxrun: as BOXRUN says, beside the interpreter, or in the project's .venv."""
    here = Path(__file__).resolve().parents[2]
    for candidate in (os.environ.get("BOXRUN", ""), f"{os.path.dirname(sys.executable)}/boxrun", f"{here}/.venv/bin/boxrun"):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    pytest.fail("boxrun is not built: make build")


class Done:
    """A command that ended: its status, and what it said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def __repr__(self) -> str:
        return f"<exit {self.code}, stdout {self.out[-2000:]!r}, stderr {self.err[-2000:]!r}>"


class Running:
    """A command that was begun; its output goes to files, since a container may keep it open for longer."""

    def __init__(self, words: Sequence[str], **settings: object) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        given = {"stdin": subprocess.DEVNULL, "stdout": self._out, "stderr": self._err, **settings}
        self.process = subprocess.Popen(words, **given)  # type: ignore[call-overload]
        self.pid: int = self.process.pid
        _waited.add(self.pid)

    def output(self) -> str:
        """What it printed so far."""
        self._out.seek(0)
        return self._out.read().decode(errors="replace")

    def wait(self, timeout: float = 60) -> Done:
        """Wait for the end; a command that hangs is killed, and fails the test."""
        ended = select.poll()
        handle = os.pidfd_open(self.pid)
        ended.register(handle, select.POLLIN)
        deadline = time.monotonic() + timeout
        # What becomes an orphan meanwhile is ours to reap, as it would be pid 1's: a pid namespace does not end before.
        while not ended.poll(20) and time.monotonic() < deadline:
            reap()
        os.close(handle)
        hangs = self.process.poll() is None
        if hangs:
            self.process.kill()
        code = self.process.wait()
        _waited.discard(self.pid)
        if hangs:
            pytest.fail(f"{self.process.args} hangs")
        self._err.seek(0)
        return Done(code, self.output(), self._err.read().decode(errors="replace"))


class Look:
    """What there is at a moment that a container may leave behind."""

    def __init__(self, mounts: list[str], cgroups: list[str], processes: list[str], states: list[str]) -> None:
        self.mounts = mounts
        self.cgroups = cgroups
        self.processes = processes
        self.states = states

    def beyond(self, before: Look) -> list[str]:
        """What is here and was not then."""
        new = []
        for kind in ("mounts", "cgroups", "processes", "states"):
            known = list(getattr(before, kind))
            for item in getattr(self, kind):
                if item in known:
                    known.remove(item)
                else:
                    new.append(f"{kind}: {item}")
            if kind == "mounts":
                # A mount goes by itself when somebody removes the folder that it is on.
                new += [f"lost mount: {item}" for item in known if os.path.exists(item.split()[2])]
        return new


class Machine:
    """Runs commands in the private mount namespace. Close it at the end."""

    def __init__(self, folder: Path) -> None:
        _sys.syscall(PRCTL, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.exe = find_boxrun()
        self.folder = folder
        self.count = 0
        script = "mount --make-rshared / && mount -t tmpfs -o mode=755 run /run && echo ready && exec sleep 86400"
        self.holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        _waited.add(self.holder.pid)
        assert self.holder.stdout and self.holder.stdout.readline() == b"ready\n"
        self.ns = os.open(f"/proc/{self.holder.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self.root = f"/proc/{self.holder.pid}/root"
        """The namespace's tree, as the tests see it."""

    def close(self) -> None:
        """End everything that runs here."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pids = [pid for pid, parent, _, _ in _descendants() if pid != self.holder.pid]
            if not pids:
                break
            for pid in pids:
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    pass
            reap()
            time.sleep(0.01)
        remove_our_cgroups()
        self.holder.kill()
        self.holder.wait()
        _waited.discard(self.holder.pid)
        os.close(self.ns)
        _sys.syscall(PRCTL, PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    # --- commands ------------------------------------------------------------------------------------------------

    def name(self, what: str = "c") -> str:
        """A container id that nobody had before."""
        self.count += 1
        return f"{PREFIX}{what}{self.count}"

    def start(
        self, words: Sequence[str], *, env: dict[str, str] | None = None, before: Callable[[], object] = lambda: None,
        **settings: object,
    ) -> Running:
        """Begin any command; `before` runs in the child, in the namespace, just before the exec."""
        namespace = self.ns

        def enter() -> None:
            _sys.syscall(SETNS, namespace, CLONE_NEWNS)
            os.chdir(str(settings.get("cwd") or "/"))
            before()

        environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **(env or {})}
        return Running(words, env=environ, preexec_fn=enter, **{k: v for k, v in settings.items() if k != "cwd"})

    def host(self, *words: str) -> str:
        """What a command prints; it must succeed."""
        done = self.start(words).wait()
        assert done.code == 0, done
        return done.out

    def begin(self, *words: str, warm: bool = True, env: dict[str, str] | None = None, **settings: object) -> Running:
        """Begin a boxrun command, by a warm worker or without one."""
        return self.start([self.exe, *words], env={**({} if warm else {"BOXRUN_WARM": "0"}), **(env or {})}, **settings)  # type: ignore[arg-type]

    def __call__(self, *words: str, timeout: float = 60, **settings: object) -> Done:
        """A boxrun command from begin to end."""
        return self.begin(*words, **settings).wait(timeout)  # type: ignore[arg-type]

    def ok(self, *words: str, **settings: object) -> str:
        """What a boxrun command prints, which must succeed."""
        done = self(*words, **settings)  # type: ignore[arg-type]
        assert done.code == 0, done
        return done.out

    def state(self, container: str) -> dict[str, object]:
        """The answer of `state`."""
        found = json.loads(self.ok("state", container))
        assert isinstance(found, dict)
        return found

    def warm_up(self) -> None:
        """Have a warm server with its workers waiting."""
        deadline = time.monotonic() + 20
        while not self.warm_server() and time.monotonic() < deadline:
            self("--version")
            time.sleep(0.05)
        assert self.warm_server()

    def warm_socket(self) -> str:
        """The server's socket as the tests see it, or ""."""
        folder = Path(f"{self.root}/run/boxship/warm")
        found = [str(p) for p in folder.iterdir() if p.is_socket()] if folder.exists() else []
        return found[0] if found else ""

    def warm_server(self) -> int:
        """The pid of the warm server; 0 when there is none that listens."""
        if not self.warm_socket():
            return 0
        ours = {pid: parent for pid, parent, command, letter in _descendants() if _is_warm(command) and letter != "Z"}
        return next((pid for pid, parent in ours.items() if parent not in ours), 0)

    def warm_workers(self) -> list[int]:
        """The pids of the server's workers, waiting or at work."""
        server = self.warm_server()
        return [pid for pid, parent, _, letter in _descendants() if parent == server and letter != "Z"] if server else []

    # --- leaks ---------------------------------------------------------------------------------------------------

    def look(self) -> Look:
        """Mounts of the namespace, cgroups of the tests, processes below this one, and the runtime's records."""
        reap()
        with open(f"/proc/{self.holder.pid}/mountinfo") as file:
            # A CRIU that is killed leaves the v2 hierarchy without its options; one that is not is looked at by its tests.
            mounts = [" ".join(line.split()[2:]).removesuffix(",nsdelegate") for line in file]
        below = _descendants()
        warm = {self.holder.pid} | {pid for pid, _, command, _ in below if _is_warm(command)}
        # A worker that ended stays a zombie until its server looks for it.
        ours = [entry for entry in below if entry[0] not in warm and not (entry[3] == "Z" and entry[1] in warm)]
        processes = [f"{pid} {letter} {command}" for pid, _, command, letter in ours]
        states: list[str] = []
        for folder in (f"{self.root}/run/boxship/boxrun", f"{self.root}/run"):
            try:
                states += [f"{folder}/{name}" for name in os.listdir(folder) if name not in ("@seccomp", "boxship", "mount")]
            except FileNotFoundError:
                pass
        return Look(mounts, list(our_cgroups()), processes, states)

    def left(self, before: Look, within: float = 5.0) -> list[str]:
        """What was not there `before` and does not go away within some seconds."""
        deadline = time.monotonic() + within
        while True:
            new = self.look().beyond(before)
            if not new or time.monotonic() > deadline:
                return new
            time.sleep(0.02)


def our_cgroups() -> Iterator[str]:
    """Every directory of any hierarchy that is named after a container of these tests."""
    folders = ["/sys/fs/cgroup"]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            continue
        folders += below
        yield from (path for path in below if PREFIX in os.path.basename(path))


def remove_our_cgroups() -> None:
    """What tests that failed have left, also what is frozen."""
    deadline = time.monotonic() + 5
    while (left := sorted(our_cgroups(), reverse=True)) and time.monotonic() < deadline:
        for path in left:
            try:
                if os.path.exists(f"{path}/freezer.state"):
                    Path(path, "freezer.state").write_text("THAWED")
                for pid in Path(path, "cgroup.procs").read_text().split():
                    os.kill(int(pid), 9)
                os.rmdir(path)
            except OSError:
                pass  # next time round
        reap()
        time.sleep(0.01)


def capability_sets(status: str) -> dict[str, int]:
    """The sets in a text of /proc/PID/status, by its names for them."""
    return {line[:6]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")}


def _is_warm(command: str) -> bool:
    return "boxship.runtime.warm" in command or "boxship.daemon.spawner" in command


def _processes() -> Iterator[tuple[int, int, str, str]]:
    """(pid, parent, name, state letter) of every process of the machine."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                stat = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = stat[stat.rindex(b")") + 2 :].split()
        comm = stat[stat.index(b"(") : stat.rindex(b")") + 1]
        yield int(name), int(fields[1]), comm.decode(errors="replace"), fields[0].decode()


def _command(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace") or name
    except (FileNotFoundError, ProcessLookupError):
        return name


def _descendants() -> list[tuple[int, int, str, str]]:
    """(pid, parent, command, state letter) of everything below this process."""
    everything = {entry[0]: entry for entry in _processes()}
    me = os.getpid()
    found = []
    for pid, entry in everything.items():
        above = entry[1]
        while above in everything and above != me:
            above = everything[above][1]
        if above == me:
            found.append((pid, entry[1], _command(pid, entry[2]), entry[3]))
    return found


_waited: set[int] = set()
"""Children whose exit status somebody will ask for."""


def reap() -> None:
    """Take the exit status of orphans that came to us."""
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as file:
                orphans = {int(pid) for pid in file.read().split()} - _waited
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that ended meanwhile
        for pid in orphans:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


class Bundle:
    """A bundle with a root file system of busybox, and its configuration as an object to change."""

    def __init__(self, path: Path, *args: str) -> None:
        self.path = path
        self.rootfs = path / "rootfs"
        for name in ("bin", "dev", "proc", "sys", "tmp", "etc", "mnt"):
            (self.rootfs / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(shutil.which("busybox") or "/bin/busybox", self.rootfs / "bin/busybox")
        for applet in APPLETS:
            os.symlink("busybox", self.rootfs / "bin" / applet)
        self.spec: dict[str, object] = default_spec()
        self.process["terminal"] = False
        self.process["args"] = list(args) or ["sleep", "1000"]
        self.linux["maskedPaths"] = list(self.linux["maskedPaths"])  # type: ignore[call-overload]
        self.spec["hostname"] = "test"

    @property
    def process(self) -> dict[str, object]:
        return self.spec["process"]  # type: ignore[return-value]

    @property
    def linux(self) -> dict[str, object]:
        return self.spec["linux"]  # type: ignore[return-value]

    @property
    def mounts(self) -> list[dict[str, object]]:
        return self.spec["mounts"]  # type: ignore[return-value]

    def writable(self) -> None:
        """Let the root file system be written to."""
        self.spec["root"]["readonly"] = False  # type: ignore[index]

    def bind(self, source: str | Path, destination: str, *options: str) -> None:
        """One more bind mount."""
        self.mounts.append(
            {"type": "bind", "source": str(source), "destination": destination, "options": ["rbind", *options]}
        )

    def without(self, *destinations: str) -> None:
        """Take mounts out of the configuration."""
        self.spec["mounts"] = [m for m in self.mounts if m["destination"] not in destinations]

    def shell(self, script: str) -> None:
        """Let it run a script."""
        self.process["args"] = ["sh", "-c", script]

    def capable(self, *names: str) -> None:
        """Let the process have capabilities."""
        kinds = ("bounding", "effective", "permitted")
        self.process["capabilities"] = {kind: list(names) for kind in kinds}

    def write(self) -> str:
        """Write config.json; returns the bundle's path, for --bundle."""
        (self.path / "config.json").write_text(json.dumps(self.spec))
        return str(self.path)


_programs = Path(tempfile.gettempdir())


def compile_c(source: str) -> Path:
    """A static program from C source, made once per text."""
    folder = _programs / f"{PREFIX}programs"
    folder.mkdir(exist_ok=True)
    program = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
    if not program.exists():
        subprocess.run(
            ["gcc", "-static", "-O1", "-w", "-D_GNU_SOURCE", "-x", "c", "-o", f"{program}.new", "-"], input=source, text=True, check=True
        )
        os.rename(f"{program}.new", program)
    return program


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The private corner, one for each file of tests."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    corner = Machine(tmp_path_factory.mktemp("machine"))
    try:
        yield corner
    finally:
        corner.close()
        shutil.rmtree(_programs / f"{PREFIX}programs", ignore_errors=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A fresh bundle."""
    return Bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def nothing_is_left(machine: Machine) -> Iterator[None]:
    """After each test: no mount, control group, process or record that was not there before it."""
    before = machine.look()
    yield
    left = machine.left(before)
    assert not left, left
