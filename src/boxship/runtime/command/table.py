"""boxrun's commands: names, flags, texts, and the function that does each.

Runs in: the runtime.
Spec: runc 1.5 `--help` of each command.
"""

from __future__ import annotations

from boxship.runtime.command.flags import BOOL, INT, LIST, STRING, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from boxship.runtime.command.flags import Parsed
    from boxship.runtime.command.main import Invocation

GLOBAL = [
    Flag("debug", "enable debug logging"),
    Flag("log", "set the log file to write logs to (default is '/dev/stderr')", STRING),
    Flag("log-format", "set the log format ('text' (default), or 'json')", STRING, "text"),
    Flag("log-level", "debug, warning or error, as crun has it", STRING, hidden=True),
    Flag("root", "root directory for storage of container state (this should be located in tmpfs)", STRING),
    Flag("systemd-cgroup", 'enable systemd cgroup support, expects cgroupsPath to be of form "slice:prefix:name"'),
    Flag("cgroup-manager", "cgroupfs, systemd or disabled, as crun has it", STRING, hidden=True),
    Flag("rootless", "ignore cgroup permission errors ('true', 'false', or 'auto')", STRING, "auto"),
    Flag("criu", "(obsoleted, do not use)", STRING, hidden=True),
]

_BUNDLE = Flag("bundle, b", "path to the root of the bundle directory, defaults to the current directory", STRING)
_CONSOLE = Flag(
    "console-socket", "path to an AF_UNIX socket which will receive the master end of the console's pseudoterminal", STRING
)
_PIDFD = Flag(
    "pidfd-socket", "path to an AF_UNIX socket which will receive a file descriptor referencing the init process", STRING
)
_PID_FILE = Flag("pid-file", "specify the file to write the process id to", STRING)
_NO_PIVOT = Flag(
    "no-pivot",
    "do not use pivot root to jail process inside rootfs. This should be used whenever the rootfs is on a ramdisk",
)
_NO_KEYRING = Flag("no-new-keyring", "do not create a new session keyring for the container")
_PRESERVE = Flag("preserve-fds", "Pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)", INT)
_DETACH = Flag("detach, d", "detach from the container's process")
_NO_SUBREAPER = Flag("no-subreaper", "disable the use of the subreaper used to reap reparented processes")
_FORMAT = Flag("format, f", "select one of: table or json", STRING, "table")
_WHERE = 'Where "<container-id>" is the name for the instance of the container.'


class Command:
    """One command: how many arguments it takes, and which function of `commands` does it."""

    __slots__ = ("description", "flags", "least", "most", "run", "stop_after", "summary", "synopsis")

    def __init__(
        self, summary: str, flags: list[Flag], run: Callable[[Invocation, Parsed], int], *, args: tuple[int, int | None] = (1, 1),
        synopsis: str = "[command options] <container-id>", description: str = _WHERE, stop_after: int | None = None,
    ) -> None:
        self.summary = summary
        self.flags = flags
        self.run = run
        self.least, self.most = args
        self.synopsis = synopsis
        self.description = description
        self.stop_after = stop_after


def commands() -> dict[str, Command]:
    """The table; built at call, so that only the chosen command's code is imported."""
    from boxship.runtime.command import commands as do
    from boxship.runtime.command import update

    return {
        "checkpoint": Command("checkpoint a running container", _CHECKPOINT, do.checkpoint),
        "create": Command(
            "create a container", [_BUNDLE, _CONSOLE, _PIDFD, _PID_FILE, _NO_PIVOT, _NO_KEYRING, _PRESERVE], do.create
        ),
        "delete": Command(
            "delete any resources held by the container often used with detached container",
            [Flag("force, f", "Forcibly deletes the container if it is still running (uses SIGKILL)")], do.delete,
        ),
        "events": Command(
            "display container events such as OOM notifications, cpu, memory, and IO usage statistics",
            [
                Flag("interval", "set the stats collection interval", STRING, "5s"),
                Flag("stats", "display the container's stats then exit"),
            ],
            do.events,
        ),
        "exec": Command(
            "execute new process inside the container", _EXEC, do.exec_, args=(1, None), stop_after=1,
            synopsis="[command options] <container-id> <command> [command options]  || -p process.json <container-id>",
        ),
        "features": Command(
            "show the enabled features", [], do.features, args=(0, 0), synopsis="[command options]", description=""
        ),
        "kill": Command(
            "kill sends the specified signal (default: SIGTERM) to the container's init process",
            [Flag("all, a", "(obsoleted, do not use)", hidden=True)], do.kill, args=(1, 2), synopsis="<container-id> [signal]",
        ),
        "list": Command(
            "lists containers started by boxrun with the given root",
            [_FORMAT, Flag("quiet, q", "display only container IDs")], do.list_, args=(0, 0), synopsis="[command options]",
            description='Where the given root is specified via the global option "--root".',
        ),
        "pause": Command("pause suspends all processes inside the container", [], do.pause),
        "ps": Command(
            "ps displays the processes running inside a container", [_FORMAT], do.ps, args=(1, None), stop_after=1,
            synopsis="[command options] <container-id> [ps options]",
        ),
        "restore": Command("restore a container from a previous checkpoint", _RESTORE, do.restore),
        "resume": Command("resumes all processes that have been previously paused", [], do.resume),
        "run": Command(
            "create and run a container",
            [
                _BUNDLE, _CONSOLE, _PIDFD, _DETACH, Flag("keep", "do not delete the container after it exits"), _PID_FILE,
                _NO_SUBREAPER, _NO_PIVOT, _NO_KEYRING, _PRESERVE,
            ],
            do.run,
        ),
        "spec": Command(
            "create a new specification file", [_BUNDLE, Flag("rootless", "generate a configuration for a rootless container")],
            do.spec, args=(0, 0), synopsis="[command options]", description="",
        ),
        "start": Command("executes the user defined process in a created container", [], do.start),
        "state": Command("output the state of a container", [], do.state, synopsis="<container-id>"),
        "update": Command("update container resource constraints", update.FLAGS, do.update),
    }


_EXEC = [
    _CONSOLE, _PIDFD, Flag("cwd", "current working directory in the container", STRING),
    Flag("env, e", "set environment variables", LIST), Flag("tty, t", "allocate a pseudo-TTY"),
    Flag("user, u", "UID (format: <uid>[:<gid>])", STRING), Flag("additional-gids, g", "additional gids", LIST),
    Flag("process, p", "path to the process.json", STRING), _DETACH, _PID_FILE,
    Flag("process-label", "set the asm process label for the process commonly used with selinux", STRING),
    Flag("apparmor", "set the apparmor profile for the process", STRING),
    Flag("no-new-privs", "set the no new privileges value for the process"),
    Flag("cap, c", "add a capability to the bounding set for the process", LIST), _PRESERVE,
    Flag("cgroup", "run the process in an (existing) sub-cgroup(s). Format is [<controller>:]<cgroup>", LIST),
    Flag("ignore-paused", "allow exec in a paused container"),
    Flag("no-subreaper", "disable the use of the subreaper used to reap reparented processes", hidden=True),
]

_CRIU = [
    Flag("image-path", "path for saving criu image files", STRING),
    Flag("work-path", "path for saving work files and logs", STRING),
    Flag("tcp-established", "allow open tcp connections"), Flag("ext-unix-sk", "allow external unix sockets"),
    Flag("shell-job", "allow shell jobs"), Flag("lazy-pages", "use userfaultfd to lazily restore memory pages"),
    Flag("file-locks", "handle file locks, for safety"),
    Flag("manage-cgroups-mode", "cgroups mode: soft|full|strict|ignore (default: soft)", STRING),
    Flag("empty-ns", "create a namespace, but don't restore its properties", LIST),
    Flag("auto-dedup", "enable auto deduplication of memory images"),
]
_CHECKPOINT = [
    *_CRIU, Flag("parent-path", "path for previous criu image files in pre-dump", STRING),
    Flag("leave-running", "leave the process running after checkpointing"),
    Flag("tcp-skip-in-flight", "skip in-flight tcp connections"),
    Flag("link-remap", "allow one to link unlinked files back when possible"),
    Flag("status-fd", "criu writes \\0 to this FD once lazy-pages is ready", INT, -1),
    Flag("page-server", "ADDRESS:PORT of the page server", STRING),
    Flag("pre-dump", "dump container's memory information only, leave the container running after this"),
]
_RESTORE = [
    *_CRIU, _CONSOLE, _BUNDLE, _DETACH, _PID_FILE, _NO_SUBREAPER, _NO_PIVOT,
    Flag("lsm-profile", "Specify an LSM profile to be used during restore in the form of TYPE:NAME.", STRING),
    Flag("lsm-mount-context", "Specify an LSM mount context to be used during restore.", STRING),
]

__all__ = ["BOOL", "GLOBAL", "Command", "commands"]
