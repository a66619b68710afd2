"""The Docker engine's role: its REST API over containerd's services.

    rest      http, hijack, routes/             requests, versions, streams
    life      create, startup, lifecycle, execs, health, attach
    state     core, container, store, events, volumes
    files     rootfs, archive, logs, stdio
    images    images, transfers
"""

from __future__ import annotations

from boxship.engine.app import ENGINE, app, runner
from boxship.engine.core import Settings

__all__ = ["ENGINE", "Settings", "app", "runner"]
