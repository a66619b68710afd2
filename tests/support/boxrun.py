"""boxrun on a machine that belongs to the tests alone, such as a guest (`support.guest`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from boxship.oci.defaults import to_rootless
from support.machine import Bundle, Done, Running, find_boxrun

PREFIX = f"t{os.getpid()}-"
CGROUP = Path("/sys/fs/cgroup")


def eventually(question: Callable[[], object], why: str, within_s: float = 20) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + within_s
    while not question():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


class Boxrun:
    """The command, and the containers that it made.

    Attributes:
        before: global flags of every call.
        user: whose calls these are; 0 for root.
        environ: what is added to the environment.
    """

    def __init__(self, *before: str, user: int = 0) -> None:
        # BOXSHIP_GUEST_RUNTIME=runc: these tests are run on runc before they are believed.
        self.exe = os.environ.get("BOXSHIP_GUEST_RUNTIME") or find_boxrun()
        self.before = list(before)
        self.user = user
        self.environ: dict[str, str] = {}
        self.names: list[str] = []
        self._mounts = Path("/proc/self/mountinfo").read_text().count("\n")

    def name(self) -> str:
        """An id that nobody had before."""
        self.names.append(f"{PREFIX}{time.monotonic_ns()}")
        return self.names[-1]

    def begin(self, *words: str, into: Path | None = None, **settings: object) -> Running:
        """Begin a command; `into`: the cgroup that it is started in."""
        def enter() -> None:
            if into:
                (into / "cgroup.procs").write_text("0")
            if self.user:
                os.setgroups([])
                os.setresgid(self.user, self.user, self.user)
                os.setresuid(self.user, self.user, self.user)

        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        home = {"HOME": "/home/user", "XDG_RUNTIME_DIR": f"/run/user/{self.user}"} if self.user else {"HOME": "/root"}
        return Running(
            [self.exe, *self.before, *words], env={"PATH": path, **home, **self.environ}, preexec_fn=enter, **settings
        )

    def __call__(self, *words: str, timeout: float = 60, **settings: object) -> Done:
        """A command from begin to end."""
        done = self.begin(*words, **settings).wait(timeout)  # type: ignore[arg-type]
        # Log lines quote the message.
        return Done(done.code, done.out, done.err.replace('\\"', '"'))

    def ok(self, *words: str, **settings: object) -> str:
        """What a command prints, which must succeed."""
        done = self(*words, **settings)
        assert done.code == 0, done
        return done.out

    def run(self, bundle: Bundle, **settings: object) -> str:
        """A container that runs in the background; its id."""
        name = self.name()
        self.ok("run", "-d", "--bundle", bundle.write(), name, **settings)
        return name

    def output(self, bundle: Bundle, script: str, **settings: object) -> str:
        """What a shell script prints in a container of its own."""
        bundle.shell(script)
        return self.ok("run", "--bundle", bundle.write(), self.name(), **settings)

    def shell(self, name: str, script: str) -> str:
        """What a shell script prints in a container that runs."""
        return self.ok("exec", name, "sh", "-c", script)

    def state(self, name: str) -> dict[str, object]:
        """The answer of `state`."""
        found = json.loads(self.ok("state", name))
        assert isinstance(found, dict)
        return found

    def pid(self, name: str) -> int:
        """Of the container's init."""
        return int(self.state(name)["pid"])  # type: ignore[call-overload]

    def cgroup(self, name: str) -> Path:
        """The directory of the group that init is in."""
        return membership(self.pid(name))

    def close(self) -> list[str]:
        """Delete all containers; what is left of them."""
        for name in self.names:
            self("delete", "--force", name)
        left = [f"cgroup {path}" for path in CGROUP.rglob(f"*{PREFIX}*") if path.is_dir()]
        mounts = Path("/proc/self/mountinfo").read_text().count("\n")
        if mounts > self._mounts:
            left.append(f"{mounts - self._mounts} mounts")
        return left


def membership(pid: int) -> Path:
    """The directory of the group that a process is in."""
    text = Path(f"/proc/{pid}/cgroup").read_text()
    return CGROUP / text.removeprefix("0::/").strip()


def read(path: Path) -> str:
    """A file's text without the line's end."""
    return path.read_text().strip()


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        os.kill(pid, signal.SIG_DFL)
    except ProcessLookupError:
        return True
    return False


def said(*words: str) -> str:
    """What a command of the machine prints; it must succeed."""
    return subprocess.run(words, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.strip()


def open_to_all(bundle: Bundle) -> None:
    """Let every user reach the bundle."""
    for path in [bundle.path, *bundle.path.parents]:
        if path not in (Path("/"), Path("/tmp")):
            path.chmod(0o755)


def make_rootless(bundle: Bundle, uid: int = 1000) -> None:
    """What `boxrun spec --rootless` makes of the configuration, for an ordinary user."""
    to_rootless(bundle.spec)
    for kind in ("uidMappings", "gidMappings"):
        bundle.linux[kind] = [{"containerID": 0, "hostID": uid, "size": 1}]
    bundle.linux.setdefault("resources", {})
    open_to_all(bundle)
    subprocess.run(["chown", "-R", f"{uid}:{uid}", str(bundle.path)], check=True)
