"""Where the engines are that the runtime is tested with.

BOXSHIP_PEERS=DIR[:DIR…] names roots (usr/bin, usr/sbin, bin, sbin below them) where they are looked for before PATH.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

_PACKAGES = {"podman": "podman", "conmon": "conmon", "containerd": "containerd", "ctr": "containerd", "containerd-shim-runc-v2": "containerd", "dockerd": "docker.io",
             "docker": "docker.io", "criu": "criu", "docker-registry": "docker-registry", "ip": "iproute2", "catatonit": "catatonit", "docker-init": "tini"}


def peer_directories() -> list[Path]:
    """Where engines are looked for before PATH."""
    roots = [Path(word) for word in os.environ.get("BOXSHIP_PEERS", "").split(":") if word]
    return [root / name for root in roots for name in ("usr/bin", "usr/sbin", "bin", "sbin") if (root / name).is_dir()]


def needs(*programs: str) -> None:
    """Skip, naming what to install, unless all these programs are here."""
    search = os.pathsep.join([*map(str, peer_directories()), "/usr/sbin:/usr/bin:/sbin:/bin"])
    for program in programs:
        if shutil.which(program, path=search) is None:
            pytest.skip(f"{program} is missing: apt-get install {_PACKAGES.get(program, program)}")
