"""The configuration that `runc spec` writes, and what `--rootless` makes of it.

Runs in: the CLI.
Spec: runtime-spec 1.3.0; the values are those of runc 1.5 (libcontainer/specconv/example.go), members in the order of
its types, so that the two files are equal byte for byte (`text.dumps(spec, indent="\\t")`).
"""

from __future__ import annotations

import os

from boxship.oci.config import SPEC_VERSION

_CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")
_MOUNTS = (
    ("/proc", "proc", "proc", ""),
    ("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    ("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
    ("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
    ("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
    ("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid,noexec,nodev,relatime,ro"),
)
MASKED_PATHS = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def default_spec(*, cgroup_v2: bool = False) -> dict[str, object]:
    """The JSON object of a fresh config.json; with `cgroup_v2` (the only hierarchy) it has a cgroup namespace too."""
    namespaces = ["pid", "network", "ipc", "uts", "mount"]
    if cgroup_v2:
        namespaces.append("cgroup")
    return {
        "ociVersion": SPEC_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {kind: [*_CAPABILITIES] for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "runc",
        "mounts": [
            {"destination": destination, "type": kind, "source": source}
            | ({"options": options.split(",")} if options else {})
            for destination, kind, source, options in _MOUNTS
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": [*MASKED_PATHS],
            "readonlyPaths": [*READONLY_PATHS],
        },
    }


def to_rootless(spec: dict[str, object]) -> None:
    """Change `spec` in place to one that works without root: the caller's ids are root inside, the network is shared.

    Takes the JSON object of `default_spec`, or one that has at least its `mounts`, `linux` and `linux.namespaces`.
    """
    linux = spec["linux"]
    mounts = spec["mounts"]
    assert isinstance(linux, dict) and isinstance(mounts, list)
    ours = {"uidMappings": os.geteuid(), "gidMappings": os.getegid()}
    changed: dict[str, object] = {
        kind: [{"containerID": 0, "hostID": number, "size": 1}] for kind, number in ours.items()
    }
    changed |= {key: value for key, value in linux.items() if key not in ("resources", *ours)}
    changed["namespaces"] = [
        namespace for namespace in linux["namespaces"] if namespace["type"] not in ("network", "user")
    ] + [{"type": "user"}]
    spec["linux"] = changed
    for index, mount in enumerate(mounts):
        if "/" + str(mount["destination"]).strip("/") == "/sys":
            # sysfs shows the devices of a network namespace, and only its owner may mount it.
            options = ["rbind", "nosuid", "noexec", "nodev", "ro"]
            mounts[index] = {"destination": "/sys", "type": "none", "source": "/sys", "options": options}
            continue
        kept = [option for option in mount.get("options", ()) if not option.startswith(("gid=", "uid="))]
        if kept:
            mount["options"] = kept
        else:
            mount.pop("options", None)
