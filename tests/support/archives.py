"""Image archives of every form, made on the spot, small and with bytes that are always the same."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def hexes(data):
    return hashlib.sha256(data).hexdigest()


def layer(**files):
    """A layer with these files: name → content."""
    return tarball([(name.replace("__", "/"), data) for name, data in files.items()])


def tarball(members):
    """A tar of (name, bytes), (name, "-> target") for a symbolic link, (name, "=> target") for a hard link, (name, None) for a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.mode = 0o644
            if data is None:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(data, str):
                entry.type = tarfile.SYMTYPE if data.startswith("->") else tarfile.LNKTYPE
                entry.linkname = data[3:]
            else:
                entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data) if isinstance(data, bytes) else None)
    return buffer.getvalue()


def config(layers, architecture="amd64", **more):
    """The configuration of an image of these uncompressed layers."""
    return json.dumps({
        "architecture": architecture, "os": "linux", "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(each) for each in layers]}, **more,
    }).encode()


def old_docker(images, order=None, link=False):
    """A docker-archive of Docker before 25: images are (names, layers). `link`: a layer that is there twice is a link the second time."""
    members, manifest, seen = [], [], {}
    for names, layers in images:
        image = config(layers)
        members.append((f"{hexes(image)}.json", image))
        paths = []
        for number, data in enumerate(layers):
            folder = hexes(image[:10] + data + bytes([number]) + str(names).encode())
            members += [(f"{folder}/", None), (f"{folder}/VERSION", b"1.0"), (f"{folder}/json", b"{}")]
            target = f"{folder}/layer.tar"
            if link and data in seen:
                members.append((target, f"-> ../{seen[data]}"))
            else:
                members.append((target, data))
                seen[data] = target
            paths.append(target)
        manifest.append({"Config": f"{hexes(image)}.json", "RepoTags": names, "Layers": paths})
    members.append(("manifest.json", json.dumps(manifest).encode()))
    members.append(("repositories", b"{}"))
    return tarball(order(members) if order else members)


class Layout:
    """An OCI layout in the making."""

    def __init__(self):
        self.blobs = {}
        self.entries = []
        self.docker = []

    def blob(self, media_type, data, **more):
        self.blobs[f"blobs/sha256/{hexes(data)}"] = data
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}

    def image(self, layers, pack=lambda data: data, layer_type=OCI_LAYER, architecture="amd64"):
        """Adds an image, and returns its descriptor."""
        image = self.blob(OCI_CONFIG, config(layers, architecture))
        document = {
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": image, "layers": [self.blob(layer_type, pack(each)) for each in layers],
        }
        return self.blob(OCI_MANIFEST, json.dumps(document).encode(), platform={"os": "linux", "architecture": architecture})

    def index(self, manifests):
        return self.blob(OCI_INDEX, json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode())

    def name(self, descriptor, name="", full=""):
        """An entry of index.json."""
        annotations = {**({"org.opencontainers.image.ref.name": name} if name else {}), **({"io.containerd.image.name": full} if full else {})}
        self.entries.append({**descriptor, "annotations": annotations} if annotations else descriptor)

    def members(self):
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self.entries}).encode()
        members = [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", index), *self.blobs.items()]
        if self.docker:
            members.append(("manifest.json", json.dumps(self.docker).encode()))
        return members

    def tar(self):
        return tarball(self.members())
