"""Volumes of the driver `local`, and the mounts that a container was asked to have.

Runs in: the daemon.
Spec: Docker Engine API (Volume, Mount, MountPoint); `--volume` and `--mount` of docker run.

    ROOT/engine/volumes/NAME/_data

A volume with options is a file system of its own: it is mounted at its _data while a container that has it runs.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import shutil
import socket
import stat
from typing import Any

from boxship.abi import mount as m
from boxship.engine import times
from boxship.engine.events import Events
from boxship.engine.store import Store
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound, Unsupported, from_os_error
from boxship.linux import mounts as linux
from boxship.linux.roots import Root

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_PROPAGATIONS = frozenset(("private", "rprivate", "shared", "rshared", "slave", "rslave"))
_MODES = frozenset(("ro", "rw", "z", "Z", "nocopy", "cached", "delegated", "consistent", *_PROPAGATIONS))


class Volumes:
    """All volumes."""

    def __init__(self, store: Store, directory: str, events: Events) -> None:
        self._store = store
        self._events = events
        self._directory = directory
        os.makedirs(directory, mode=0o711, exist_ok=True)
        self._records = {record["Name"]: record for record in store.volumes()}
        for name in os.listdir(directory):
            if name.startswith(".removed-"):
                self._sweep(f"{directory}/{name}")

    def all(self) -> list[dict[str, Any]]:
        """As the API shows them."""
        return [self.shown(record) for record in self._records.values()]

    def shown(self, record: dict[str, Any]) -> dict[str, Any]:
        """One volume as the API shows it."""
        return {key: value for key, value in record.items() if key != "Anonymous"} | {"Mountpoint": self.path(record["Name"])}

    def get(self, name: str) -> dict[str, Any]:
        """A volume's record. Raises NotFound."""
        if name not in self._records:
            raise NotFound(f"get {name}: no such volume")
        return self._records[name]

    def path(self, name: str) -> str:
        """Where its files are on the host; those of a file system of its own while it is mounted."""
        return f"{self._directory}/{name}/_data"

    async def mount(self, name: str) -> None:
        """Mount a volume that is a file system of its own, if it is not yet. Raises NotFound, BoxshipError."""
        options = self.get(name).get("Options") or {}
        if not options.get("device"):
            return
        path = self.path(name)
        words = [word for word in options.get("o", "").split(",") if word]

        def work() -> None:
            if path in linux.mount_points():  # os.path.ismount knows no bind mounts
                return
            try:
                linux.attach(options["type"], options["device"], path, [_addressed(word) for word in words])
            except OSError as error:
                raise BoxshipError(
                    f"error while mounting volume '{path}': failed to mount local volume: mount {options['device']}:{path}, "
                    f"data: {options.get('o', '')}: {(error.strerror or str(error)).lower()}") from None

        await asyncio.get_running_loop().run_in_executor(None, work)

    def release(self, name: str) -> None:
        """Unmount what `mount` mounted, in this daemon's time or a former one's: no container that has it runs."""
        record = self._records.get(name)
        if record and (record.get("Options") or {}).get("device"):
            unmount(self.path(name))

    def create(
        self, name: str = "", driver: str = "local", options: dict[str, str] | None = None, labels: dict[str, str] | None = None,
        *, anonymous: bool = False,
    ) -> dict[str, Any]:
        """Make a volume; the one that is there when it has the name. Raises InvalidArgument, FailedPrecondition, NotFound."""
        if driver not in ("", "local"):
            raise NotFound(f'create {name or "anonymous"}: error looking up volume plugin {driver}: plugin "{driver}" not found')
        name = name or secrets.token_hex(32)
        if not _NAME.match(name):
            raise InvalidArgument(
                f'create {name}: "{name}" includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]"'
                " are allowed. If you intended to pass a host directory, use absolute path")
        options = options or {}
        for key in options:
            if key not in ("type", "o", "device", "size"):
                raise InvalidArgument(f'create {name}: invalid option: "{key}"')
        if "size" in options:
            raise InvalidArgument(f"create {name}: quota size requested but no quota support")
        for key, needed in (("device", ("type",)), ("type", ("device",)), ("o", ("device", "type"))):
            for other in needed if key in options else ():
                if not options.get(other):
                    raise InvalidArgument(f'create {name}: missing required option: "{other}"')
        if (found := self._records.get(name)) is not None:
            if options and options != (found["Options"] or {}):
                raise FailedPrecondition(f"create {name}: volume with this name exists with other options")
            return found
        record = {
            "CreatedAt": times.now().partition(".")[0].rstrip("Z") + "Z", "Driver": "local",
            "Labels": labels if not anonymous else
            {"com.docker.volume.anonymous": ""}, "Mountpoint": "", "Name": name, "Options": options or None, "Scope": "local",
            "Anonymous": anonymous,
        }
        try:
            os.makedirs(f"{self._directory}/{name}/_data", mode=0o755, exist_ok=True)
            os.chmod(f"{self._directory}/{name}", 0o701)
        except OSError as error:
            raise from_os_error(error, f"create {name}") from None
        self._store.put_volume(name, record)
        self._records[name] = record
        self._events.publish("volume", "create", name, {"driver": "local"})
        return record

    def remove(self, name: str) -> None:
        """Remove a volume and its files, which nobody uses any more. Raises NotFound."""
        self.get(name)
        self.release(name)
        del self._records[name]
        self._store.delete_volume(name)
        self._events.publish("volume", "destroy", name, {"driver": "local"})
        # A new volume may take the name at once: the files are put aside, and removed while nobody waits.
        aside = f"{self._directory}/.removed-{secrets.token_hex(8)}"
        try:
            os.rename(f"{self._directory}/{name}", aside)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, f"remove {name}") from None
        self._sweep(aside)

    @staticmethod
    def _sweep(folder: str) -> None:
        asyncio.get_running_loop().run_in_executor(None, lambda: shutil.rmtree(folder, ignore_errors=True))


def unmount(path: str) -> None:
    """Unmount what may be mounted at a path. Raises OSError."""
    try:
        linux.umount(path, m.MNT_DETACH | m.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def _addressed(word: str) -> str:
    """An option `addr=NAME` with the name's address: the kernel resolves none. Raises BoxshipError."""
    key, _, name = word.partition("=")
    if key != "addr" or not name:
        return word
    try:
        return f"addr={socket.getaddrinfo(name, None)[0][4][0]}"
    except OSError as error:
        raise BoxshipError(f"error resolving passed in network volume address: lookup {name}: {error.strerror}") from None


def size_of(path: str) -> int:
    """Bytes of the files below a folder."""
    total = 0
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue
    return total


# what a container is asked to mount


def _point(kind: str, destination: str, source: str = "", *, name: str = "", mode: str = "", writable: bool = True,
           propagation: str = "", **more: Any) -> dict[str, Any]:
    point: dict[str, Any] = {"Type": kind}
    if name:
        point["Name"] = name
    point |= {"Source": source, "Destination": destination}
    if kind == "volume":
        point["Driver"] = "local"
    return point | {"Mode": mode, "RW": writable, "Propagation": propagation} | {f"_{key}": value for key, value in more.items()}


def parse_bind(text: str) -> dict[str, Any]:
    """`[SOURCE:]DESTINATION[:MODE]` as a mount point; a volume's Source is found later. Raises InvalidArgument."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts[:2]):
        raise InvalidArgument(f"invalid volume specification: '{text}'")
    if len(parts) == 1:
        source, destination, mode = "", parts[0], ""
    elif len(parts) == 2 and parts[1] and not parts[1].startswith("/") and set(parts[1].split(",")) <= _MODES:
        source, destination, mode = "", parts[0], parts[1]
    else:
        source, destination, mode = parts[0], parts[1], parts[2] if len(parts) == 3 else ""
    if not destination.startswith("/"):
        raise InvalidArgument(f"invalid volume specification: '{text}': invalid mount config: mount path must be absolute")
    destination = os.path.normpath("/" + destination.lstrip("/"))
    if destination == "/":
        raise InvalidArgument(f"invalid volume specification: '{text}': invalid mount config: destination can't be '/'")
    words = mode.split(",") if mode else []
    if set(words) - _MODES or len(words) != len(set(words)) or {"ro", "rw"} <= set(words):
        raise InvalidArgument(f"invalid mode: {mode}")
    propagation = next((word for word in words if word in _PROPAGATIONS), "")
    writable = "ro" not in words
    if source.startswith("/"):
        return _point("bind", destination, os.path.normpath(source), mode=mode, writable=writable,
                      propagation=propagation or "rprivate", create=True)
    if source and not _NAME.match(source):
        raise InvalidArgument(
            f'create {source}: "{source}" includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]"'
            " are allowed. If you intended to pass a host directory, use absolute path")
    return _point("volume", destination, name=source, mode=mode or "z", writable=writable, copy="nocopy" not in words)


def parse_mount(mount: dict[str, Any]) -> dict[str, Any]:
    """One of HostConfig.Mounts as a mount point. Raises InvalidArgument, Unsupported."""
    kind = str(mount.get("Type") or "")
    source, target = str(mount.get("Source") or ""), str(mount.get("Target") or "")
    writable = not mount.get("ReadOnly")
    if not target:
        raise InvalidArgument(f'invalid mount config for type "{kind}": field Target must not be empty')
    if not target.startswith("/"):
        raise InvalidArgument(
            f"invalid mount config for type \"{kind}\": invalid mount path: '{target}' mount path must be absolute")
    destination = os.path.normpath("/" + target.lstrip("/"))
    if destination == "/":
        raise InvalidArgument(f'invalid mount config for type "{kind}": invalid specification: destination can\'t be \'/\'')
    if kind == "bind":
        options = mount.get("BindOptions") or {}
        create = bool(options.get("CreateMountpoint"))
        if not source:
            raise InvalidArgument('invalid mount config for type "bind": field Source must not be empty')
        if not source.startswith("/"):
            raise InvalidArgument(
                f"invalid mount config for type \"bind\": invalid mount path: '{source}' mount path must be absolute")
        if not create and not os.path.lexists(source):
            raise InvalidArgument(f'invalid mount config for type "bind": bind source path does not exist: {source}')
        propagation = str(options.get("Propagation") or "rprivate")
        if propagation not in _PROPAGATIONS:
            raise InvalidArgument(f'invalid mount config for type "bind": invalid propagation mode: {propagation}')
        return _point("bind", destination, os.path.normpath(source), writable=writable, propagation=propagation, create=create,
                      recursive=not options.get("NonRecursive"), recursive_ro=not options.get("ReadOnlyNonRecursive"))
    if kind == "volume":
        options = mount.get("VolumeOptions") or {}
        return _point("volume", destination, name=source, mode="z", writable=writable, copy=not options.get("NoCopy"),
                      labels=options.get("Labels"), driver=(options.get("DriverConfig") or {}).get("Name") or "local",
                      options=(options.get("DriverConfig") or {}).get("Options"), subpath=str(options.get("Subpath") or ""))
    if kind == "tmpfs":
        if source:
            raise InvalidArgument('invalid mount config for type "tmpfs": field Source must not be specified')
        options = mount.get("TmpfsOptions") or {}
        words = []
        if options.get("SizeBytes"):
            words.append(f"size={options['SizeBytes']}")
        if options.get("Mode"):
            words.append(f"mode={options['Mode']:o}")
        return _point("tmpfs", destination, writable=writable, tmpfs=words)
    if kind in ("image", "npipe", "cluster"):
        raise Unsupported(f"mounts of type {kind}")
    raise InvalidArgument(f'invalid mount config for type "{kind}": mount type unknown')


def populate(source: Root, destination: str, target: str) -> None:
    """Fill a volume that is empty with what the image has at `destination`, owners and modes included."""
    try:
        fd = source.open_folder(destination)
    except OSError:
        return
    try:
        if os.listdir(target):
            return
        info = os.fstat(fd)
        _copy_folder(fd, target)
        os.chown(target, info.st_uid, info.st_gid)
        os.chmod(target, stat.S_IMODE(info.st_mode))
    except OSError as error:
        raise from_os_error(error, f"copying {destination} into the volume") from None
    finally:
        os.close(fd)


def _copy_folder(source_fd: int, target: str) -> None:
    with os.scandir(source_fd) as entries:
        for entry in entries:
            path = f"{target}/{entry.name}"
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                os.symlink(os.readlink(entry.name, dir_fd=source_fd), path)
            elif stat.S_ISDIR(info.st_mode):
                os.mkdir(path, 0o700)
                inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source_fd)
                try:
                    _copy_folder(inner, path)
                finally:
                    os.close(inner)
            elif stat.S_ISREG(info.st_mode):
                reader = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source_fd)
                with os.fdopen(reader, "rb") as from_file, open(path, "xb") as to_file:
                    shutil.copyfileobj(from_file, to_file, 1 << 20)
            else:
                os.mknod(path, info.st_mode, info.st_rdev)
            os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)
            if not stat.S_ISLNK(info.st_mode):
                os.chmod(path, stat.S_IMODE(info.st_mode))
            for name in os.listxattr(f"/proc/self/fd/{source_fd}/{entry.name}", follow_symlinks=False):
                value = os.getxattr(f"/proc/self/fd/{source_fd}/{entry.name}", name, follow_symlinks=False)
                try:
                    os.setxattr(path, name, value, follow_symlinks=False)
                except OSError:
                    continue  # overlay's own, or a file system without them
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def as_spec(point: dict[str, Any], source: str) -> dict[str, Any]:
    """A mount point as the specification's mount; `source` is the directory on the host."""
    if point["Type"] == "tmpfs":
        return {
            "destination": point["Destination"], "type": "tmpfs", "source": "tmpfs",
            "options": ["noexec", "nosuid", "nodev", "rprivate", *([] if point["RW"] else ["ro"]), *point.get("_tmpfs", [])],
        }
    options = ["rbind" if point.get("_recursive", True) else "bind"]
    if not point["RW"]:
        # What is mounted below the source is read-only too, where the kernel can do that.
        options.append("rro" if point.get("_recursive_ro", True) and linux.kernel_version() >= (5, 12) else "ro")
    options.append(point["Propagation"] or "rprivate")
    return {"destination": point["Destination"], "type": "bind", "source": source, "options": options}


def shown_points(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mount points as answers have them, without what is the engine's own."""
    return [{key: value for key, value in point.items() if not key.startswith("_")} for point in points]
