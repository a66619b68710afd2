"""A content store in memory that keeps the promises of boxship.images.store.Store, and can be asked what it holds."""

from __future__ import annotations

import hashlib
import os
import tempfile
from types import SimpleNamespace

from boxship.kit.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable


class MemoryStore:
    def __init__(self):
        self.blobs = {}
        self.tags = {}
        self.ingests = {}
        self.busy = set()

    def info(self, digest):
        if digest not in self.blobs:
            raise NotFound(f"content {digest}: not found")
        return SimpleNamespace(digest=digest, size=len(self.blobs[digest]))

    def open(self, digest):
        self.info(digest)
        with tempfile.TemporaryFile() as file:
            file.write(self.blobs[digest])
            file.flush()
            return os.dup(file.fileno())

    def writer(self, ref, total=0, expected=""):
        if expected and expected in self.blobs:
            raise AlreadyExists(f"content {expected}: already exists")
        if ref in self.busy:
            raise Unavailable(f"ref {ref} locked: unavailable")
        self.busy.add(ref)
        return _Writer(self, ref)

    def abort(self, ref):
        if ref not in self.ingests:
            raise NotFound(f"ingest {ref}: not found")
        assert ref not in self.busy
        del self.ingests[ref]

    def labels(self, digest):
        self.info(digest)
        return dict(self.tags.get(digest, {}))

    def set_labels(self, digest, labels):
        self.info(digest)
        own = self.tags.setdefault(digest, {})
        own.update(labels)
        for key in [key for key, value in own.items() if not value]:
            del own[key]

    def add(self, data):
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = bytes(data)
        return digest


class _Writer:
    def __init__(self, store, ref):
        self._store = store
        self._ref = ref
        self._data = store.ingests.setdefault(ref, bytearray())
        self._open = True

    @property
    def offset(self):
        return len(self._data)

    def write(self, data):
        assert self._open
        self._data += data

    def truncate(self, size):
        del self._data[size:]

    def digest(self):
        return "sha256:" + hashlib.sha256(self._data).hexdigest()

    def commit(self, size=0, expected=""):
        digest = self.digest()
        if expected.startswith("sha512:"):
            digest = "sha512:" + hashlib.sha512(self._data).hexdigest()
        if size and size != len(self._data):
            raise FailedPrecondition(f"unexpected commit size {len(self._data)}, expected {size}")
        if expected and expected != digest:
            raise FailedPrecondition(f"unexpected commit digest {digest}, expected {expected}")
        there = digest in self._store.blobs
        self._store.blobs[digest] = bytes(self._data)
        self._store.ingests.pop(self._ref, None)
        self.close()
        if there:
            raise AlreadyExists(f"content {digest}: already exists")

    def close(self):
        if self._open:
            self._open = False
            self._store.busy.discard(self._ref)
            if not self._store.ingests.get(self._ref):
                self._store.ingests.pop(self._ref, None)
