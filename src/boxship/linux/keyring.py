"""The session keyring of a container: its own, because the caller's holds the host's keys.

Runs in: the runtime, which knows the numbers; init performs the calls, before it changes ids.
Spec: keyctl(2), session-keyring(7).
"""

from __future__ import annotations

from boxship.abi import process as abi

JOIN_SESSION = abi.KEYCTL_JOIN_SESSION_KEYRING
SETPERM = abi.KEYCTL_SETPERM

_FRESH = 0x3F130000
"""What the kernel gives a session keyring: everything to its possessor; view, read and link to its owner."""


def session_name(container_id: str) -> str:
    """As runc names it, so that exec joins the ring that create made."""
    return f"_ses.{container_id}"


def permissions(*, userns: bool) -> int:
    """For KEYCTL_SETPERM on a ring that was just made: it may also be searched.

    In a user namespace the owner is another user than the one who searches, so everybody gets that right.
    """
    return _FRESH | (abi.KEY_OTH_SEARCH if userns else abi.KEY_USR_SEARCH)
