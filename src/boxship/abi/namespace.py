"""Namespaces: clone flags and the names below /proc/PID/ns.

Spec: Linux include/uapi/linux/sched.h; namespaces(7).
"""

from __future__ import annotations

CLONE_NEWTIME = 0x00000080
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

FLAGS = {
    "user": CLONE_NEWUSER, "mount": CLONE_NEWNS, "pid": CLONE_NEWPID, "network": CLONE_NEWNET, "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS, "cgroup": CLONE_NEWCGROUP, "time": CLONE_NEWTIME,
}
"""By the runtime-spec's type. The order is the one in which they are joined: the user namespace first, for what it allows."""

FILES = {
    "user": "user", "mount": "mnt", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup",
    "time": "time",
}
"""Names in /proc/PID/ns."""
