"""All of the metadata over one root: database, content, snapshot drivers and their collection, and the services on top.

Runs in: the daemon, on its event loop.

    ROOT/metadata.db                              boxship.containerd.metadata.database
    ROOT/content/                                 boxship.images.content
    ROOT/io.containerd.snapshotter.v1.NAME/       one for each snapshot driver
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from boxship.containerd.events import Exchange
from boxship.containerd.metadata.check import CONTENT_FOLDER, DATABASE
from boxship.containerd.metadata.content import Content, Contents
from boxship.containerd.metadata.database import Database
from boxship.containerd.metadata.gc import Collector, Scheduler, configured
from boxship.containerd.metadata.leases import Leases
from boxship.containerd.metadata.publisher import Publisher
from boxship.containerd.metadata.records import Containers, Images, SandboxStore
from boxship.containerd.metadata.snapshots import Snapshots
from boxship.containerd.namespaces import Namespaces
from boxship.containerd.snapshots.driver import Driver
from boxship.images.content import ContentStore
from boxship.kit.errors import InvalidArgument

SHARED, ISOLATED = "shared", "isolated"


class Metadata:
    """What is at `root`, opened. `services` has the services by their attribute in the bundle."""

    def __init__(
        self, root: str, exchange: Exchange, drivers: Mapping[str, Driver], tables: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`drivers` become this object's own. An event loop must run. `tables` may have
        `content.sharing_policy`, "shared" (the default) or "isolated", and `gc` (see `Schedule`).

        Raises InvalidArgument for another policy, and what the database and the files raise.
        """
        policy = (tables or {}).get("content", {}).get("sharing_policy", SHARED)
        if policy not in (SHARED, ISOLATED):
            raise InvalidArgument(f'content.sharing_policy must be "{SHARED}" or "{ISOLATED}", not {policy!r}')
        publish = Publisher(exchange.publish)
        self.drivers = drivers
        self.database = Database(os.path.join(root, DATABASE))
        self.files = ContentStore(os.path.join(root, CONTENT_FOLDER))
        self.collector = Collector(self.database, self.files, drivers, publish)
        self.scheduler = Scheduler(self.database, self.collector, configured((tables or {}).get("gc", {})))
        self.snapshots = Snapshots(self.database, drivers, publish)
        contents = Contents(self.database, self.files, publish, policy == SHARED)
        self.services: dict[str, Any] = {
            "namespaces": Namespaces(self.database, exchange),
            "containers": Containers(self.database, exchange),
            "images": Images(self.database, exchange, self.scheduler.collect),
            "content": Content(contents),
            "leases": Leases(self.database, self.scheduler.collect),
            "snapshots": self.snapshots,
            "sandbox_store": SandboxStore(self.database),
        }

    async def start(self) -> None:
        """Bring rows and files to agree after a crash, then begin to collect."""
        await asyncio.to_thread(self.collector.reconcile)
        self.scheduler.start()

    async def close(self) -> None:
        """Let a collection end, then let go of everything. A second time does nothing."""
        await self.scheduler.stop()
        await asyncio.to_thread(self.snapshots.close)
        for driver in self.drivers.values():
            driver.close()
        self.database.close()

    def check(self) -> list[str]:
        """What is wrong, in words; empty when all is well. Reads every blob: takes its time, in any thread."""
        return self.collector.check()
