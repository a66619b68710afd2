"""The part of the image `host` that is copied, kept from run to run until the machine's own files change.

Runs in: the boxship command.

    HOME/                    beside the scratch folders
      current                link to the template in use
      NAME/                  never changed once it has its name
        etc/, var/           as `boxship.images.builtin.machine.build` makes them; lower layers of running containers
        sources.json         what it was made of: {"of": digest of the rules, "files": [[path, identity …], …]}

Lock order: HOME shared while a template is chosen and until a scratch folder refers to it, and while an unfinished one is made
and locked; HOME exclusive, without waiting, for removing templates that none refers to. `current` is replaced by rename.
"""

from __future__ import annotations

import fcntl
import os

from boxship.cli.scratch import prepare, remove_tree
from boxship.images.builtin import machine as host
from boxship.kit.files import is_locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def _rules() -> str:
    """What changes when the rules of what is let in change."""
    from boxship import __version__

    return repr((__version__, host.FILES, host.TREES))


class Template:
    """A template, held so that it is not removed until `release`."""

    __slots__ = ("_lock", "path")

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Let go: a scratch folder refers to it now, or nothing ever will."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def hold(home: str, scratch_base: str, machine: str = "/") -> Template:
    """The template for the machine as it is now: the one that is there, or a new one. Raises OSError."""
    prepare(home)
    made = 0
    while True:
        lock = _locked(home)
        name = _current(home)
        # On a machine whose files never stand still, what was just made is as good as it gets.
        if name and (made > 2 or _fresh(f"{home}/{name}")):
            return Template(f"{home}/{name}", lock)
        os.close(lock)
        _make(home, machine)
        made += 1
        _collect(home, scratch_base)


def _locked(home: str) -> int:
    lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _current(home: str) -> str:
    try:
        name = os.readlink(f"{home}/current")
    except OSError:
        return ""
    return "" if "/" in name else name


def _fresh(path: str) -> bool:
    from boxship.kit.errors import BoxshipError
    from boxship.kit.files import read_all
    from boxship.oci import text

    try:
        record = text.loads(read_all(f"{path}/sources.json"), "sources.json")
    except (OSError, BoxshipError):
        return False
    if not isinstance(record, dict) or record.get("of") != _rules():
        return False
    files = record.get("files")
    return isinstance(files, list) and all(host.identity(entry[0]) == entry[1] for entry in files)


def _make(home: str, machine: str) -> None:
    """Make a new template and let `current` mean it."""
    from boxship.oci import text

    name = os.urandom(6).hex()
    unfinished = f"{home}/.{name}"
    lock = _locked(home)
    try:
        os.mkdir(unfinished, 0o755)
        mine = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(mine, fcntl.LOCK_EX)
    finally:
        os.close(lock)
    try:
        record = {"of": _rules(), "files": [list(source) for source in host.build(unfinished, machine)]}
        with open(f"{unfinished}/sources.json", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text.dumps(record))
        os.rename(unfinished, f"{home}/{name}")
        os.symlink(name, unfinished)
        os.rename(unfinished, f"{home}/current")
    finally:
        if os.path.islink(unfinished):
            os.unlink(unfinished)
        elif os.path.isdir(unfinished):
            remove_tree(unfinished)
        os.close(mine)


def _collect(home: str, scratch_base: str) -> None:
    """Remove templates that no container uses, and what killed processes left; when another is busy here, it can wait."""
    lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        used = {_current(home), "current"}
        used.update(os.path.basename(path) for path in _in_use(scratch_base) if os.path.dirname(path) == home)
        for name in os.listdir(home):
            if name not in used and not _being_made(f"{home}/{name}"):
                remove_tree(f"{home}/{name}")
    except OSError:
        pass  # the next one tries again
    finally:
        os.close(lock)


def _being_made(path: str) -> bool:
    return os.path.basename(path).startswith(".") and is_locked(path)


def _in_use(scratch_base: str) -> Iterable[str]:
    for run in os.listdir(scratch_base):
        folder = f"{scratch_base}/{run}/lower"
        try:
            links = os.listdir(folder)
        except OSError:
            continue
        for link in links:
            try:
                yield os.path.dirname(os.readlink(f"{folder}/{link}"))
            except OSError:
                continue
