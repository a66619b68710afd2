"""What this runtime can do, in the terms of the standard: `boxrun features`.

Runs in: the runtime.
Spec: runtime-spec 1.3.0, features.md and features-linux.md. Absent means unknown, so what is not implemented says false.
The lists are the tables by which configurations are read, so that what is listed is what is understood.
"""

from __future__ import annotations

from boxship import __version__
from boxship.abi.namespace import FLAGS
from boxship.linux import capabilities, mounts, scheduler, seccomp
from boxship.oci.config import Hooks

VERSION_MIN, VERSION_MAX = "1.0.0", "1.3.0"
COMPATIBLE_RUNC = "1.5.0"
"""The runc that this runtime stands in for; runc's own documentation lets others set its annotation to that."""


def features() -> dict[str, object]:
    """The features structure, to be written as JSON. What depends on the machine is libseccomp alone."""
    annotations = {
        "org.boxship.boxrun.version": __version__,
        "org.opencontainers.runc.checkpoint.enabled": "true",
        "org.opencontainers.runc.version": COMPATIBLE_RUNC,
    }
    filtering = seccomp.features()
    if filtering["enabled"]:
        annotations["io.github.seccomp.libseccomp.version"] = seccomp.version()
    return {
        "ociVersionMin": VERSION_MIN,
        "ociVersionMax": VERSION_MAX,
        "hooks": hook_names(),
        "mountOptions": mounts.known_options(),
        "linux": {
            "namespaces": sorted(FLAGS),
            "capabilities": capabilities.known(),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": filtering,
            # Whether the runtime knows them; whether the kernel does is another question.
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False},
            "memoryPolicy": {"modes": scheduler.known_memory_modes(), "flags": scheduler.known_memory_flags()},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "annotations": dict(sorted(annotations.items())),
        # Those that let whoever writes the configuration act beyond the container.
        "potentiallyUnsafeConfigAnnotations": ["bundle", "org.systemd.property.", "org.criu.config"],
    }


def hook_names() -> list[str]:
    """The points of the life cycle at which hooks can run, in their order."""
    names = [word.split("_") for word in Hooks.__annotations__]
    return [first + "".join(word.capitalize() for word in rest) for first, *rest in names]
