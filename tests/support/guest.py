"""A Debian machine of its own for tests: another kernel, cgroup v2, with systemd or without, under software emulation.

The disk is made once, from Debian's packages, and kept in .peers/guest; a guest works on a throw-away copy of it. A second
disk, made for each run, brings the package, pytest and the tests to /opt/boxship. The guest's own pytest writes each report
as a line of JSON to the second serial port, from where `Guest.reports` hands them out as they come.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import boxship

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".peers" / "guest"
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PYTHON = "python3.11"
PACKAGES = (
    "systemd", "dbus", "dbus-user-session", "libpam-systemd", "python3", "libseccomp2", "uidmap", "busybox-static", "criu",
    "iptables", "procps", "kmod", "e2fsprogs", "iproute2", "runc", "apparmor", "secilc",
)
KERNEL = "linux-image-cloud-amd64"
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "dpkg-deb": "dpkg"}
LANES = ("plain", "systemd")
SELINUX = "selinux"
"""A third one for the tests that ask for it: a kernel can have AppArmor, as the others have, or SELinux."""
USER = 1000
"""An ordinary user of the guest, with ids to map."""

DISK_SIZE = "1500M"
MEMORY_MIB, CPUS = 1024, 2
BUILD_TIMEOUT_S = 420
BOOT_TIMEOUT_S = 120
"""Until the first report."""
RUN_TIMEOUT_S = 480
"""For all of a guest's life."""
ENOUGH_S = 240
"""After that no test is begun that could be left out."""

# Debian's kernel has NVMe and ext4 built in, so it needs no initramfs. It mounts nothing by itself.
_START = """#!/bin/sh
mount -t devtmpfs devtmpfs /dev
until test -b /dev/nvme0n2; do sleep 0.1; done
mount -t ext4 -o noatime /dev/nvme0n2 /opt/boxship
exec /opt/boxship/init </dev/console >/dev/console 2>&1
"""

_RUN = f"""#!/bin/sh
export HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
stty -F /dev/ttyS1 raw -echo
cd /opt/boxship/project
timeout {RUN_TIMEOUT_S - 30} /opt/boxship/bin/python3 -B -m pytest -p no:cacheprovider -q tests/guest </dev/null
sync
poweroff -f
"""

_INIT = {
    "plain": """#!/bin/sh
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devpts -o mode=620,ptmxmode=666,gid=5 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
mount --make-rshared /
ip link set lo up
/opt/boxship/run
""",
    # What only costs time under emulation is masked.
    "systemd": """#!/bin/sh
cat >/etc/systemd/system/tests.service <<'END'
[Unit]
After=dbus.service systemd-logind.service
Wants=systemd-logind.service
[Service]
Type=idle
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
ExecStart=/opt/boxship/run
END
mkdir -p /etc/systemd/system/multi-user.target.wants
ln -sf ../tests.service /etc/systemd/system/multi-user.target.wants/tests.service
for unit in modprobe@.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount systemd-modules-load.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service getty@.service serial-getty@.service systemd-pstore.service \
    e2scrub_reap.service systemd-sysusers.service systemd-random-seed.service kmod-static-nodes.service
do
    ln -sf /dev/null /etc/systemd/system/$unit
done
exec /lib/systemd/systemd --show-status=no
""",
}


class Unavailable(Exception):
    """There can be no guest here; the text says what to do about it."""


def missing() -> str:
    """What lacks for a guest, "" for nothing."""
    if os.geteuid() != 0:
        return "making the guest's root file system needs root"
    if os.uname().machine != "x86_64":
        return "the guest is an x86_64 machine"
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [package for tool, package in TOOLS.items() if shutil.which(tool, path=search) is None]
    return f"apt-get install {' '.join(lacking)}" if lacking else ""


class Image:
    """The kernel and the root disk, which never change."""

    def __init__(self, folder: Path) -> None:
        self.kernel = folder / "vmlinuz"
        self.disk = folder / "root.img"


def image() -> Image:
    """The image of this recipe, made now if it is not there. Raises Unavailable."""
    reason = missing()
    if reason:
        raise Unavailable(reason)
    recipe = repr((SUITE, MIRROR, PACKAGES, KERNEL, _START, DISK_SIZE, 3))
    folder = CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Not on the disk: packages are unpacked with many small writes.
        large = "/dev/shm" if os.path.isdir("/dev/shm") and _free("/dev/shm") > 1 << 30 else None
        with tempfile.TemporaryDirectory(prefix="guest-", dir=large) as work, tempfile.TemporaryDirectory(dir=CACHE) as made:
            _build(Path(work), Path(made))
            target = Path(made) / "made"
            try:
                os.rename(target, folder)
            except OSError:
                if not folder.exists():  # somebody else was faster
                    raise
    return Image(folder)


def _free(path: str) -> int:
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def _build(work: Path, made: Path) -> None:
    root = work / "root"
    # The kernel's package is fetched, not installed: its scripts would make an initramfs and look for a boot loader.
    fetch = (
        'set -e; export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; mkdir "$1/kernel"; cd "$1/kernel"; '
        f'apt-get download $(apt-cache depends {KERNEL} | sed -n "s/.*Depends: *//p")'
    )
    exclude = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")]
    _run(
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--dpkgopt=force-unsafe-io", *exclude,
        f"--include={','.join(PACKAGES)}", f"--customize-hook={fetch}", SUITE, str(root), MIRROR,
    )
    (package,) = (root / "kernel").glob("*.deb")
    _run("dpkg-deb", "-x", str(package), str(work / "kernel"))
    shutil.rmtree(root / "kernel")
    (modules,) = (work / "kernel/lib/modules").iterdir()
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name)
    _run("chroot", str(root), "depmod", modules.name)
    (root / "opt/boxship").mkdir()
    (root / "opt/start").write_text(_START)
    (root / "opt/start").chmod(0o755)
    (root / "etc/machine-id").write_text("")
    _run("chroot", str(root), "useradd", "-m", "-u", str(USER), "-s", "/bin/sh", "user")
    for name in ("subuid", "subgid"):
        (root / "etc" / name).write_text("user:100000:65536\n")
    target = made / "made"
    target.mkdir()
    (kernel,) = (work / "kernel/boot").glob("vmlinuz-*")
    shutil.copy(kernel, target / "vmlinuz")
    make_disk(root, target / "root.img", DISK_SIZE)


def _run(*words: str) -> None:
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S,
            env={**os.environ, "PATH": search, "DEBIAN_FRONTEND": "noninteractive"},
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{words[0]} took more than {BUILD_TIMEOUT_S} s") from None
    if done.returncode:
        # Above all: no network, or no keys of Debian's.
        raise Unavailable(f"cannot make the guest from Debian's packages ({KERNEL} …): {words[0]}: {done.stderr.strip()[-1000:]}")


def make_disk(folder: Path, disk: Path, size: str) -> None:
    """An ext4 file system with what is in `folder`."""
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", str(folder), str(disk), size)


# --- what the guest is given -----------------------------------------------------------------------------------------


def _distributions(names: Iterable[str]) -> Iterator[importlib.metadata.Distribution]:
    """Those Python packages that are installed here, and what they need."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of other systems
        yield found
        waiting += [re.split(r"[^\w.-]", text)[0] for text in found.requires or [] if "extra ==" not in text]


def _pack(folder: Path, lane: str, wanted: list[str]) -> None:
    site = folder / "lib" / PYTHON / "site-packages"
    site.mkdir(parents=True)
    for distribution in _distributions(["pytest", "pytest-timeout"]):
        for file in distribution.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(distribution.locate_file(file)), target)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(boxship.__file__).parent, site / "boxship", ignore=ignore)
    (folder / "bin").mkdir()
    os.symlink("/usr/bin/python3", folder / "bin/python3")
    shutil.copy(_boxrun(), folder / "bin/boxrun")
    # A virtual environment: boxrun starts the interpreter beside it in isolated mode.
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (folder / "project").mkdir()
    shutil.copytree(PROJECT / "tests", folder / "project/tests", ignore=ignore)
    shutil.copy(PROJECT / "pyproject.toml", folder / "project")
    (folder / "wanted.json").write_text(json.dumps({"lane": lane, "tests": wanted, "runtime": os.environ.get("BOXSHIP_GUEST_RUNTIME", "")}))
    for name, text in (("run", _RUN), ("init", _INIT["systemd" if lane == "systemd" else "plain"])):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    # Compiled here: it takes twenty times as long there. Another version's files are ignored there.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(site)], stdout=subprocess.DEVNULL)


def _boxrun() -> str:
    for candidate in (f"{os.path.dirname(sys.executable)}/boxrun", f"{PROJECT}/.venv/bin/boxrun"):
        if os.access(candidate, os.X_OK):
            return candidate
    raise Unavailable("boxrun is not built: make build")


# --- running it ------------------------------------------------------------------------------------------------------


class Guest:
    """A guest that runs the `wanted` tests of a lane, from its boot on. Raises Unavailable."""

    def __init__(self, lane: str, wanted: list[str]) -> None:
        base = image()
        self._folder = tempfile.TemporaryDirectory(prefix="guest-")
        folder = Path(self._folder.name)
        self.console = folder / "console"
        _pack(folder / "pack", lane, wanted)
        make_disk(folder / "pack", folder / "pack.img", "120M")
        shutil.rmtree(folder / "pack")
        self._results = open(folder / "results", "w+b")
        search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        self._began = time.monotonic()
        self._reported = False
        self._ended = False
        self._buffer = b""
        self._qemu = subprocess.Popen(
            [
                # Not longer than pytest, which may be killed.
                "setpriv", "--pdeathsig", "KILL", "nice", "-n", "10", "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", str(CPUS), "-m", str(MEMORY_MIB),
                "-M", "q35", "-nodefaults", "-display", "none", "-no-reboot", "-kernel", str(base.kernel),
                "-append", f"root=/dev/nvme0n1 rw console=ttyS0 quiet panic=-1 init=/opt/start{' security=selinux' if lane == SELINUX else ''}",
                "-serial", f"file:{self.console}", "-serial", f"file:{folder / 'results'}", "-device", "nvme,serial=disks,id=disks",
                "-drive", f"file={base.disk},format=raw,if=none,id=root,snapshot=on",
                "-device", "nvme-ns,drive=root,bus=disks,nsid=1",
                "-drive", f"file={folder / 'pack.img'},format=raw,if=none,id=pack,snapshot=on",
                "-device", "nvme-ns,drive=pack,bus=disks,nsid=2",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PATH": search},
        )

    def reports(self) -> Iterator[dict[str, object]]:
        """Reports as pytest serialises them, as they come; ends when the guest does, or has been too slow."""
        while True:
            *lines, self._buffer = (self._buffer + self._results.read()).split(b"\n")
            for line in lines:
                self._reported = True
                yield json.loads(line)
            if lines:
                continue
            if self._ended:
                return
            used = time.monotonic() - self._began
            if self._qemu.poll() is not None:
                self._ended = True
            elif used > RUN_TIMEOUT_S or (used > BOOT_TIMEOUT_S and not self._reported):
                self._qemu.kill()
                self._qemu.wait()
                self._ended = True
            else:
                time.sleep(0.1)

    def last_words(self) -> str:
        """The end of what the console shows."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        said = self._qemu.stderr.read().decode(errors="replace") if self._ended and self._qemu.stderr else ""
        return said + text[-6000:]

    def close(self) -> None:
        """End it."""
        if self._qemu.poll() is None:
            self._qemu.kill()
        self._qemu.wait()
        if self._qemu.stderr:
            self._qemu.stderr.close()
        self._results.close()
        self._folder.cleanup()
