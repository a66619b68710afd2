"""The image `host`: a container's root made of the machine's own programs, and nothing that is private to it.

Runs in: the boxship command, before the container is made.
Spec: hier(7), Filesystem Hierarchy Standard 3.0.

    /usr                  the machine's, below a copy-on-write layer; so are /bin, /lib … where they are no links into it
    /etc                  copies of the files named in `FILES` and `TREES`, layers over the folders named in `FOLDERS`
    /etc/{hosts,hostname,resolv.conf}   made for the container
    /root /home /tmp /run /var /opt /srv /mnt /media   fresh and empty
    /proc /sys /dev       the kernel's, as every container has them

It is a list of what is let in. A list of secrets to keep out would always lag behind the places that programs invent for them;
so a new entry below needs a reason why nobody ever keeps a secret there. What an administrator took from other users' eyes
(no read permission for all) is not copied even when its name is listed.
"""

from __future__ import annotations

import errno
import os
import stat

from boxship.cli.layers import Layers
from boxship.kit.files import write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

PROGRAMS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")

# Below /etc. `*` stands for anything within a name, at most once.
FILES = (
    # who and what: names of users, groups, services, protocols
    "passwd", "group", "nsswitch.conf", "host.conf", "gai.conf", "protocols", "services", "networks", "ethertypes", "rpc",
    "shells",
    # the dynamic linker
    "ld.so.cache", "ld.so.conf", "ld-musl-*.path",
    # which system this is
    "os-release", "lsb-release", "debian_version", "*-release", "system-release-cpe", "issue", "localtime", "timezone",
    # languages and terminals
    "locale.conf", "locale.alias", "default/locale", "inputrc", "bindresvport.blacklist",
    # kinds of files
    "mime.types", "magic", "magic.mime", "mailcap",
    # TLS: what is public of it
    "ssl/openssl.cnf", "ssl/cert.pem", "ssl/ca-bundle.pem", "ca-certificates.conf",
    # manual pages
    "manpath.config",
)
# Small folders below /etc, copied with all below.
TREES = (
    "ld.so.conf.d", "crypto-policies", "terminfo", "python3", "python3.*", "perl", "xml", "sgml", "groff", "vim", "gtk-*",
    "java-*", "ImageMagick-*",
)
# Folders below /etc with too much in them to copy.
FOLDERS = ("alternatives", "ssl/certs", "pki/tls/certs", "pki/ca-trust/extracted", "ca-certificates/extracted", "fonts")

_SECOND_FIELD = ("passwd", "group")
_FILE_LIMIT = 8 << 20
_TREE_LIMIT = 512

# (folder, mode) of the fresh parts.
_FRESH = (
    ("/etc", 0o755), ("/root", 0o700), ("/home", 0o755), ("/tmp", 0o1777), ("/run", 0o755), ("/run/lock", 0o1777),
    ("/opt", 0o755), ("/srv", 0o755), ("/mnt", 0o755), ("/media", 0o755), ("/proc", 0o755), ("/sys", 0o755), ("/dev", 0o755),
    ("/var", 0o755), ("/var/cache", 0o755), ("/var/lib", 0o755), ("/var/local", 0o755), ("/var/log", 0o755),
    ("/var/opt", 0o755), ("/var/spool", 0o755), ("/var/tmp", 0o1777),
)
_LINKS = (("/var/run", "/run"), ("/var/lock", "/run/lock"), ("/etc/mtab", "/proc/self/mounts"))


def assemble(layers: Layers, machine: str = "/") -> list[dict[str, Any]]:
    """Fill the skeleton and return the mounts. `machine` is the root of the machine that is shown."""
    machine = machine.rstrip("/")
    for path, mode in _FRESH:
        layers.skeleton(path, mode)
    for path, target in _LINKS:
        os.symlink(target, layers.inside(path))
    for name in PROGRAMS:
        source = f"{machine}/{name}"
        try:
            status = os.lstat(source)
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), layers.inside(f"/{name}"))
        elif stat.S_ISDIR(status.st_mode):
            layers.skeleton(f"/{name}")
            layers.folder(source, f"/{name}")
    # Configuration of what was built on the machine, so of the same kind as /etc; and nothing in it is let in.
    if os.path.isdir(f"{machine}/usr/local/etc") and not os.path.islink(f"{machine}/usr/local"):
        layers.mounts.append(
            {"destination": "/usr/local/etc", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=755"]}
        )
    _configuration(layers, machine)
    return layers.mounts


def _configuration(layers: Layers, machine: str) -> None:
    present = set(os.listdir(f"{machine}/etc"))
    for pattern in FILES:
        for name in _matches(pattern, present):
            _copy(f"{machine}/etc/{name}", layers.inside(f"/etc/{name}"), machine)
    for pattern in TREES:
        for name in _matches(pattern, present):
            _copy_tree(f"{machine}/etc/{name}", layers.inside(f"/etc/{name}"), machine)
    for name in FOLDERS:
        source = f"{machine}/etc/{name}"
        if name.partition("/")[0] in present and os.path.isdir(source):
            source = os.path.realpath(source)
            layers.skeleton(f"/etc/{name}")
            layers.folder(source, f"/etc/{name}")


def _matches(pattern: str, present: set[str]) -> Sequence[str]:
    first = pattern.partition("/")[0]
    if "*" not in pattern:
        return [pattern] if first in present else []
    before, _, after = pattern.partition("*")
    return sorted(
        name for name in present if len(name) > len(before) + len(after) and name.startswith(before) and name.endswith(after)
    )


def _copy(source: str, target: str, machine: str) -> None:
    """Copy a file, or a link that leads into /usr; leave out what is missing, private, or no regular file."""
    try:
        status = os.lstat(source)
        if stat.S_ISLNK(status.st_mode):
            to = os.readlink(source)
            if os.path.normpath(os.path.join(os.path.dirname(source[len(machine) :]), to)).startswith("/usr/"):
                _parent(target)
                os.symlink(to, target)
                return
        # Not to hang on a FIFO that somebody put there.
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileExistsError:
        return  # two patterns meant the same
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not status.st_mode & stat.S_IROTH or status.st_size > _FILE_LIMIT:
            return
        data = os.read(fd, _FILE_LIMIT)
    finally:
        os.close(fd)
    name = os.path.basename(source)
    if name in _SECOND_FIELD:
        data = _without_passwords(data)
    _parent(target)
    try:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return
    try:
        write_all(out, data)
        if status.st_mode & 0o111:
            os.fchmod(out, 0o755)
    finally:
        os.close(out)


def _parent(target: str) -> None:
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        os.makedirs(folder, 0o755)


def _without_passwords(data: bytes) -> bytes:
    """passwd and group with "x" as every password: old machines still keep hashes there."""
    lines = []
    for line in data.split(b"\n"):
        fields = line.split(b":")
        if len(fields) > 3:
            fields[1] = b"x"
        lines.append(b":".join(fields))
    return b"\n".join(lines)


def _copy_tree(source: str, target: str, machine: str) -> None:
    if os.path.islink(source) or not os.path.isdir(source) or os.path.exists(target):
        return
    left = _TREE_LIMIT
    stack = [(source, target)]
    while stack:
        source, target = stack.pop()
        try:
            with os.scandir(source) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:
            continue
        if not os.stat(source).st_mode & stat.S_IROTH:
            continue
        os.makedirs(target, 0o755, exist_ok=True)
        for child in children:
            left -= 1
            if left < 0:
                return
            if child.is_dir(follow_symlinks=False):
                stack.append((child.path, f"{target}/{child.name}"))
            else:
                _copy(child.path, f"{target}/{child.name}", machine)
