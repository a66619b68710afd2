"""Which engine: DOCKER_HOST, docker's current context, or the daemon of this user, which is started when none runs.

Runs in: the boxship command; the daemon is its grandchild, in a session of its own.

Two commands at once start one daemon: whoever holds STATE/start.lock starts it, the other waits for the lock and then finds it.
"""

from __future__ import annotations

import os

from boxship.cli.http.client import Certificates, ConnectFailed, Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

IDLE_EXIT_S = 60
"""A daemon that was started for a command leaves after so long without clients and containers."""
_START_TIMEOUT_S = 30.0
_REFUSED, _NOT_THERE = 111, 2


def state_folder(environ: Mapping[str, str], uid: int) -> str:
    """Where the daemon of this user has its sockets: the default of `boxship daemon --state`."""
    if environ.get("BOXSHIP_STATE"):
        return os.path.abspath(environ["BOXSHIP_STATE"])
    if uid == 0:
        return "/run/boxship"
    return os.path.join(environ.get("XDG_RUNTIME_DIR") or f"/tmp/boxship-{uid}", "boxship")


def address(environ: Mapping[str, str]) -> tuple[str, bool]:
    """(address, whether it is the daemon of this user, which may be started)."""
    given = environ.get("BOXSHIP_HOST") or environ.get("DOCKER_HOST") or _of_context(environ)[0]
    if given:
        return given if "://" in given else f"tcp://{given}", False
    return f"unix://{state_folder(environ, os.geteuid())}/docker.sock", True


def _docker_folder(environ: Mapping[str, str]) -> str:
    return environ.get("DOCKER_CONFIG") or os.path.join(environ.get("HOME", "/"), ".docker")


def _of_context(environ: Mapping[str, str]) -> tuple[str, str]:
    """(address, folder with its certificates) of docker's current context; "" twice for the default one.

    Raises NotFound for a context that there is not, InvalidArgument for files that are damaged.
    """
    from boxship.kit.errors import NotFound
    from boxship.oci import text

    folder = _docker_folder(environ)
    name = environ.get("DOCKER_CONTEXT", "")
    if not name:
        try:
            with open(f"{folder}/config.json", encoding="utf-8") as file:
                document = text.loads(file.read(), f"{folder}/config.json")
        except OSError:
            return "", ""
        name = str(document.get("currentContext") or "") if isinstance(document, dict) else ""
    if name in ("", "default"):
        return "", ""
    from hashlib import sha256

    key = sha256(name.encode()).hexdigest()
    where = f"{folder}/contexts/meta/{key}/meta.json"
    try:
        with open(where, encoding="utf-8") as file:
            found: Any = text.loads(file.read(), where)
        return str(found["Endpoints"]["docker"]["Host"]), f"{folder}/contexts/tls/{key}/docker"
    except OSError:
        raise NotFound(f'context "{name}": context not found: open {where}: no such file or directory') from None
    except (KeyError, TypeError):
        return "", ""


def certificates(environ: Mapping[str, str]) -> Certificates | None:
    """With which TLS is spoken to a tcp:// address; None for none.

    DOCKER_TLS_VERIFY, DOCKER_TLS and DOCKER_CERT_PATH count as for docker; the files of a context's own count for it.
    """
    if environ.get("BOXSHIP_HOST") or environ.get("DOCKER_HOST"):
        if not environ.get("DOCKER_TLS_VERIFY") and not environ.get("DOCKER_TLS"):
            return None
        folder = environ.get("DOCKER_CERT_PATH") or _docker_folder(environ)
        return Certificates(folder, verify=bool(environ.get("DOCKER_TLS_VERIFY")))
    folder = _of_context(environ)[1]
    return Certificates(folder, verify=True) if folder and os.path.isdir(folder) else None


def daemon_is_possible(environ: Mapping[str, str]) -> bool:
    """Whether there is an engine at the address that the user gave, or this user can have a daemon of their own here."""
    where, own = address(environ)
    if not own or os.geteuid() != 0:
        return not own
    connection = Connection(where)
    try:
        connection.open()
        return True
    except ConnectFailed:
        pass
    finally:
        connection.close()
    from boxship.cli.scratch import carries

    folder = environ.get("BOXSHIP_ROOT") or "/var/lib/boxship"
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "/"
    return carries(folder)


def connect(environ: Mapping[str, str], *, start: bool = True) -> Connection:
    """A connection, opened. Starts the daemon if `start` and it is ours to start. Raises ConnectFailed."""
    where, own = address(environ)
    connection = Connection(where, None if where.startswith("unix:") else certificates(environ))
    try:
        connection.open()
    except ConnectFailed as error:
        if not own or not start or error.errno not in (_REFUSED, _NOT_THERE):
            raise
        start_daemon(environ, where.removeprefix("unix://"))
        connection.open()
    return connection


def another(connection: Connection) -> Connection:
    """A second connection to the same engine."""
    return Connection(connection.address, connection.certificates)


def start_daemon(environ: Mapping[str, str], sock: str) -> None:
    """Have a daemon that listens on the socket, one that another command starts at this moment included.

    Blocks until it answers, at most 30 s. Raises ConnectFailed with the end of the daemon's log.
    """
    import fcntl

    state = os.path.dirname(sock)
    os.makedirs(state, 0o711, exist_ok=True)
    lock = os.open(f"{state}/start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(sock):
            log = f"{state}/daemon.log"
            _wait_for(sock, _spawn(environ, state, log), log)
    finally:
        os.close(lock)


def _answers(sock: str) -> bool:
    connection = Connection(f"unix://{sock}")
    try:
        connection.open()
        return connection.send("GET", "/_ping").status == 200
    except ConnectFailed:
        return False
    finally:
        connection.close()


def _spawn(environ: Mapping[str, str], state: str, log: str) -> int:
    """Fork twice; returns the reading end of a pipe that closes when the daemon dies."""
    import sys

    arguments = [
        sys.executable,
        "-I",
        "-m",
        "boxship.daemon",
        "--state",
        state,
        "--idle-exit",
        environ.get("BOXSHIP_IDLE_EXIT", str(IDLE_EXIT_S)),
    ]
    if environ.get("BOXSHIP_ROOT"):
        arguments += ["--root", environ["BOXSHIP_ROOT"]]
    alive, held = os.pipe()
    child = os.fork()
    if child == 0:
        # Only what is safe between fork and exec: no other thread exists in this command.
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.set_inheritable(held, True)
            os.chdir("/")
            os.umask(0o022)
            os.execve(arguments[0], arguments, dict(environ))
        except OSError as error:
            os.write(2, f"{arguments[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)
    os.close(held)
    os.waitpid(child, 0)
    return alive


def _wait_for(sock: str, alive: int, log: str) -> None:
    import select
    import time

    poll = select.poll()
    poll.register(alive, select.POLLIN)
    until = time.monotonic() + _START_TIMEOUT_S
    try:
        while not _answers(sock):
            if poll.poll(20) or time.monotonic() > until:
                raise ConnectFailed(f"the daemon does not start: {_last_words(log)}")
    finally:
        os.close(alive)


def _last_words(log: str) -> str:
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = file.read().strip().splitlines()
    except OSError as error:
        return f"{log}: {error.strerror}"
    return lines[-1] if lines else f"nothing in {log}"
