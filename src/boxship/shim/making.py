"""What is done once for a container beside the runtime's own work, in the same fork: before it the bundle and the root file
system, after it a look at where the container's first process is.

Runs in: a fork of the shim (`Making.__call__`), and the shim, which reads the report of it (`Making.finished`).
"""

from __future__ import annotations

import marshal
import os

from boxship.kit import failpoint
from boxship.kit.errors import BoxshipError, from_code, from_os_error
from boxship.kit.files import write_atomic
from boxship.linux.cgroups import Cgroup
from boxship.shim import bundle as bundles
from boxship.shim.metrics import cgroup_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from typing import Any

    from boxship.kit.loop import Later
    from boxship.shim.process import Container


class Making:
    """For one container; see above."""

    def __init__(self, container: Container, rootfs: Iterable[Any]) -> None:
        """`rootfs`: the mounts."""
        self._container = container
        self._rootfs = rootfs
        self._report = os.memfd_create("report", os.MFD_CLOEXEC)

    def __call__(self, go: Callable[[], int]) -> int:
        """In the fork: everything, with the runtime's command `go` between. Returns the exit code."""
        container = self._container
        bundle = container.bundle
        report: dict[str, object] = {}
        code = 1
        try:
            write_atomic(f"{bundle}/options.json", container.options.encode())
            write_atomic(f"{bundle}/runtime", container.options.binary.encode())
            config = bundles.load_config(bundle)
            report["private_pids"] = bundles.has_pid_namespace(config)
            report["quick"] = bundles.is_quick(config)
            if self._rootfs:
                bundles.mount_rootfs(bundle, self._rootfs)
            failpoint.hit("shim.create.mounted")
            code = go()
            failpoint.hit("shim.create.gone")
            if code == 0 and os.path.exists(f"{bundle}/init.pid"):
                report["cgroup"] = _cgroup(f"{bundle}/init.pid")
        except OSError as error:
            said = from_os_error(error, "create")
            report["error"] = said.code, str(said)
        except BoxshipError as error:
            report["error"] = error.code, str(error)
        os.write(self._report, marshal.dumps(report))
        return code

    def finished(self, ended: Later) -> Generator[Later, object, None]:
        """In the shim, a step: wait for the fork, and take what it found out. Raises BoxshipError."""
        try:
            problem = None
            try:
                yield ended
            except BoxshipError as error:
                problem = error
            data = os.pread(self._report, 1 << 16, 0)
        finally:
            os.close(self._report)
        report = marshal.loads(data) if data else {}
        if "error" in report:
            raise from_code(*report["error"])
        if problem is not None:
            raise problem
        if not data:
            raise BoxshipError("the process that made the container was killed")
        self._container.private_pids = report["private_pids"]
        self._container.is_quick = report["quick"]
        if report.get("cgroup"):
            self._container.cgroup = Cgroup.decode(report["cgroup"])


def _cgroup(pid_file: str) -> dict[str, object] | None:
    """Where it can be found again, None where it has none, or is over already."""
    try:
        group = cgroup_of(bundles.read_pid(pid_file))
    except (BoxshipError, OSError):
        return None
    return group.encode() if group is not None else None
