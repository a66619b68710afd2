"""Points at which a test may kill or fail the process.

Runs in: every process. Costs one look at a global when the environment names no point.
`BOXSHIP_FAILPOINT=name=kill` sends SIGKILL to the process when it comes to `hit("name")`; `name=enospc` (any errno
name) raises that OSError there; `name=stop` sends SIGSTOP, for a look at what there is at that moment; `*=count:N` kills at
the N-th point that is passed, whatever its name.
"""

from __future__ import annotations

import os

_plan: tuple[str, str] | None = None
_passed = 0


def load(environ: object = None) -> None:
    """Read the plan from the environment (or the mapping given), once at start."""
    global _plan
    source: dict[str, str] = environ if isinstance(environ, dict) else dict(os.environ)
    value = source.get("BOXSHIP_FAILPOINT", "")
    name, _, action = value.partition("=")
    _plan = (name, action) if action else None


def hit(name: str) -> None:
    """Come to the point `name`."""
    global _passed
    if _plan is None:
        return
    _passed += 1
    wanted, action = _plan
    if action.startswith("count:"):
        if _passed != int(action[6:]):
            return
        action = "kill"
    elif wanted != name:
        return
    if action == "kill":
        os.kill(os.getpid(), 9)
    if action == "stop":
        os.kill(os.getpid(), 19)
        return
    import errno

    number = int(getattr(errno, action.upper()))
    raise OSError(number, os.strerror(number), f"failpoint {name}")
