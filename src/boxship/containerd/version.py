"""The version service.

Runs in: the daemon.
"""

from __future__ import annotations

from typing import Any

import boxship
from boxship.api.containerd import pb
from boxship.api.containerd.call import Call

# Clients choose by the server's version (nerdctl: the transfer service from 2.0.0 on). This is the release of containerd whose
# services are there; what follows the sign is ours.
COMPATIBLE = "2.1.0"


class Version:
    """containerd.services.version.v1.Version."""

    async def Version(self, request: Any, call: Call) -> Any:
        """The release that this server is compatible with, and which one of ours it is."""
        own = boxship.__version__
        return pb.version.VersionResponse(version=f"{COMPATIBLE}+boxship.{own}", revision=f"boxship-{own}")
