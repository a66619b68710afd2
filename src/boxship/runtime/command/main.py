"""The entry of boxrun: global options, the command, errors and exit codes.

Runs in: the runtime: a process of its own, or a worker that was forked for this one command (`boxship.runtime.warm`).
Spec: runc's command line; exit codes 0, 1, 255 for exec's own failures, else the container's.
"""

from __future__ import annotations

import os

from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.kit.files import write_all
from boxship.runtime.command import flags, table
from boxship.runtime.command.log import Log
from boxship.runtime.context import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.runtime.command.flags import Parsed
    from boxship.runtime.parent import Parent

VERSION = "0.1.0"
SPEC_VERSION = "1.3.0"


_OWN_PATHS = (
    ("/dev/fd", "/fd"), ("/dev/stdin", "/fd/0"), ("/dev/stdout", "/fd/1"), ("/dev/stderr", "/fd/2"), ("/proc/self", ""),
    ("/proc/thread-self", ""),
)


class Invocation:
    """One call of boxrun: what the caller is, and what it asked for globally.

    Attributes:
        argv0: as the caller called it; messages begin with it.
        parent: the process that children are to have as their parent; its `stdio` is where output goes.
        environ, cwd: the caller's.
        log: None before the global options are read.
        done: whether the command came to its end by itself, whatever the exit code; not so after an error.
    """

    def __init__(self, argv: list[str], parent: Parent, environ: dict[str, str], cwd: str) -> None:
        self.argv = argv
        self.argv0 = argv[0] if argv else "boxrun"
        # Installed under another runtime's name it answers to that: callers look for "runc create failed".
        self.name = os.path.basename(self.argv0)
        self.parent = parent
        self.environ = environ
        self.cwd = cwd
        self.log: Log | None = None
        self.done = False
        self.context: Context

    def print(self, text: str) -> None:
        """To the caller's standard output."""
        write_all(self.parent.stdio[1], text.encode(errors="surrogateescape"))

    def read_input(self) -> bytes:
        """All of the caller's standard input."""
        parts = []
        while chunk := os.read(self.parent.stdio[0], 65536):
            parts.append(chunk)
        return b"".join(parts)

    def path(self, path: str) -> str:
        """A path as the caller means it, also below /dev/fd and /proc/self, which lead to the process that asks."""
        path = os.path.normpath(os.path.join(self.cwd, path))
        if self.parent.pid != os.getpid():
            theirs = f"/proc/{self.parent.pid}"
            for own, caller in _OWN_PATHS:
                if path == own or path.startswith(own + "/"):
                    return theirs + caller + path[len(own) :]
        return path

    def run(self) -> int:
        """Do what was asked, and return the exit code. Errors go to the log and to standard error."""
        name = ""
        try:
            options, name, rest = self._split()
            if name == "":
                self.done = True
                return 0
            self._prepare(options)
            command = table.commands().get(name)
            if command is None:
                self.print(f"No help topic for '{name}'\n")
                return 3
            code = self._command(name, command, rest)
            self.done = True
            return code
        except BrokenPipeError:
            return 1
        except (BoxshipError, OSError) as error:
            message = _describe(error)
            if name == "exec":
                message = f"exec failed: {message}"
            elif name in ("create", "run", "restore", "start"):
                message = f"{self.name} {name} failed: {message}"
            self._fatal(message)
            return 255 if name == "exec" else 1
        except Exception as error:  # noqa: BLE001  # the last resort: a bug is reported like any failure, not as silence
            import traceback

            self._fatal(f"internal error in {name or 'boxrun'}: {''.join(traceback.format_exception(error))}")
            return 255 if name == "exec" else 1
        finally:
            if self.log is not None:
                self.log.close()

    def _fatal(self, message: str) -> None:
        log = self.log or Log(self.parent.stdio[2])
        log.fatal(message)

    def _split(self) -> tuple[Parsed, str, list[str]]:
        """Global options, command, and the command's arguments; an empty command when the answer was printed already."""
        try:
            options = flags.parse([*table.GLOBAL, flags.Flag("version, v", "print the version")], self.argv[1:], stop_after=1)
        except flags.HelpWanted:
            self._help()
            return flags.Parsed([]), "", []
        except flags.UsageError as error:
            self.print(f"Incorrect Usage: {error}\n\n")
            self._help()
            raise
        if options.yes("version"):
            self.print(_version(self.name))
            return options, "", []
        if not options.args or options.args[0] in ("help", "h"):
            self._help()
            return options, "", []
        return options, options.args[0], options.args[1:]

    def _help(self) -> None:
        listed = [(name, command.summary) for name, command in table.commands().items()]
        name = self.name
        self.print(
            flags.help_text(
                name, "Open Container Initiative runtime", "[global options] command [command options] [arguments...]",
                f"{name} runs containers that are described by bundles: a directory with config.json and a root file system.",
                [*table.GLOBAL, flags.Flag("version, v", "print the version")], listed,
            )
        )

    def _prepare(self, options: Parsed) -> None:
        log_path = options.text("log")
        self.log = Log(
            self.parent.stdio[2], self.path(log_path) if log_path else "", options.text("log-format"),
            debug=options.yes("debug") or options.text("log-level") == "debug",
        )
        root = options.text("root")
        if "root" in options.given:
            root = self.path(root)
            if root == "/":
                raise InvalidArgument("Option --root argument should not be set to /")
        rootless = {"": None, "auto": None, "true": True, "false": False}.get(options.text("rootless").lower(), "bad")
        if rootless == "bad":
            raise InvalidArgument(f'strconv.ParseBool: parsing "{options.text("rootless")}": invalid syntax')
        manager = options.text("cgroup-manager")
        self.context = Context(
            root, parent=self.parent, systemd_cgroup=options.yes("systemd-cgroup") or manager == "systemd",
            rootless=rootless, log=self.log, environ=self.environ, cwd=self.cwd,  # type: ignore[arg-type]
        )
        self.context.no_cgroups = manager == "disabled"
        self.root_given = "root" in options.given

    def _command(self, name: str, command: table.Command, rest: list[str]) -> int:
        try:
            parsed = flags.parse(command.flags, rest, command.stop_after)
        except flags.HelpWanted:
            self.print(self._command_help(name, command))
            return 0
        except flags.UsageError as error:
            self.print(f"Incorrect Usage: {error}\n\n{self._command_help(name, command)}")
            raise
        count = len(parsed.args)
        problem = ""
        if command.least == command.most and count != command.least:
            problem = f"requires exactly {command.least} argument(s)"
        elif count < command.least:
            problem = f"requires a minimum of {command.least} argument(s)"
        elif command.most is not None and count > command.most:
            problem = f"requires a maximum of {command.most} argument(s)"
        if problem:
            self.print(f"Incorrect Usage.\n\n{self._command_help(name, command)}")
            raise InvalidArgument(f'{self.argv0}: "{name}" {problem}')
        return command.run(self, parsed)

    def _command_help(self, name: str, command: table.Command) -> str:
        full = f"{self.name} {name}"
        return flags.help_text(full, command.summary, command.synopsis, command.description, command.flags)


def _version(name: str) -> str:
    from boxship.linux import seccomp

    lines = [f"{name} version {VERSION}", f"commit: v{VERSION}", f"spec: {SPEC_VERSION}"]
    try:
        lines.append(f"libseccomp: {seccomp.version()}")
    except BoxshipError:
        pass  # without libseccomp there is no version to tell
    return "\n".join(lines) + "\n"


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        what = (error.strerror or str(error)).lower()
        return f"open {error.filename}: {what}" if error.filename else what
    return str(error)


def main() -> int:
    """boxrun in a process of its own."""
    import sys

    from boxship.runtime.parent import Direct

    failpoint.load()
    environ = dict(os.environ)
    argv0 = environ.pop("BOXRUN_ARGV0", sys.argv[0])
    environ.pop("BOXRUN_WARM_SOCKET", None)
    return Invocation([argv0, *sys.argv[1:]], Direct(), environ, os.getcwd()).run()
