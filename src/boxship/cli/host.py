"""The image `host` without a daemon: an overlay over each of the machine's folders, and a skeleton for the rest.

Runs in: the boxship command, before the container is made.
Not here: what is let in (`boxship.images.builtin.machine`).
"""

from __future__ import annotations

import os
import stat

from boxship.images.builtin.machine import FRESH, PROGRAMS, build

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.layers import Layers


def assemble(layers: Layers, template: str, machine: str = "/") -> list[dict[str, Any]]:
    """Fill the skeleton and return the mounts.

    `template` is a folder that `build` has filled; `machine` the root of the machine that is shown.
    """
    machine = machine.rstrip("/")
    for path, mode in FRESH:
        layers.skeleton(path, mode)
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
    if layers.kernel.overlays():
        layers.folder(f"{template}/etc", "/etc")
        layers.folder(f"{template}/var", "/var")
    else:
        build(layers.scratch.rootfs, machine)
    return layers.mounts
