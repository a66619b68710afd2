"""Processes that a person starts and talks to: create, run, start, exec, attach.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API: create, attach, start, wait, resize, exec.

`run` of a directory or a bundle needs no daemon and goes to `boxship.cli.run`; so does the image `host` where the caller cannot
have a daemon. `is_local` decides.
"""

from __future__ import annotations

import os

from boxship.cli.command import MANY, Command, Exit, each
from boxship.cli.http.client import ApiError, path
from boxship.cli.verbs.lifecycle import target
from boxship.kit.errors import BoxshipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.command import Call
    from boxship.cli.http.stream import Session

NOT_THERE, NOT_EXECUTABLE, OWN_FAILURE = 127, 126, 125
_JOINED = "read escape sequence"


def is_local(call: Call) -> bool:
    """Whether IMAGE is run by this process, without the engine: a directory or a bundle (a path), or when asked to.

    `host` is an image of the engine. It can be had without one too, and is where there can be none: a daemon needs root, and
    folders that can carry the upper layers of overlays.
    """
    image = call.words[0]
    if call.on("no-daemon") or image.startswith(("/", ".")):
        return True
    if image != "host" or call.parsed.given - _local_flags():
        return False
    from boxship.cli.http.where import daemon_is_possible

    return not daemon_is_possible(call.environ)


def _local_flags() -> frozenset[str]:
    from boxship.cli.run import FLAGS

    return FLAGS | {"no-daemon"}


def exit_code(message: str) -> int:
    """docker's exit code for a container that did not start, from the engine's words."""
    if any(
        words in message
        for words in ("executable file not found", "no such file or directory", "system cannot find the file specified")
    ):
        return NOT_THERE
    if any(words in message.lower() for words in ("permission denied", "is a directory")):
        return NOT_EXECUTABLE
    return OWN_FAILURE


def _need_terminal(call: Call, *, tty: bool, stdin: bool) -> None:
    if tty and stdin and not os.isatty(0):
        raise Exit(1, "the input device is not a TTY")


# --- create and run --------------------------------------------------------------------------------------------------


def _create(call: Call) -> str:
    """Make the container, pulling the image if need be; returns its id."""
    from boxship.cli.verbs import create as flags
    from boxship.cli.verbs.transfer import check_reference

    pull = call.text("pull") or "missing"
    if pull not in ("always", "missing", "never"):
        raise BoxshipError(f'invalid pull option: \'{pull}\': must be one of "always", "missing" or "never"')
    check_reference(call.words[0])
    flags.check_id_file(call.text("cidfile"))
    body = flags.request(call)
    if call.words[0] == "host":
        flags.keep_apart(call, body)
    query = {"name": call.text("name") or None, "platform": call.text("platform") or None}
    if pull == "always":
        _pull(call)
    try:
        answer = call.engine.send("POST", path("/containers/create", query), body).json()
    except ApiError as error:
        if error.status != 404 or pull != "missing" or "o such image" not in error.message:
            raise
        if not call.on("quiet"):
            from boxship.cli.verbs.transfer import familiar

            _warn(f"Unable to find image '{familiar(call.words[0])}' locally")
        _pull(call)
        answer = call.engine.send("POST", path("/containers/create", query), body).json()
    for warning in answer.get("Warnings") or []:
        _warn(f"WARNING: {warning}")
    if call.text("cidfile"):
        with open(call.text("cidfile"), "w", encoding="utf-8") as file:
            file.write(answer["Id"])
    return str(answer["Id"])


def _pull(call: Call) -> None:
    from boxship.cli.verbs.transfer import pull

    pull(call, call.words[0], platform=call.text("platform"), quiet=call.on("quiet"), fd=2)


def _warn(text: str) -> None:
    from boxship.cli.show.table import write

    write(f"{text}\n", 2)


def create(call: Call) -> int:
    """`boxship create`."""
    from boxship.cli.show.table import write

    write(f"{_create(call)}\n")
    return 0


def run(call: Call) -> int:
    """`boxship run`: the exit code is the container's, or 125, 126, 127."""
    if is_local(call):
        return _run_here(call)
    if call.words[0] == "host" and not call.parsed.given - _local_flags() and not _engine_comes(call):
        return _run_here(call)
    code = OWN_FAILURE
    try:
        if not call.on("detach"):
            _need_terminal(
                call, tty=call.on("tty"), stdin=call.on("interactive") and (not call.all("attach") or "stdin" in _streams(call))
            )
        elif call.all("attach"):
            raise Exit(1, "conflicting options: cannot specify both --attach and --detach")
        identity = _create(call)
        return _run_detached(call, identity) if call.on("detach") else _run_attached(call, identity)
    except ApiError as error:
        code = exit_code(str(error))
        text = str(error)
    except BoxshipError as error:
        from boxship.cli.flags import UsageError

        if isinstance(error, UsageError):
            raise
        text = str(error)
    except OSError as error:
        text = f"{(error.strerror or str(error)).lower()}{f' {error.filename}' if error.filename else ''}"
    raise Exit(code, f"boxship: {text}\n\nRun 'boxship {call.name} --help' for more information")


def _engine_comes(call: Call) -> bool:
    """Whether there is an engine; when a daemon of our own does not start, why is told to who asks for it."""
    from boxship.cli.http.client import ConnectFailed
    from boxship.cli.http.where import address

    try:
        return call.engine is not None
    except ConnectFailed as error:
        if not address(call.environ)[1]:
            raise
        if "BOXSHIP_DEBUG" in call.environ:
            _warn(f"boxship: debug: {error}; the container is run without a daemon")
        return False


def _streams(call: Call) -> list[str]:
    return [word.lower() for word in call.all("attach")]


def _run_here(call: Call) -> int:
    from boxship.cli.flags import UsageError
    from boxship.cli.main import say
    from boxship.cli.run import run as local

    unknown = sorted(call.parsed.given - _local_flags())
    if unknown:
        raise UsageError(f"--{unknown[0]} needs the daemon: there is none for this kind of image")
    try:
        return local(call.parsed, call.environ, say)
    except UsageError:
        raise
    except BoxshipError as error:
        raise Exit(OWN_FAILURE, f"boxship: {error}") from None
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise Exit(OWN_FAILURE, f"boxship: {(error.strerror or str(error)).lower()}{where}") from None


def _run_detached(call: Call, identity: str) -> int:
    from boxship.cli.show.table import write

    call.engine.send("POST", target(identity, "start")).read()
    write(f"{identity}\n")
    return 0


def _run_attached(call: Call, identity: str) -> int:
    from boxship.cli.http import stream

    attach = _streams(call) or ["stdin", "stdout", "stderr"]
    stdin = call.on("interactive") and "stdin" in attach
    wanted = {"stdin": stdin, "stdout": "stdout" in attach, "stderr": "stderr" in attach}
    with _attach(
        call, identity, wanted, tty=call.on("tty"), proxy=call.on("sig-proxy") or "sig-proxy" not in call.parsed.given
    ) as session:
        waiting = _start_waiting(call, identity, "removed" if call.on("rm") else "next-exit")
        call.engine.send("POST", target(identity, "start")).read()
        if call.on("tty"):
            session.resize()
        ended = session.run()
    if ended == stream.DETACHED:
        _warn(_JOINED)
        return 0
    return _exit_status(waiting)


def _attach(call: Call, identity: str, wanted: dict[str, bool], *, tty: bool, proxy: bool, logs: bool = False) -> Session:
    from boxship.cli.http import stream
    from boxship.cli.http.where import another

    connection = another(call.engine)
    keys = call.text("detach-keys")
    detach = stream.keys(keys)
    query = {"stream": True, "logs": logs, **wanted, "detachKeys": keys or None}
    response = connection.send(
        "POST", path(target(identity, "attach"), query), upgrade=True, headers={"Content-Type": "text/plain"}
    )
    if response.status not in (101, 200):
        raise BoxshipError(f"unable to upgrade to tcp, received {response.status}")
    sock, early = connection.take()

    def resize(rows: int, columns: int) -> None:
        try:
            call.engine.send("POST", path(target(identity, "resize"), {"h": rows, "w": columns})).read()
        except ApiError:
            pass  # it has ended

    def send_signal(number: int) -> None:
        from boxship.abi.process import SIGNALS

        name = next((name for name, value in SIGNALS.items() if value == number), str(number))
        try:
            call.engine.send("POST", path(target(identity, "kill"), {"signal": name.removeprefix("SIG")})).read()
        except ApiError:
            pass  # it has ended, or was not there yet

    # A terminal in raw mode makes no signals of keys, but others may send some.
    return stream.Session(
        sock,
        early,
        terminal=tty,
        stdin=wanted["stdin"],
        detach=detach,
        on_resize=resize,
        on_signal=send_signal if proxy else None,
    )


def _start_waiting(call: Call, identity: str, condition: str) -> Any:
    """Ask for the exit code before it can happen; the answer is read later."""
    from boxship.cli.http.where import another

    return another(call.engine).send("POST", path(target(identity, "wait"), {"condition": condition}))


def _exit_status(waiting: Any) -> int:
    answer = waiting.json() or {}
    error = (answer.get("Error") or {}).get("Message")
    if error:
        raise BoxshipError(f"Error waiting for container: {error}")
    return int(answer.get("StatusCode", 0))


# --- start, attach ---------------------------------------------------------------------------------------------------


def start(call: Call) -> int:
    """`boxship start`."""
    from boxship.cli.http import stream

    if not call.on("attach") and not call.on("interactive"):
        from boxship.cli.show.table import write

        query = {"checkpoint": call.text("checkpoint") or None, "checkpoint-dir": call.text("checkpoint-dir") or None}
        failed = []

        def begin(name: str) -> None:
            try:
                call.engine.send("POST", path(target(name, "start"), query)).read()
            except ApiError:
                failed.append(name)
                raise

        each(call, call.words, begin)
        if failed:
            write(f"Error: failed to start containers: {', '.join(failed)}\n", 2)
        return 1 if failed else 0
    if len(call.words) > 1:
        raise BoxshipError("you cannot start and attach multiple containers at once")
    found = call.engine.send("GET", target(call.words[0], "json")).json()
    tty, identity = bool(found["Config"]["Tty"]), found["Id"]
    stdin = call.on("interactive") and bool(found["Config"]["OpenStdin"])
    _need_terminal(call, tty=tty, stdin=stdin)
    proxy = not tty
    with _attach(call, identity, {"stdin": stdin, "stdout": True, "stderr": True}, tty=tty, proxy=proxy) as session:
        waiting = _start_waiting(call, identity, "removed" if found["HostConfig"].get("AutoRemove") else "next-exit")
        call.engine.send("POST", target(identity, "start")).read()
        if tty:
            session.resize()
        ended = session.run()
    if ended == stream.DETACHED:
        _warn(_JOINED)
        return 0
    return _exit_status(waiting)


def attach(call: Call) -> int:
    """`boxship attach`."""
    from boxship.cli.http import stream

    found = call.engine.send("GET", target(call.words[0], "json")).json()
    state = found["State"]
    if not state["Running"]:
        raise BoxshipError("You cannot attach to a stopped container, start it first")
    if state["Paused"]:
        raise BoxshipError("You cannot attach to a paused container, unpause it first")
    if state["Restarting"]:
        raise BoxshipError("You cannot attach to a restarting container, wait until it is running")
    tty = bool(found["Config"]["Tty"])
    stdin = not call.on("no-stdin") and bool(found["Config"]["OpenStdin"])
    _need_terminal(call, tty=tty, stdin=stdin)
    proxy = (call.on("sig-proxy") or "sig-proxy" not in call.parsed.given) and not tty
    waiting = _start_waiting(call, found["Id"], "not-running")
    with _attach(call, found["Id"], {"stdin": stdin, "stdout": True, "stderr": True}, tty=tty, proxy=proxy) as session:
        if tty:
            session.resize()
        ended = session.run()
    if ended == stream.DETACHED:
        _warn(_JOINED)
        return 0
    return _exit_status(waiting)


# --- exec ------------------------------------------------------------------------------------------------------------


def execute(call: Call) -> int:
    """`boxship exec`."""
    from boxship.cli.http import stream
    from boxship.cli.http.where import another
    from boxship.cli.verbs.create import environment

    tty, stdin, detach = call.on("tty"), call.on("interactive"), call.on("detach")
    keys = stream.keys(call.text("detach-keys"))
    if not detach:
        _need_terminal(call, tty=tty, stdin=stdin)
    rows, columns = stream.window() if tty else (0, 0)
    body: dict[str, Any] = {
        "User": call.text("user"),
        "Privileged": call.on("privileged"),
        "Tty": tty,
        "AttachStdin": stdin and not detach,
        "AttachStdout": not detach,
        "AttachStderr": not detach,
        "DetachKeys": call.text("detach-keys"),
        "Env": environment(call) or None,
        "WorkingDir": call.text("workdir"),
        "Cmd": call.words[1:],
    }
    if rows and columns:
        body["ConsoleSize"] = [rows, columns]
    identity = call.engine.send("POST", target(call.words[0], "exec"), body).json()["Id"]
    if detach:
        call.engine.send("POST", f"/exec/{identity}/start", {"Detach": True, "Tty": tty}).read()
        return 0
    connection = another(call.engine)
    start = {"Detach": False, "Tty": tty, **({"ConsoleSize": [rows, columns]} if rows and columns else {})}
    connection.send("POST", f"/exec/{identity}/start", start, upgrade=True)
    sock, early = connection.take()

    def resize(height: int, width: int) -> None:
        try:
            call.engine.send("POST", path(f"/exec/{identity}/resize", {"h": height, "w": width})).read()
        except ApiError:
            pass  # it has ended

    with stream.Session(sock, early, terminal=tty, stdin=stdin, detach=keys, on_resize=resize) as session:
        if tty:
            session.resize()
        ended = session.run()
    if ended == stream.DETACHED:
        _warn(_JOINED)
        return 0
    found = call.engine.send("GET", f"/exec/{identity}/json").json()
    return int(found.get("ExitCode") or 0)


def _flags_of_run() -> str:
    from boxship.cli.verbs.create import FLAGS

    return FLAGS


class _WithCreateFlags(Command):
    """A command whose many flags are put together only when it is called."""

    __slots__ = ("more",)
    more: str

    def __getattribute__(self, name: str) -> Any:
        if name == "flags":
            return _flags_of_run() + object.__getattribute__(self, "more")
        return object.__getattribute__(self, name)


def _with_create_flags(command: Command, more: str) -> Command:
    full = _WithCreateFlags(command.usage, command.about, command.function, least=1, most=MANY, interspersed=False)
    full.more = more
    return full


_DETACH = "detach-keys string | Override the key sequence for detaching a container\n"
COMMANDS = {
    "attach": Command(
        " [OPTIONS] CONTAINER",
        "Attach local standard input, output, and error streams to a running container",
        attach,
        _DETACH
        + """
no-stdin | Do not attach STDIN
sig-proxy | Proxy all received signals to the process (default true)
""",
        least=1,
        most=1,
    ),
    "create": _with_create_flags(Command(" [OPTIONS] IMAGE [COMMAND] [ARG...]", "Create a new container", create), ""),
    "exec": Command(
        " [OPTIONS] CONTAINER COMMAND [ARG...]",
        "Execute a command in a running container",
        execute,
        _DETACH
        + """
d,detach | Detached mode: run command in the background
e,env list | Set environment variables
env-file list | Read in a file of environment variables
i,interactive | Keep STDIN open even if not attached
privileged | Give extended privileges to the command
t,tty | Allocate a pseudo-TTY
u,user string | Username or UID (format: "<name|uid>[:<group|gid>]")
w,workdir string | Working directory inside the container
""",
        least=2,
        most=MANY,
        interspersed=False,
    ),
    "run": _with_create_flags(
        Command(
            " [OPTIONS] IMAGE [COMMAND] [ARG...]",
            """Create and run a new container from an image

IMAGE may also be:
  host          this machine's own programs under a copy-on-write layer, without its users' and system's private files; it has
                no network but loopback unless a flag asks for one
and, needing no daemon:
  DIRECTORY     a directory with a root file system (its path begins with / or .); it stays as it is
  BUNDLE        such a directory with an OCI config.json, whose settings the options change""",
            run,
        ),
        _DETACH
        + """
d,detach | Run container in background and print container ID
no-daemon | Run without the daemon: IMAGE is host, a directory or a bundle
sig-proxy | Proxy received signals to the process (default true)
""",
    ),
    "start": Command(
        " [OPTIONS] CONTAINER [CONTAINER...]",
        "Start one or more stopped containers",
        start,
        _DETACH
        + """
a,attach | Attach STDOUT/STDERR and forward signals
checkpoint string | Restore from this checkpoint
checkpoint-dir string | Use a custom checkpoint storage directory
i,interactive | Attach container's STDIN
""",
        least=1,
        most=MANY,
    ),
}
