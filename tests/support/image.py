"""A container image made on the spot: busybox, and an archive of it that podman, containerd and dockerd all load."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from pathlib import Path

BUSYBOX = Path("/bin/busybox")
NAME = "boxship.test/busybox:1"
ENDS = {
    "own": (["sh", "-c", "exit 7"], 7),
    "no-such-file": (["/nothing/here"], 127),
    "not-on-path": (["not-on-the-path"], 127),
    "not-executable": (["/etc/passwd"], 126),
}
"""Commands in the image, and the exit code that docker run ends with."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_APPLETS = [
    "sh", "cat", "cp", "echo", "env", "expr", "false", "find", "grep", "head", "hostname", "id", "ip", "kill", "ls",
    "mkdir", "mount", "nproc", "ps", "pwd", "readlink", "rm", "sed", "sleep", "sort", "stat", "stty", "tail", "test",
    "top", "touch", "tr", "true", "tty", "uname", "wc", "which", "yes",
]
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hostname": "image\n",
}


def layer() -> bytes:
    """The root file system as a tar archive, the same bytes each time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        def add(name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "") -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(data), link
            archive.addfile(entry, io.BytesIO(data))

        for name in ("bin", "dev", "etc", "proc", "root", "sys", "var"):
            add(name, tarfile.DIRTYPE, 0o755)
        add("tmp", tarfile.DIRTYPE, 0o1777)
        add("bin/busybox", tarfile.REGTYPE, 0o755, BUSYBOX.read_bytes())
        for name in _APPLETS:
            add(f"bin/{name}", tarfile.SYMTYPE, 0o777, link="busybox")
        for name, text in _FILES.items():
            add(name, tarfile.REGTYPE, 0o644, text.encode())
    return buffer.getvalue()


def unpack(into: Path) -> None:
    """The root file system as a directory."""
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", into], input=layer(), check=True)


def write_archive(path: Path) -> None:
    """An archive that is an OCI image layout and `docker save`'s format at once, as docker itself writes it."""
    content = layer()
    blobs: dict[str, bytes] = {}

    def blob(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return digest

    def text(value: object) -> bytes:
        return json.dumps(value).encode()

    layer_digest = blob(content)
    config = text({
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()), "os": "linux",
        "created": "2024-01-01T00:00:00Z",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "tests"}],
    })
    config_digest = blob(config)
    manifest = text({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": f"sha256:{config_digest}",
                   "size": len(config)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{layer_digest}",
                    "size": len(content)}],
    })
    manifest_digest = blob(manifest)
    tops = {
        "oci-layout": text({"imageLayoutVersion": "1.0.0"}),
        "index.json": text({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": f"sha256:{manifest_digest}",
            "size": len(manifest),
            "annotations": {"io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": NAME.partition(":")[2]},
        }]}),
        "manifest.json": text([{"Config": f"blobs/sha256/{config_digest}", "RepoTags": [NAME],
                                "Layers": [f"blobs/sha256/{layer_digest}"]}]),
    }
    with tarfile.open(path, "w") as archive:
        for name, data in (blobs | tops).items():
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = 0o644, len(data)
            archive.addfile(entry, io.BytesIO(data))
