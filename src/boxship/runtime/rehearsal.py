"""A container told to nobody: the runtime's way through `run` without a process, a cgroup or a file at its end.

Runs in: the warm server once it has imported everything, many times, so that the interpreter has specialized the code; and
in each worker before it waits, once, so that the pages which the command will write to are its own by then. Both would
otherwise fall on the first command, and cost it more than the kernel's part of a container.
"""

from __future__ import annotations

import os

from boxship.linux.cgroups import Cgroup
from boxship.oci import defaults, text
from boxship.oci.config import Spec
from boxship.runtime import create, state
from boxship.runtime.command import flags, table
from boxship.runtime.context import Context
from boxship.runtime.options import CreateOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from boxship.linux.remote import Program, Remote


class _Nobody:
    """Takes programs, and says yes to each."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.descriptors: list[int] = []

    def send(self, program: Program, fds: Sequence[int] = ()) -> None:
        program.image()

    def wait(self) -> int:
        return 0

    def result(self, index: int) -> int:
        return 0

    def data(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def scratch(self, size: int) -> bytes:
        return b""


class Rehearsal:
    """What is rehearsed with: made once, since the workers inherit it."""

    def __init__(self) -> None:
        spec = defaults.default_spec()
        process = spec["process"]
        assert isinstance(process, dict)
        process["terminal"] = False
        process["capabilities"].pop("ambient", None)
        self.data = text.dumps(spec, indent=1).encode()
        self.context = Context("/nonexistent", environ={}, cwd="/")

    def perform(self) -> None:
        """Go through it once. Nothing is left of it, and nothing of the machine changes."""
        command = table.commands()["run"]
        flags.parse(table.GLOBAL, ["--root", "/nonexistent", "run"], 1)
        flags.parse(command.flags, ["--bundle", "/", "rehearsal"], command.stop_after)
        spec = Spec.decode(text.loads(self.data, "rehearsal"), "")
        create.check(self.context, spec, needs_process=True)
        container = state.Container(self.context, "rehearsal", "/nonexistent", -1)
        cgroup = Cgroup.plan("", "rehearsal", systemd=False, rootless=True)
        if cgroup is not None:
            Cgroup.decode(cgroup.encode()).exists()
        story = create.plan(self.context, container, spec, CreateOptions(), "/", "/", cgroup)
        nobody: Remote = _Nobody()  # type: ignore[assignment]
        story.rehearse(nobody)
        story.enter()
        story.go()
        story.make_file_system()
        story.go()
        story.change_root()
        story.close_file_system()
        story.look_up_home()
        story.go()
        story.complete_environment()
        create.tell_identity(story)
        story.go()
        story.done()
        text.dumps(container.record())
        container.describe(state.RUNNING)
        story.close_fds()
