"""Bundles: the folder that a shim finds its container in.

Runs in: the daemon.
Spec: containerd's runtime v2.

    STATE/io.containerd.runtime.v2.task/<namespace>/<id>/     0700, 0710 for a container with a user namespace
        config.json          the OCI configuration
        rootfs/              where the root file system is mounted
        work                 link to ROOT/io.containerd.runtime.v2.task/<namespace>/<id>
        bootstrap.json       where the shim listens, and how (also `address`, written by older shims)
        shim-binary-path     which program the shim is, for those that are programs of their own
        sandbox              the sandbox whose shim holds the container
        sandboxer            the controller whose sandbox this is, for the bundle of a sandbox
        log                  FIFO of the shim's log

A bundle that goes is renamed to a hidden name first, so that its id is free at once.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil

from boxship.abi.mount import MNT_DETACH, UMOUNT_NOFOLLOW
from boxship.api.containerd.call import check_identifier
from boxship.kit.errors import AlreadyExists
from boxship.linux.mounts import umount

FOLDER = "io.containerd.runtime.v2.task"
_serial = itertools.count()


class Bundle:
    """A bundle on disk."""

    __slots__ = ("id", "namespace", "path")

    def __init__(self, state: str, namespace: str, id: str) -> None:  # noqa: A002 - the standard's word
        self.namespace = namespace
        self.id = id
        self.path = os.path.join(state, FOLDER, namespace, id)

    def file(self, name: str) -> str:
        """The path of a file in it."""
        return os.path.join(self.path, name)

    def delete(self) -> None:
        """Unmount the root file system and remove the bundle and its work folder. Idempotent. Raises OSError."""
        hidden = self.hide()
        if hidden:
            remove_hidden(hidden)

    def hide(self) -> list[str]:
        """Unmount, and take the names away; returns the folders that are left to be removed. Raises OSError."""
        unmount_all(self.file("rootfs"))
        try:
            work = os.readlink(self.file("work"))
        except OSError:
            work = ""
        return [hidden for path in (self.path, work) if path and (hidden := _hide(path))]


def create(root: str, state: str, namespace: str, id: str, config: bytes | None) -> Bundle:  # noqa: A002 - the standard's word
    """Make a bundle of `config` (JSON). Raises AlreadyExists, InvalidArgument, OSError, and leaves nothing."""
    check_identifier(id)
    bundle = Bundle(state, namespace, id)
    work = os.path.join(root, FOLDER, namespace, id)
    # Those above are passable for the root user of a user namespace.
    os.makedirs(os.path.dirname(bundle.path), 0o711, exist_ok=True)
    os.makedirs(os.path.dirname(work), 0o711, exist_ok=True)
    try:
        os.mkdir(bundle.path, 0o700)
    except FileExistsError:
        raise AlreadyExists(f"task {id}: already exists") from None
    try:
        group = _group_of_root(config) if config else 0
        if group:
            os.chown(bundle.path, -1, group)
            os.chmod(bundle.path, 0o710)
        os.mkdir(bundle.file("rootfs"), 0o711)
        shutil.rmtree(work, ignore_errors=True)
        os.mkdir(work, 0o711)
        os.symlink(work, bundle.file("work"))
        if config:
            with open(bundle.file("config.json"), "wb") as file:
                file.write(config)
    except BaseException:
        bundle.delete()
        raise
    return bundle


def _group_of_root(config: bytes) -> int:
    """The group outside that is 0 inside, 0 without a mapping."""
    if b'"gidMappings"' not in config:
        return 0
    try:
        mappings = (json.loads(config).get("linux") or {}).get("gidMappings") or []
        return next((int(each.get("hostID", 0)) for each in mappings if not each.get("containerID")), 0)
    except (ValueError, AttributeError, TypeError):
        return 0  # the runtime says what is wrong with it


def unmount_all(path: str) -> None:
    """Detach every mount on `path`, and with each those below it. Raises OSError except when it is no mount or not there."""
    for _ in range(100):
        try:
            umount(path, MNT_DETACH | UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (22, 2):  # EINVAL: not a mount point; ENOENT
                return
            raise


def _hide(path: str) -> str | None:
    parent, name = os.path.split(path)
    hidden = os.path.join(parent, f".{name}.{os.getpid()}.{next(_serial)}")
    try:
        os.rename(path, hidden)
    except FileNotFoundError:
        return None
    return hidden


def remove_hidden(paths: list[str]) -> None:
    """Remove what `hide` left. Raises OSError."""
    for path in paths:
        while os.path.lexists(path):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                continue  # `names` removes it too


def names(state: str) -> list[tuple[str, str]]:
    """(namespace, id) of the bundles there are; removes half-removed ones on the way. Raises OSError."""
    found = []
    top = os.path.join(state, FOLDER)
    for namespace in _entries(top):
        for name in _entries(os.path.join(top, namespace), clean=True):
            found.append((namespace, name))
    return found


def clean_work(root: str, keep: set[tuple[str, str]]) -> None:
    """Remove work folders that no task has (the state folder is gone after a reboot, the work folders are not)."""
    top = os.path.join(root, FOLDER)
    for namespace in _entries(top):
        for name in _entries(os.path.join(top, namespace), clean=True):
            if (namespace, name) not in keep:
                shutil.rmtree(os.path.join(top, namespace, name), ignore_errors=True)


def _entries(path: str, clean: bool = False) -> list[str]:
    try:
        entries = sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    if clean:
        for entry in entries:
            if entry.startswith("."):
                unmount_all(os.path.join(path, entry, "rootfs"))
                shutil.rmtree(os.path.join(path, entry), ignore_errors=True)
    return [entry for entry in entries if not entry.startswith(".") and os.path.isdir(os.path.join(path, entry))]
