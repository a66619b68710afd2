"""What comes with a request beside its message: the namespace and the lease that it belongs to.

Runs in: the daemon and its clients.
Spec: containerd's docs/namespaces.md; headers `containerd-namespace` (on ttRPC `…-ttrpc`) and `containerd-lease`.
"""

from __future__ import annotations

import re

from boxship.kit.errors import FailedPrecondition, InvalidArgument

NAMESPACE_HEADER = "containerd-namespace"
TTRPC_NAMESPACE_HEADER = "containerd-namespace-ttrpc"
LEASE_HEADER = "containerd-lease"

IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*\Z")
IDENTIFIER_MAX = 76


def check_identifier(name: str) -> None:
    """Raise InvalidArgument unless `name` may name a namespace or an object (letters, digits, single separators, 76 at most)."""
    if not name:
        raise InvalidArgument("identifier must not be empty: invalid argument")
    if len(name) > IDENTIFIER_MAX:
        raise InvalidArgument(f'identifier "{name}" greater than maximum length ({IDENTIFIER_MAX} characters): invalid argument')
    if not IDENTIFIER.match(name):
        pattern = "^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$"
        raise InvalidArgument(f'identifier "{name}" must match {pattern}: invalid argument')


class Call:
    """The circumstances of one request.

    `timeout` (seconds) is the limit of a client; services need not look at it. `agent` is the library that a request came from
    (the header user-agent), "" in the same process.
    """

    __slots__ = ("agent", "lease", "namespace", "timeout")

    def __init__(self, namespace: str = "", lease: str = "", timeout: float | None = None, agent: str = "") -> None:
        self.agent = agent
        self.namespace = namespace
        self.lease = lease
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Call(namespace={self.namespace!r}, lease={self.lease!r})"

    def required_namespace(self) -> str:
        """The namespace; raises FailedPrecondition when none was given and InvalidArgument when it cannot be one."""
        if not self.namespace:
            raise FailedPrecondition("namespace is required: failed precondition")
        check_identifier(self.namespace)
        return self.namespace
