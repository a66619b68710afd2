"""Which drivers work here: tried, not guessed from the kernel's version.

Runs in: the daemon, at its start. Each trial makes mounts below the given directory and takes them away again.
"""

from __future__ import annotations

import os
import tempfile

from boxship.abi import mount as m
from boxship.containerd.snapshots.driver import Driver
from boxship.containerd.snapshots.erofs import ErofsDriver
from boxship.containerd.snapshots.native import NativeDriver
from boxship.containerd.snapshots.overlay import OverlayDriver
from boxship.images.layers import erofs
from boxship.kit.errors import BoxshipError
from boxship.linux import mounts


def open_drivers(root: str) -> dict[str, Driver]:
    """Every driver that works with files below `root`, by name, the best first; each owns the directory of its name below `root`.

    "native" works everywhere, so that there is always one.
    """
    os.makedirs(root, 0o711, exist_ok=True)
    found: dict[str, Driver] = {}
    if overlay_on_images_works(root):
        found["erofs"] = ErofsDriver(_below(root, "erofs"))
    if overlay_works(root):
        found["overlayfs"] = OverlayDriver(_below(root, "overlayfs"))
    elif overlay_works(root, userxattr=True):
        found["overlayfs"] = OverlayDriver(_below(root, "overlayfs"), userxattr=True)
    found["native"] = NativeDriver(_below(root, "native"))
    return found


def _below(root: str, name: str) -> str:
    return os.path.join(root, f"io.containerd.snapshotter.v1.{name}")


def overlay_works(root: str, *, userxattr: bool = False) -> bool:
    """Whether overlayfs takes directories below `root`."""
    with tempfile.TemporaryDirectory(prefix="probe-", dir=root) as place:
        lower = os.path.join(place, "lower")
        os.mkdir(lower)
        if not userxattr:
            # Root of a user namespace can mount an overlay without that option, and then sees no opaque directory.
            try:
                os.setxattr(lower, "trusted.overlay.opaque", b"n")
            except OSError:
                return False
        return _overlay(place, ["userxattr"] if userxattr else [])


def overlay_on_images_works(root: str) -> bool:
    """Whether an EROFS image with blocks of 512 bytes is mounted from its file there, and overlayfs takes it as a lower layer."""
    with tempfile.TemporaryDirectory(prefix="probe-", dir=root) as place:
        image, lower = os.path.join(place, "image"), os.path.join(place, "lower")
        os.mkdir(lower)
        fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            erofs.convert(fd, 0)
            mounts.attach("erofs", image, lower, ["ro"])
        except (OSError, BoxshipError):
            return False
        finally:
            os.close(fd)
        try:
            return _overlay(place, [])
        finally:
            mounts.umount(lower, m.MNT_DETACH)


def _overlay(place: str, options: list[str]) -> bool:
    upper, work, target = (os.path.join(place, name) for name in ("upper", "work", "target"))
    for path in (upper, work, target):
        os.mkdir(path)
    try:
        mounts.attach(
            "overlay", "overlay", target, [*options, f"lowerdir={place}/lower", f"upperdir={upper}", f"workdir={work}"])
    except OSError:
        return False
    mounts.umount(target, m.MNT_DETACH)
    return True
