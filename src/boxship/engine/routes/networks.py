"""/networks.

Runs in: the daemon, on its event loop.
Spec: Docker Engine API v1.51, Network.
"""

from __future__ import annotations

import secrets
from typing import Any

from aiohttp import web

from boxship.engine import networking, shapes, times
from boxship.engine.events import Filters, labelled, parse_filters, truth
from boxship.engine.http import VERSION, Routes, answer, body_of, nothing
from boxship.engine.routes.containers import whole
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound, PermissionDenied, Unsupported
from boxship.network import Network, Pool

routes = Routes()

_CREATE = {
    "Name": "string",
    "Driver": "string",
    "Scope": "string",
    "EnableIPv4": "bool?",
    "EnableIPv6": "bool?",
    "IPAM": "map?",
    "Internal": "bool",
    "Attachable": "bool",
    "Ingress": "bool",
    "ConfigOnly": "bool",
    "ConfigFrom": "map?",
    "Options": "map",
    "Labels": "map",
}
_IPAM = {"Driver": "string", "Options": "map?", "Config": "[]object"}
_POOL = {"Subnet": "string", "IPRange": "string", "Gateway": "string", "AuxiliaryAddresses": "map"}
_FILTERS = frozenset(("dangling", "driver", "id", "label", "name", "scope", "type"))
_CONNECT = {"Container": "string", "EndpointConfig": "map?", "Force": "bool"}


def _chosen(engine: Any, filters: Filters) -> list[Network]:
    core = engine.core
    found: list[Network] = core.networks.all()
    if "name" in filters:
        found = [each for each in found if any(text in each.name for text in filters["name"])]
    if "id" in filters:
        found = [each for each in found if any(each.id.startswith(text) for text in filters["id"])]
    if "driver" in filters:
        found = [each for each in found if each.driver in filters["driver"]]
    if "scope" in filters:
        found = [each for each in found if "local" in filters["scope"]]
    if "label" in filters:
        found = [each for each in found if labelled(each.labels, filters["label"])]
    if "type" in filters:
        for kind in filters["type"]:
            if kind not in ("custom", "builtin"):
                raise InvalidArgument(f"invalid filter: 'type'='{kind}'")
        found = [each for each in found if ("builtin" if each.predefined else "custom") in filters["type"]]
    if "dangling" in filters:
        wanted = truth(filters, "dangling", default=False)
        found = [each for each in found if not each.predefined and networking.unused(core, each) == wanted]
    return found


@routes.get("/networks")
async def list_networks(engine: Any, request: web.Request) -> web.StreamResponse:
    filters = parse_filters(request.query.get("filters", ""), _FILTERS)
    with_containers = request[VERSION] < (1, 28)
    rows = [networking.shown_network(engine.core, each, with_containers=with_containers) for each in _chosen(engine, filters)]
    return answer(rows)


@routes.post("/networks/create")
async def create_network(engine: Any, request: web.Request) -> web.StreamResponse:
    body = shapes.shape(await body_of(request), _CREATE, "CreateRequest")
    name = body["Name"]
    if not name.strip():
        raise InvalidArgument("invalid name: name is empty")
    if name in ("bridge", "host", "none", "default"):
        raise PermissionDenied(f"operation is not permitted on predefined {name} network ")
    if body["Ingress"]:
        raise Unsupported("ingress networks belong to a swarm")
    ipam = shapes.shape(body["IPAM"] or {}, _IPAM, "IPAM")
    if ipam["Driver"] not in ("", "default", "null"):
        raise NotFound(f'plugin "{ipam["Driver"]}" not found')
    pools = []
    for each in ipam["Config"] or []:
        shaped = shapes.shape(each, _POOL, "IPAMConfig")
        pools.append(Pool(shaped["Subnet"], shaped["Gateway"], shaped["IPRange"], shaped["AuxiliaryAddresses"]))
    source = shapes.member(body["ConfigFrom"], "Network") or ""
    network = Network(
        secrets.token_hex(32),
        name,
        times.now(),
        body["Driver"] or "bridge",
        enable_ipv4=body["EnableIPv4"] is not False,
        enable_ipv6=bool(body["EnableIPv6"]),
        internal=body["Internal"],
        attachable=body["Attachable"],
        config_only=body["ConfigOnly"],
        config_from=str(source),
        ipam_options=ipam["Options"] or {},
        pools=pools,
        options={key: str(value) for key, value in body["Options"].items()},
        labels={key: str(value) for key, value in body["Labels"].items()},
    )
    network.chosen = any(each.subnet for each in pools)
    made = await whole(engine.core.networks.create(network))
    return answer({"Id": made.id, "Warning": ""}, 201)


@routes.post("/networks/prune")
async def prune_networks(engine: Any, request: web.Request) -> web.StreamResponse:
    core = engine.core
    filters = parse_filters(request.query.get("filters", ""), frozenset(("label", "label!", "until")))
    limits = [times.moment(text) for text in filters.get("until", [])]
    deleted = []
    for each in core.networks.all():
        if each.predefined or not networking.unused(core, each):
            continue
        if (
            any(times.nanoseconds(each.created) >= limit for limit in limits)
            or not labelled(each.labels, filters.get("label", []))
            or any(labelled(each.labels, [text]) for text in filters.get("label!", []))
        ):
            continue
        try:
            await whole(core.networks.remove(each))
        except BoxshipError:
            continue  # taken in the meantime
        deleted.append(each.name)
    core.events.publish("network", "prune", "", {"reclaimed": "0"})
    return answer({"NetworksDeleted": deleted or None})


@routes.post("/networks/{name}/connect")
async def connect_network(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    body = shapes.shape(await body_of(request), _CONNECT, "ConnectOptions")
    network = engine.core.networks.get(name)
    container = engine.core.get(body["Container"])
    await whole(engine.connect(network, container, body["EndpointConfig"]))
    return nothing(200)


@routes.post("/networks/{name}/disconnect")
async def disconnect_network(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    body = shapes.shape(await body_of(request), _CONNECT, "DisconnectOptions")
    network = engine.core.networks.get(name)
    try:
        container = engine.core.get(body["Container"])
    except NotFound:
        if body["Force"]:
            raise NotFound(f"endpoint {body['Container']} not found") from None
        raise
    await whole(engine.disconnect(network, container, force=body["Force"]))
    return nothing(200)


@routes.get("/networks/{name}")
async def inspect_network(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    return answer(networking.shown_network(engine.core, engine.core.networks.get(name)))


@routes.delete("/networks/{name}")
async def remove_network(engine: Any, request: web.Request, name: str) -> web.StreamResponse:
    await whole(engine.core.networks.remove(engine.core.networks.get(name)))
    return nothing()
