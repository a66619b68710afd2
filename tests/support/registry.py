"""A registry on loopback for tests: it keeps the distribution-spec, unless a test asks it to misbehave.

`hooks` are asked in turn before a request is answered: `async def hook(request) -> aiohttp.web.StreamResponse | None`.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid

from aiohttp import web

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(media_type, data, /, **more):
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


class Registry:
    """State and HTTP server; `async with Registry() as registry`."""

    def __init__(self, *, referrers=True, ssl=None):
        self.blobs = {}
        self.manifests = {}
        self.uploads = {}
        self.log = []
        self.hooks = []
        self.referrers = referrers
        self.minimum = 0
        self.many_tags = True
        self.address = ""
        self._ssl = ssl
        self._runner = None

    async def __aenter__(self):
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{tail:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._ssl)
        await site.start()
        self.address = f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    def asked(self, method):
        return [path for verb, path in self.log if verb == method]

    def add_blob(self, repo, data):
        self.blobs.setdefault(repo, {})[digest_of(data)] = data
        return digest_of(data)

    def add_manifest(self, repo, document, *names, media_type=None):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        kind = media_type or json.loads(data).get("mediaType", MANIFEST)
        for name in (digest_of(data), *names):
            self.manifests.setdefault(repo, {})[name] = (kind, data)
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data)}

    def add_image(self, repo, tag, layers=(b"layer one", b"layer two"), architecture="amd64", variant="", **more):
        """An image whose layers are these bytes as they are; returns the manifest's descriptor."""
        platform = {"os": "linux", "architecture": architecture, **({"variant": variant} if variant else {})}
        config = json.dumps({**platform, "rootfs": {"type": "layers", "diff_ids": [digest_of(each) for each in layers]}}).encode()
        for data in (config, *layers):
            self.add_blob(repo, data)
        document = {
            "schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG, config),
            "layers": [descriptor(LAYER, each) for each in layers], **more,
        }
        return {**self.add_manifest(repo, document, *([tag] if tag else [])), "platform": platform}

    async def _serve(self, request):
        self.log.append((request.method, request.path_qs))
        for hook in list(self.hooks):
            answer = await hook(request)
            if answer is not None:
                return answer
        path = request.path
        if path in ("/v2", "/v2/"):
            return web.json_response({})
        for pattern, handler in (
            (r"/v2/(.+)/manifests/([^/]+)", self._manifest), (r"/v2/(.+)/blobs/([a-z0-9]+:[0-9a-f]+)", self._blob),
            (r"/v2/(.+)/blobs/uploads/()", self._start), (r"/v2/(.+)/blobs/uploads/([^/]+)", self._upload),
            (r"/v2/(.+)/referrers/([^/]+)", self._referrers), (r"/v2/(.+)/tags/(list)", self._tags),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                return await handler(request, match[1], match[2])
        return error(404, "UNSUPPORTED")

    async def _manifest(self, request, repo, name):
        known = self.manifests.setdefault(repo, {})
        if request.method == "PUT":
            data = await request.read()
            kind = request.headers["Content-Type"]
            document = json.loads(data)
            for child in [document["config"], *document["layers"]] if "config" in document else []:
                if child["digest"] not in self.blobs.get(repo, {}):
                    return error(404, "MANIFEST_BLOB_UNKNOWN")
            for child in document.get("manifests", []) if not name.startswith("sha256-") else []:
                if child["digest"] not in known:
                    return error(404, "MANIFEST_BLOB_UNKNOWN")
            tags = request.query.getall("tag", []) if self.many_tags else []
            for key in (name, digest_of(data), *tags):
                known[key] = (kind, data)
            headers = {"Location": f"/v2/{repo}/manifests/{name}", "Docker-Content-Digest": digest_of(data)}
            if tags:
                headers["OCI-Tag"] = ", ".join(tags)
            if self.referrers and document.get("subject"):
                headers["OCI-Subject"] = document["subject"]["digest"]
            return web.Response(status=201, headers=headers)
        if name not in known:
            return error(404, "MANIFEST_UNKNOWN")
        kind, data = known[name]
        headers = {"Content-Type": kind, "Docker-Content-Digest": digest_of(data)}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(data))})
        return web.Response(body=data, headers=headers)

    async def _blob(self, request, repo, digest):
        data = self.blobs.get(repo, {}).get(digest)
        if data is None:
            return error(404, "BLOB_UNKNOWN")
        headers = {"Docker-Content-Digest": digest, "Content-Type": "application/octet-stream"}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(data))})
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if asked:
            begin = int(asked[1])
            if begin >= len(data):
                return web.Response(status=416)
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return web.Response(status=206, body=data[begin:], headers=headers)
        return web.Response(body=data, headers=headers)

    async def _start(self, request, repo, _):
        source, digest = request.query.get("from"), request.query.get("mount")
        if digest and digest in self.blobs.get(source, {}):
            self.blobs.setdefault(repo, {})[digest] = self.blobs[source][digest]
            return web.Response(status=201, headers={"Location": f"/v2/{repo}/blobs/{digest}"})
        name = uuid.uuid4().hex
        self.uploads[name] = bytearray()
        headers = {"Location": f"/v2/{repo}/blobs/uploads/{name}?state=a%2Fb"}
        if self.minimum:
            headers["OCI-Chunk-Min-Length"] = str(self.minimum)
        return web.Response(status=202, headers=headers)

    async def _upload(self, request, repo, name):
        if name not in self.uploads or request.query.get("state") != "a/b":
            return error(404, "BLOB_UPLOAD_UNKNOWN")
        data = self.uploads[name]
        location = {"Location": f"{name}?state=a%2Fb", "Range": f"0-{max(len(data) - 1, 0)}"}
        if request.method == "GET":
            return web.Response(status=204, headers=location)
        if request.method == "DELETE":
            del self.uploads[name]
            return web.Response(status=204)
        asked = re.fullmatch(r"(\d+)-(\d+)", request.headers.get("Content-Range", ""))
        if asked and int(asked[1]) != len(data):
            return web.Response(status=416, headers=location)
        body = await request.read()
        if asked and len(body) != int(asked[2]) - int(asked[1]) + 1:
            return error(400, "SIZE_INVALID")
        data += body
        if request.method == "PATCH":
            return web.Response(status=202, headers={**location, "Range": f"0-{max(len(data) - 1, 0)}"})
        if digest_of(data) != request.query["digest"]:
            return error(400, "DIGEST_INVALID")
        self.blobs.setdefault(repo, {})[digest_of(data)] = bytes(data)
        del self.uploads[name]
        return web.Response(status=201, headers={"Location": f"/v2/{repo}/blobs/{digest_of(data)}"})

    async def _referrers(self, request, repo, digest):
        if not self.referrers:
            return web.Response(status=404, text="404 page not found")
        found = []
        for name, (kind, data) in sorted(self.manifests.get(repo, {}).items()):
            document = json.loads(data)
            if ":" in name and document.get("subject", {}).get("digest") == digest:
                artifact = document.get("artifactType") or document.get("config", {}).get("mediaType", "")
                found.append({**descriptor(kind, data), "artifactType": artifact, "annotations": document.get("annotations", {})})
        page = int(request.query.get("page", "0"))
        headers = {}
        if page + 1 < len(found):
            headers["Link"] = f'</v2/{repo}/referrers/{digest}?page={page + 1}>; rel="next"'
        body = {"schemaVersion": 2, "mediaType": INDEX, "manifests": found[page:page + 1]}
        return web.Response(body=json.dumps(body), content_type=INDEX, headers=headers)

    async def _tags(self, request, repo, _):
        tags = sorted(name for name in self.manifests.get(repo, {}) if ":" not in name)
        last = request.query.get("last", "")
        tags = [tag for tag in tags if tag > last][:2]
        more = {"Link": f'</v2/{repo}/tags/list?last={tags[-1]}>; rel="next"'} if len(tags) == 2 else {}
        return web.json_response({"name": repo, "tags": tags}, headers=more)


def error(status, code, message="", **headers):
    return web.json_response({"errors": [{"code": code, "message": message or code.lower()}]}, status=status, headers=headers)
