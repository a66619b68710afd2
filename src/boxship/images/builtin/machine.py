"""What the image `host` shows of the machine: its programs, and nothing that is private to it.

Runs in: the boxship command, and the daemon.
Spec: hier(7), Filesystem Hierarchy Standard 3.0.

    /usr                  the machine's, below a copy-on-write layer; so are /bin, /lib … where they are no links into it
    /etc                  copies of what `FILES` and `TREES` name, made once and kept until the machine changes, below a layer
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

from boxship.kit.files import write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

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
# Folders below /etc, copied with all below.
TREES = (
    "alternatives", "ssl/certs", "pki/tls/certs", "pki/ca-trust/extracted", "ca-certificates/extracted", "fonts",
    "ld.so.conf.d", "crypto-policies", "terminfo", "python3", "python3.*", "perl", "xml", "sgml", "groff", "vim", "gtk-*",
    "java-*", "ImageMagick-*",
)
_SECOND_FIELD = ("passwd", "group")
_FILE_LIMIT = 8 << 20
_TREE_LIMIT = 4096

# (folder, mode) of the fresh parts.
FRESH = (
    ("/etc", 0o755), ("/root", 0o700), ("/home", 0o755), ("/tmp", 0o1777), ("/run", 0o755), ("/run/lock", 0o1777),
    ("/opt", 0o755), ("/srv", 0o755), ("/mnt", 0o755), ("/media", 0o755), ("/proc", 0o755), ("/sys", 0o755), ("/dev", 0o755),
    ("/var", 0o755),
)
_FRESH_VAR = (
    ("cache", 0o755), ("lib", 0o755), ("local", 0o755), ("log", 0o755), ("opt", 0o755), ("spool", 0o755), ("tmp", 0o1777),
)
_LINKS_VAR = (("run", "/run"), ("lock", "/run/lock"))


Identity = list[int]
Source = tuple[str, Identity]
"""A file or folder of the machine, and what told it from a changed one before it was read."""


def identity(path: str) -> Identity:
    """What changes when a file does, or a folder's list of names: the time of change (ctime) cannot be set by hand."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size]


def build(target: str, machine: str = "/") -> list[Source]:
    """Fill `target`/etc and `target`/var, which may be there. Returns what the copy depends on."""
    machine = machine.rstrip("/")
    etc, var = f"{target}/etc", f"{target}/var"
    os.makedirs(etc, 0o755, exist_ok=True)
    os.makedirs(var, 0o755, exist_ok=True)
    copying = _Copying(machine)
    source = f"{machine}/etc"
    copying.note(source)
    present = set(os.listdir(source))
    for pattern in FILES:
        for name in _matches(pattern, present):
            copying.file(f"{source}/{name}", f"{etc}/{name}")
    for pattern in TREES:
        for name in _matches(pattern, present):
            copying.tree(f"{source}/{name}", f"{etc}/{name}")
    os.symlink("/proc/self/mounts", f"{etc}/mtab")
    for name, mode in _FRESH_VAR:
        os.mkdir(f"{var}/{name}")
        os.chmod(f"{var}/{name}", mode)
    for name, to in _LINKS_VAR:
        os.symlink(to, f"{var}/{name}")
    return list(copying.seen.items())


def _matches(pattern: str, present: set[str]) -> Sequence[str]:
    first = pattern.partition("/")[0]
    if "*" not in pattern:
        return [pattern] if first in present else []
    before, _, after = pattern.partition("*")
    return sorted(
        name for name in present if len(name) > len(before) + len(after) and name.startswith(before) and name.endswith(after)
    )


class _Copying:
    """Copies what may be let in. `seen` is what the copy depends on."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.seen: dict[str, Identity] = {}

    def note(self, path: str) -> None:
        """Remember what `path` is before it is read, so that a change meanwhile shows."""
        self.seen.setdefault(path, identity(path))

    def file(self, source: str, target: str, tree: str = "") -> None:
        """Copy a file, or a link that leads into /usr or stays in `tree`; leave out what is missing, private, or not regular."""
        if not tree:
            self.note(os.path.dirname(source))
        try:
            status = os.lstat(source)
            if stat.S_ISLNK(status.st_mode):
                to = os.readlink(source)
                leads = os.path.normpath(os.path.join(os.path.dirname(source[len(self.machine) :]), to))
                if leads.startswith("/usr/") or (tree and leads.startswith(tree)):
                    _parent(target)
                    os.symlink(to, target)
                    return
            self.note(source)
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
        if os.path.basename(source) in _SECOND_FIELD:
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

    def tree(self, source: str, target: str) -> None:
        """Copy a folder with all below that everybody may read."""
        self.note(os.path.dirname(source))
        if not self.machine:
            source = os.path.realpath(source)
        if os.path.islink(source) or not os.path.isdir(source) or os.path.exists(target):
            return
        inside = source[len(self.machine) :] + "/"
        left = _TREE_LIMIT
        stack = [(source, target)]
        while stack:
            source, target = stack.pop()
            self.note(source)
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
                    self.file(child.path, f"{target}/{child.name}", inside)


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
