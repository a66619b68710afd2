"""The execution domain of a process: whether uname(2) tells a 64-bit machine's truth or "i686".

Runs in: the runtime; init performs personality(2).
Spec: personality(2); runtime-spec 1.3.0, config-linux.md "Personality" (its flags are reserved, so there are none).
"""

from __future__ import annotations

from boxship.abi.process import PERSONALITIES
from boxship.kit.errors import InvalidArgument


def domain(name: str) -> int:
    """The number of "LINUX" or "LINUX32". Raises InvalidArgument in runc's words."""
    number = PERSONALITIES.get(name)
    if number is None:
        raise InvalidArgument(f"invalid personality domain {name}")
    return number
