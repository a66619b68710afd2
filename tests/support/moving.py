"""A process that pulls or loads an image into a store of files, to be killed or starved: `python -m support.moving ROOT WHAT FROM`."""

from __future__ import annotations

import asyncio
import json
import sys

from boxship.images import archive
from boxship.images.content import ContentStore
from boxship.images.hosts import Configuration
from boxship.images.pull import Fetcher
from boxship.images.registry import Repository
from boxship.images.store import LocalBlobs
from boxship.images.transport import Transport
from boxship.kit.errors import BoxshipError
from boxship.oci import reference


class FileStore(ContentStore):
    """The store of files, with labels that are forgotten."""

    def labels(self, digest):
        self.info(digest)
        return {}

    def set_labels(self, digest, labels):
        self.info(digest)


async def pull(root, name, *, keep_partial):
    async with Transport(Configuration(directories=(), plain_http=True)) as transport:
        parsed = reference.parse(name).tagged()
        fetcher = Fetcher(Repository(transport, parsed), LocalBlobs(FileStore(root)), wanted=[], keep_partial=keep_partial)
        await fetcher.fetch(await fetcher.resolve(parsed))


def main():
    root, what, source = sys.argv[1:]
    print("ready", flush=True)
    try:
        if what == "load":
            asyncio.run(archive.load(LocalBlobs(FileStore(root)), source))
        else:
            # A pull that is to be continued later keeps what it has; another one leaves nothing half-stored.
            asyncio.run(pull(root, source, keep_partial=what == "pull-to-continue"))
    except BoxshipError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
        return 1
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
