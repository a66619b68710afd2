"""The namespaces in which the daemon of an ordinary user is root: made by the first daemon, kept for those that follow.

Runs in: the daemon, before anything else: setns(2) into a user namespace wants a process with one thread.
Spec: user_namespaces(7), mount_namespaces(7), subuid(5).

    user namespace     0 is the user; 1 and up are the user's ranges of /etc/subuid and /etc/subgid, by newuidmap(1); without
                       them there is 0 alone
    mount namespace    mounts of the machine come in, those made here do not go out

A holder, which does nothing but live, keeps both when no daemon runs: a later daemon, and the shims that it finds, have to see
the same mounts. Its pid is in RUN/boxship/namespaces (RUN: `boxship.kit.user.run_folder`); it ends with the user's session, or by
kill(1).
"""

from __future__ import annotations

import os
import stat

from boxship.abi.namespace import CLONE_NEWNS, CLONE_NEWUSER
from boxship.kit.errors import BoxshipError, PermissionDenied, Unsupported, from_os_error
from boxship.kit.files import read_all, write_atomic
from boxship.kit.user import UID_VARIABLE, run_folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

_HOLDER = ("sleep", "infinity")


def enter(environ: MutableMapping[str, str]) -> None:
    """Be root of the user's namespaces from now on. Does nothing for root.

    Raises Unsupported where there are no user namespaces for users, PermissionDenied, BoxshipError.
    """
    uid = os.geteuid()
    if uid == 0:
        return
    folder = os.path.join(_own_folder(run_folder(environ), uid), "boxship")
    os.makedirs(folder, 0o700, exist_ok=True)
    # Whatever runs below finds the same folder, also where the variable was not set.
    environ["XDG_RUNTIME_DIR"] = os.path.dirname(folder)
    environ[UID_VARIABLE] = str(uid)
    here = os.getcwd()
    _join(_holder(folder, uid, environ))
    try:
        os.chdir(here)
    except OSError:
        os.chdir("/")


def _own_folder(path: str, uid: int) -> str:
    """Make the folder if it is not there. Raises PermissionDenied when it is another's: in /tmp anybody may have made it."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise from_os_error(error, path) from None
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise PermissionDenied(f"{path} is not a folder of this user alone", "set XDG_RUNTIME_DIR to one that is")
    return path


def _holder(folder: str, uid: int, environ: Mapping[str, str]) -> int:
    """The pid of the process that keeps the namespaces; makes it when there is none. Two daemons at once make one."""
    import fcntl

    note = os.path.join(folder, "namespaces")
    lock = os.open(note + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pid = _living(note, uid)
        if pid == 0:
            from boxship.linux.process import start_time

            pid = _make(uid, environ)
            write_atomic(note, f"{pid} {start_time(pid)}\n".encode())
        return pid
    finally:
        os.close(lock)


def _living(note: str, uid: int) -> int:
    """The holder that the file names, 0 when it is gone."""
    from boxship.linux.process import is_alive

    try:
        pid, started = (int(word) for word in read_all(note).split())
    except (FileNotFoundError, ValueError):
        return 0
    return pid if is_alive(pid, started) and os.stat(f"/proc/{pid}").st_uid == uid else 0


def _make(uid: int, environ: Mapping[str, str]) -> int:
    from boxship.linux.idmaps import rootless_mappings, subordinate_ranges, write_id_maps

    user = _name(uid)
    uids, gids = subordinate_ranges("/etc/subuid", user, uid), subordinate_ranges("/etc/subgid", user, uid)
    if not (uids and gids and all(_on_path(tool, environ) for tool in ("newuidmap", "newgidmap"))):
        uids, gids = [], []
    ready, mapped = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _be_holder(ready[1], mapped[0])
    os.close(ready[1])
    os.close(mapped[0])
    try:
        error = os.read(ready[0], 4)
        if error != bytes(4):
            os.waitpid(pid, 0)
            number = int.from_bytes(error, "little")
            why = os.strerror(number).lower()
            raise Unsupported(f"a user namespace for the daemon: {why}", "`boxship doctor` says what is missing")
        write_id_maps(pid, rootless_mappings(uid, uids), rootless_mappings(os.getegid(), gids), deny_setgroups=not gids)
        os.write(mapped[1], b"1")
        error = os.read(ready[0], 4)  # nothing: it is another program now
        if error:
            raise BoxshipError(f"the daemon's namespaces: {os.strerror(int.from_bytes(error, 'little')).lower()}")
    except BaseException:
        os.close(mapped[1])
        os.waitpid(pid, 0)
        raise
    os.close(ready[0])
    os.close(mapped[1])
    return pid


def _be_holder(ready: int, mapped: int) -> None:
    """In a fork: make the namespaces, say so or why not, and become a program that does nothing."""
    from boxship.abi import mount as m
    from boxship.linux import mounts
    from boxship.linux.probe import unshare

    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        os.write(ready, bytes(4))
        if os.read(mapped, 1) == b"1":
            mounts.mount("", "/", "", m.MS_REC | m.MS_SLAVE)
            os.setsid()
            os.chdir("/")
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.execvp(_HOLDER[0], _HOLDER)
    except OSError as error:
        os.write(ready, (error.errno or 1).to_bytes(4, "little"))
    finally:
        os._exit(1)


def _join(pid: int) -> None:
    from boxship.linux import process
    from boxship.linux.namespaces import setns

    try:
        holder = process.pidfd_open(pid)
        try:
            setns(holder, CLONE_NEWUSER | CLONE_NEWNS)
        finally:
            os.close(holder)
    except OSError as error:
        raise from_os_error(error, f"entering the namespaces of process {pid}") from None
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _on_path(program: str, environ: Mapping[str, str]) -> bool:
    folders = environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").split(":")
    return any(os.access(f"{folder or '.'}/{program}", os.X_OK) for folder in folders)
