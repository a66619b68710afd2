"""Build step of the wheel: compiles the four C programs and the two C extensions.

* ``boxship/linux/_sys.abi3.so``: the system calls that Python lacks.
* ``boxship/network/proxy/_relay.abi3.so``: the byte streams of published ports.
* ``boxship/runtime/_init``: the program that a container's first process runs until the user's own (see
  ``boxship/linux/remote.py``); static and free of libc, because it runs inside the container.
* ``boxship/engine/docker-init``: the first process of a container that was asked to have an init; static and free of libc too.
* ``boxrun``: the native entry of the runtime's command line, put into the scripts folder as it is; and beside it the script
  ``boxship``, whose first line the installer completes.
* ``containerd-shim-boxship-v1``: the native entry of the shim's, the same way.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
SHIM = "containerd-shim-boxship-v1"
FREESTANDING = [
    "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie", "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro", "-s",
]
IN_PACKAGE = {"_sys.abi3.so": "linux", "_init": "runtime", "docker-init": "engine", "_relay.abi3.so": "network/proxy"}
WARN = ["-Wall", "-Wextra", "-Werror=implicit-function-declaration", "-O2"]


def compile_native(out: Path) -> dict[str, Path]:
    """Compile everything into the folder `out` and return the built files by name."""
    out.mkdir(parents=True, exist_ok=True)
    cc = shlex.split(os.environ.get("CC", "gcc"))
    native = ROOT / "src" / "native"
    built = {name: out / name for name in (*IN_PACKAGE, "boxrun", SHIM)}
    include = sysconfig.get_path("include")
    jobs = {
        "_sys.abi3.so": ["-shared", "-fPIC", f"-I{include}", *(str(native / f"{part}.c") for part in ("sys", "program", "hold"))],
        "_relay.abi3.so": ["-shared", "-fPIC", "-pthread", f"-I{include}", str(native / "relay.c")],
        "_init": [*FREESTANDING, str(native / "init.c")],
        "docker-init": [*FREESTANDING, str(native / "reaper.c")],
        "boxrun": ["-static", "-s", str(native / "boxrun.c")],
        SHIM: ["-static", "-s", str(native / "shim.c")],
    }
    for name, args in jobs.items():
        subprocess.run([*cc, *WARN, *args, "-o", str(built[name])], check=True)
    return built


class NativeBuild(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling's hook: compile, then put the results into the wheel."""

    def initialize(self, version: str, build_data: dict) -> None:  # type: ignore[type-arg]
        if self.target_name != "wheel":
            return
        built = compile_native(ROOT / "build" / "native")
        package = ROOT / "src" / "boxship"
        if version == "editable":
            # An editable install reads the package from the source tree, so the results go there.
            for name, target in IN_PACKAGE.items():
                destination = package / target / name
                destination.unlink(missing_ok=True)
                destination.write_bytes(built[name].read_bytes())
                destination.chmod(0o755)
        else:
            for name, target in IN_PACKAGE.items():
                build_data["force_include"][str(built[name])] = f"boxship/{target}/{name}"
        for name in ("boxrun", SHIM):
            build_data["shared_scripts"][str(built[name])] = name
        build_data["shared_scripts"][str(ROOT / "src" / "scripts" / "boxship")] = "boxship"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
