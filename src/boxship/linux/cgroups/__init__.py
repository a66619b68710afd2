"""Control groups: one face for v1, hybrid and v2, with cgroupfs or systemd as the driver.

Runs in: the runtime, as root or rootless.
Spec: cgroups(7); kernel Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst. Behaviour and texts of errors are runc's.

    Cgroup.plan(...)         where the group will be; nothing is done yet
      .create(limits)        directories, with what must be set before the first process enters
      .join_fds()            open files to which a process writes b"0" to enter
      .apply(limits)         every limit
      .encode() / .decode()  the record for state.json
      .delete()              with all groups below it

Not here: the meaning of config.json (`boxship.runtime.resources`), and the mounts in the container (`boxship.runtime.rootfs`).
"""

from __future__ import annotations

from boxship.linux.cgroups.group import Cgroup, OomEvents
from boxship.linux.cgroups.limits import DeviceRule, Limits

__all__ = ["Cgroup", "DeviceRule", "Limits", "OomEvents"]
