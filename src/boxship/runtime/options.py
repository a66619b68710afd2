"""What callers may ask of create, run and exec beyond the configuration: the command line's flags as plain objects.

Runs in: the runtime.
"""

from __future__ import annotations


class CreateOptions:
    """Flags of create, run and restore.

    Attributes:
        pid_file: where init's pid is written, decimal without a newline; "" for nowhere.
        console_socket: path of an AF_UNIX socket that gets the terminal's master side; "" for none.
        pidfd_socket: path of an AF_UNIX socket that gets a pidfd of init; "" for none.
        preserve_fds: number of descriptors from 3 on that the process keeps, after those of LISTEN_FDS.
        no_pivot: move the root file system instead of pivot_root(2): for a rootfs on a ramdisk.
        no_new_keyring: stay in the caller's session keyring.
    """

    __slots__ = ("console_socket", "no_new_keyring", "no_pivot", "pid_file", "pidfd_socket", "preserve_fds")

    def __init__(
        self, pid_file: str = "", console_socket: str = "", preserve_fds: int = 0, *, pidfd_socket: str = "",
        no_pivot: bool = False, no_new_keyring: bool = False,
    ) -> None:
        self.pid_file = pid_file
        self.console_socket = console_socket
        self.pidfd_socket = pidfd_socket
        self.preserve_fds = preserve_fds
        self.no_pivot = no_pivot
        self.no_new_keyring = no_new_keyring


class ExecOptions(CreateOptions):
    """Flags of exec.

    Attributes:
        cgroup: sub-cgroup for the process, "[controller,…:]path" relative to the container's; "" for the container's own.
        ignore_paused: wait in a paused container instead of refusing.
        detach: return when the process runs.
    """

    __slots__ = ("cgroup", "detach", "ignore_paused")

    def __init__(
        self, *, cgroup: list[str] | None = None, ignore_paused: bool = False, detach: bool = False, **flags: object
    ) -> None:
        super().__init__(**flags)  # type: ignore[arg-type]
        self.cgroup = cgroup or []
        self.ignore_paused = ignore_paused
        self.detach = detach
