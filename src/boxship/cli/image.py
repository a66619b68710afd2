"""What `boxship run` is given as IMAGE: the machine itself, a root file system in a directory, or an OCI bundle.

Runs in: the boxship command, before the container is made.
Spec: runtime-spec 1.3.0, bundle.md.
"""

from __future__ import annotations

import os

from boxship.cli import spec as specs
from boxship.cli.layers import Kernel, Layers
from boxship.kit.errors import InvalidArgument, NotFound, from_os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.idmap import Maps
    from boxship.cli.scratch import Scratch

HOST, DIRECTORY, BUNDLE = "host", "directory", "bundle"
_KERNELS = ("proc", "sys", "dev")
_CONFIG_LIMIT = 64 << 20
_PASSWD_LIMIT = 16 << 20

_LOCALHOST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def kind_of(name: str, cwd: str) -> tuple[str, str]:
    """(kind, absolute path) of what IMAGE names. Raises NotFound, InvalidArgument."""
    if name == "host":
        return HOST, "/"
    if not name:
        raise InvalidArgument("invalid reference format")
    path = os.path.normpath(os.path.join(cwd, name))
    if not os.path.isdir(path):
        raise NotFound(
            f"unable to find image '{name}'", 'an image is "host", a directory with a root file system, or an OCI bundle'
        )
    return (BUNDLE if os.path.isfile(f"{path}/config.json") else DIRECTORY), path


def hostname_files(hostname: str, *, own_network: bool, machine: str = "/") -> dict[str, bytes]:
    """The generated files of /etc. In the caller's network the caller's names are the right ones."""
    machine = machine.rstrip("/")
    hosts, resolv = _LOCALHOST.encode(), b"# no network\n"
    if not own_network:
        hosts = _read(f"{machine}/etc/hosts") or hosts
        resolv = _read(f"{machine}/etc/resolv.conf")
    if not hosts.endswith(b"\n"):
        hosts += b"\n"
    return {
        "/etc/hosts": hosts + f"127.0.1.1\t{hostname}\n".encode(), "/etc/hostname": f"{hostname}\n".encode(),
        "/etc/resolv.conf": resolv,
    }


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(fd, 1 << 20)
    except OSError:
        return b""
    finally:
        os.close(fd)


def host(scratch: Scratch, kernel: Kernel, maps: Maps | None, hostname: str, *, own_network: bool) -> dict[str, Any]:
    """The configuration of a container of this machine's own files. Fills the scratch folder."""
    from boxship.cli import template
    from boxship.cli.host import assemble

    config = specs.default(hostname, maps, own_network=own_network)
    # The machine's set-user-id programs are made for its users, not for whoever can start a container.
    layers = Layers(scratch, kernel, ["nosuid", "nodev"])
    config["process"]["noNewPrivileges"] = True
    base = os.path.dirname(scratch.path)
    held = template.hold(os.path.join(os.path.dirname(base), "host"), base)
    try:
        config["mounts"] = assemble(layers, held.path) + config["mounts"]
    finally:
        held.release()
    for path, data in hostname_files(hostname, own_network=own_network).items():
        layers.write(path, data)
    config["process"]["args"] = ["sh"]
    return config


def directory(
    path: str, scratch: Scratch, kernel: Kernel, maps: Maps | None, hostname: str, *, own_network: bool
) -> dict[str, Any]:
    """The configuration of a container whose root is the directory, which stays as it is."""
    config = specs.default(hostname, maps, own_network=own_network)
    layers = Layers(scratch, kernel, [])
    try:
        with os.scandir(path) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for child in children:
            if child.is_symlink():
                os.symlink(os.readlink(child.path), layers.inside(f"/{child.name}"))
            elif child.name in _KERNELS:
                continue
            elif child.is_dir():
                layers.skeleton(f"/{child.name}")
                layers.folder(child.path, f"/{child.name}")
            elif child.is_file():
                _copy_file(child.path, layers.inside(f"/{child.name}"))
    except OSError as error:
        raise from_os_error(error, "reading the root file system") from None
    if not os.path.lexists(layers.inside("/etc")):
        layers.skeleton("/etc")
    for name, data in hostname_files(hostname, own_network=own_network).items():
        if "/etc" in layers.uppers or not os.path.islink(layers.inside("/etc")):
            layers.write(name, data)
    config["mounts"] = layers.mounts + config["mounts"]
    return config


def _copy_file(source: str, target: str) -> None:
    import shutil

    shutil.copy2(source, target, follow_symlinks=False)


def bundle(path: str, maps: Maps | None) -> dict[str, Any]:
    """The bundle's own configuration; `maps` are for a caller who is not root, and used when it has no user namespace."""
    from boxship.kit.files import read_all
    from boxship.oci import text

    name = f"{path}/config.json"
    try:
        config = text.loads(read_all(name, _CONFIG_LIMIT), name)
    except OSError as error:
        raise from_os_error(error, "reading") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"{name}: an object is expected")
    process = config.get("process")
    if not isinstance(process, dict):
        raise InvalidArgument(f"{name}: process: an object is expected")
    specs.add_user_namespace(config, maps)
    return config


def reader(kind: str, path: str, config: dict[str, Any]) -> Reader:
    """What reads files of the container's root before there is a container."""
    if kind == BUNDLE:
        root = config.get("root")
        path = os.path.join(path, str(root.get("path", "rootfs")) if isinstance(root, dict) else "rootfs")
    return Reader(path)


class Reader:
    """Reads files below a root as the container would find them: no link leads out of it."""

    __slots__ = ("root",)

    def __init__(self, root: str) -> None:
        self.root = root

    def __call__(self, path: str) -> str:
        """The text of a file; "" when there is none."""
        from boxship.abi import mount as m
        from boxship.linux import mounts

        root = os.open(self.root, m.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = mounts.openat2(root, path, os.O_RDONLY | os.O_NONBLOCK, resolve=m.RESOLVE_IN_ROOT | m.RESOLVE_NO_MAGICLINKS)
        except OSError:
            return ""
        finally:
            os.close(root)
        try:
            return os.read(fd, _PASSWD_LIMIT).decode("utf-8", "surrogateescape")
        except OSError:
            return ""
        finally:
            os.close(fd)
