"""A machine in the machine for engines that keep resident state: what is started on it ends with it.

Its own mount, network, pid, IPC, host name and cgroup namespaces, a fresh /run, and cgroups below one directory of each of
the machine's hierarchies. So a daemon under test meets neither the machine's own containers nor their networks, and
whatever a failing test leaves, processes, mounts, links, cgroups, goes when the stage closes.

Needs: root, util-linux (unshare, nsenter, mount), iproute2.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

CGROUPS = Path("/sys/fs/cgroup")

# Process 1 of the stage. It mounts what is the stage's own, says so, and from then on reaps.
_FIRST = """
import os, signal, subprocess, sys
def mount(*words): subprocess.run(["mount", *words], check=True)
mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
os.mkdir("/run/lock")
if sys.argv[1] == "v2":
    subprocess.run(["umount", "-R", "/sys/fs/cgroup"], check=True)
    mount("-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    # Controllers can be handed on only by a group that has no processes itself.
    os.mkdir("/sys/fs/cgroup/stage")
    open("/sys/fs/cgroup/stage/cgroup.procs", "w").write("1")
    for name in open("/sys/fs/cgroup/cgroup.controllers").read().split():
        open("/sys/fs/cgroup/cgroup.subtree_control", "w").write("+" + name)
else:
    subprocess.run(["umount", "-R", "/sys/fs/cgroup"], check=True)
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/sys/fs/cgroup")
    for word in sys.argv[2:]:
        name, kind, options = word.split(":")
        os.mkdir("/sys/fs/cgroup/" + name)
        mount("-t", kind, "-o", options, "cgroup", "/sys/fs/cgroup/" + name)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
print("ready", flush=True)
while True:
    signal.sigwait({signal.SIGCHLD})
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""


@dataclass
class Stage:
    """Open it with `open_stage`, close it with `close`."""

    directory: Path
    """Short enough a path for sockets below it. Removed at the end."""
    groups: list[Path]
    """The stage's directory in each cgroup hierarchy of the machine."""
    search: str
    """PATH of what runs here."""
    keeper: subprocess.Popen[str]
    first: int
    """Process 1 of the stage, by the machine's number."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def _command(self, argv: Sequence[str | Path]) -> list[str]:
        return ["nsenter", f"--target={self.first}", "--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--",
                *map(str, argv)]

    def _options(self, env: dict[str, str] | None) -> dict[str, object]:
        places = [group / "stage" if (group / "stage").is_dir() else group for group in self.groups]

        def join() -> None:
            for place in places:
                with open(place / "cgroup.procs", "wb", buffering=0) as stream:
                    stream.write(b"0")

        home = {"PATH": self.search, "HOME": str(self.directory), "TMPDIR": str(self.directory), "LANG": "C.UTF-8"}
        return {"env": home | (env or {}), "cwd": self.directory, "preexec_fn": join}

    def run(self, *argv: str | Path, check: bool = True, timeout: float = 60, text: str = "",
            env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. With `check` a code other than 0 fails the test, with what was printed."""
        done = subprocess.run(self._command(argv), capture_output=True, text=True, errors="replace", timeout=timeout,
                              input=text, **self._options(env))  # type: ignore[call-overload]
        if check and done.returncode:
            words = " ".join(map(str, argv))
            raise AssertionError(f"{words}\nended with {done.returncode}\n--- stdout\n{done.stdout}--- stderr\n{done.stderr}")
        return done  # type: ignore[no-any-return]

    def out(self, *argv: str | Path, **options: object) -> str:
        """What a command that succeeds prints, without white space around it."""
        return self.run(*argv, **options).stdout.strip()  # type: ignore[arg-type]

    def start(self, *argv: str | Path, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a daemon; its output goes to `log`. `stop` ends it, and so does the end of the stage."""
        with open(log, "wb") as stream:
            process = subprocess.Popen(self._command(argv), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                                       **self._options(env))  # type: ignore[call-overload]
        self.started.append(process)
        return process  # type: ignore[no-any-return]

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End what `start` started, politely first. The process itself is nsenter's child."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in children.read_text().split() if process.poll() is None else ():
            os.kill(int(pid), signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process in self.started:
            self.started.remove(process)

    def typing(self, *argv: str | Path, types: str, until: str, timeout: float = 30,
               env: dict[str, str] | None = None) -> tuple[int, str]:
        """Run a command on a terminal of its own and type. Returns its code and what was on the screen.

        Types `types` when `until` has appeared; nothing is typed before, for an early key may get lost.
        """
        main, terminal = pty.openpty()
        process = subprocess.Popen(self._command(argv), stdin=terminal, stdout=terminal, stderr=terminal,
                                   start_new_session=True, **self._options({"TERM": "xterm"} | (env or {})))  # type: ignore[call-overload]
        os.close(terminal)
        screen, end, typed = b"", time.monotonic() + timeout, False
        try:
            while time.monotonic() < end:
                if select.select([main], [], [], 0.1)[0]:
                    try:
                        screen += os.read(main, 4096)
                    except OSError:  # EIO: the last one who had the terminal is gone
                        break
                if not typed and until.encode() in screen:
                    os.write(main, types.encode())
                    typed = True
            return process.wait(max(0.1, end - time.monotonic())), screen.decode(errors="replace")
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{argv} did not end; on its screen: {screen!r}") from None
        finally:
            process.kill()
            process.wait()
            os.close(main)

    def eventually(self, what: Callable[[], object], timeout: float = 20, why: str = "") -> object:
        """Ask until the answer is true, and return it; a command that fails meanwhile counts as no."""
        end = time.monotonic() + timeout
        while True:
            try:
                if answer := what():
                    return answer
                last: object = answer
            except (AssertionError, OSError) as error:
                last = error
            assert time.monotonic() < end, f"{why or what} did not happen within {timeout} s; last: {last}"
            time.sleep(0.05)

    def group_file(self, pid: int, controller: str, v1: str, v2: str) -> str:
        """The value of a cgroup file of a process of the stage, by either arrangement's name. `pid` is the stage's number."""
        for line in self.out("cat", f"/proc/{pid}/cgroup").splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                return self.out("cat", f"/sys/fs/cgroup/{controller}{path}/{v1}")
            if not names and (CGROUPS / "cgroup.controllers").exists():
                return self.out("cat", f"/sys/fs/cgroup{path}/{v2}")
        raise AssertionError(f"process {pid} has no {controller} cgroup")

    def close(self) -> None:
        """End everything that runs here and remove what was made."""
        self.keeper.kill()  # --kill-child takes process 1 along, and the kernel all others
        self.keeper.wait()
        for process in self.started:
            process.kill()
            process.wait()
        for group in self.groups:
            for _ in range(100):
                for path in sorted(group.rglob("*/"), reverse=True):
                    _remove_group(path)
                if _remove_group(group):
                    break
                time.sleep(0.05)  # the last processes are still being buried
        shutil.rmtree(self.directory, ignore_errors=True)


def _remove_group(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _hierarchies() -> list[tuple[Path, str, str]]:
    """Mount point, file system type and mount options of each cgroup hierarchy of the machine."""
    found: dict[str, tuple[Path, str, str]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            own = ",".join(word for word in options.split(",") if word not in ("rw", "ro")) if kind == "cgroup" else "rw"
            found.setdefault(own, (Path(head.split()[4]), kind, own))
    return list(found.values())


def open_stage(first_on_path: Sequence[Path] = ()) -> Stage:
    """Make a stage. Programs of the directories `first_on_path` are found before the machine's own."""
    directory = Path(mkdtemp(prefix="stage-", dir="/tmp"))
    directory.chmod(0o755)
    hierarchies, groups = _hierarchies(), []
    unified = [kind for _, kind, _ in hierarchies] == ["cgroup2"]
    for mount, _, options in hierarchies:
        group = mount / directory.name
        group.mkdir()
        groups.append(group)
        if "cpuset" in options.split(","):  # v1 gives a new group no processor and no memory
            for name in ("cpuset.cpus", "cpuset.mems"):
                (group / name).write_text((mount / name).read_text())

    def join() -> None:
        for group in groups:
            with open(group / "cgroup.procs", "wb", buffering=0) as stream:
                stream.write(b"0")

    search = ":".join([*map(str, first_on_path), "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"])
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--fork",
         "--mount-proc", "--kill-child", sys.executable, "-I", "-c", _FIRST, "v2" if unified else "v1",
         *(f"{mount.name}:{kind}:{options}" for mount, kind, options in hierarchies)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        preexec_fn=join)  # noqa: PLW1509  # tests have one thread
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == "ready\n", "the stage cannot be set up here; what failed is printed above"
    first = int(Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()[0])
    return Stage(directory, groups, search, keeper, first)
