"""The engine itself: info, version, system df.

Runs in: the boxship command.
Spec: docker's commands of these names; Docker Engine API, /info, /version, /system/df.
"""

from __future__ import annotations

import os

from boxship import __version__
from boxship.cli.command import Command
from boxship.cli.http.client import ConnectFailed
from boxship.cli.show import units
from boxship.cli.show.table import Listing, columns, write
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from boxship.cli.command import Call

API_VERSION = "1.50"
"""The version of the Docker Engine API that this command was written against; the engine's own is asked for without a number."""
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def _render(form: str, value: object) -> str:
    if form == "json":
        return text.dumps(value) + "\n"
    from boxship.cli.show.gotemplate import Template

    return Template(form.replace("\\t", "\t").replace("\\n", "\n")).render(value) + "\n"


# --- version ---------------------------------------------------------------------------------------------------------


def version(call: Call) -> int:
    """`boxship version`."""
    import sys

    machine = _MACHINES.get(os.uname().machine, os.uname().machine)
    api, failure, server = API_VERSION, "", None
    try:
        server = call.engine.send("GET", "/version").json()
        api = min(API_VERSION, server.get("ApiVersion") or API_VERSION, key=lambda v: [int(part) for part in v.split(".")])
    except ConnectFailed as error:
        failure = str(error)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
    client = {
        "Version": __version__,
        "ApiVersion": api,
        "DefaultAPIVersion": API_VERSION,
        "PythonVersion": python,
        "Os": "linux",
        "Arch": machine,
        "Context": "default",
    }
    form = call.format()
    if form:
        # Templates know the same fields by Go's names too.
        document = {"Client": {**client, **({} if form == "json" else {"APIVersion": api})}, "Server": server}
        if server is not None and form != "json":
            document["Server"] = {**server, "APIVersion": server.get("ApiVersion"), "MinAPIVersion": server.get("MinAPIVersion")}
        if server is None and form != "json" and ".Server" in form:
            write(f"{failure}\n", 2)
            return 1
        write(_render(form, document))
    else:
        older = f" (downgraded from {API_VERSION})" if api != API_VERSION else ""
        rows = [
            ("Client:", ""),
            (" Version:", __version__),
            (" API version:", api + older),
            (" Python version:", python),
            (" OS/Arch:", f"linux/{machine}"),
            (" Context:", "default"),
        ]
        write(_aligned(rows))
        if server is not None:
            write("\n" + _server(server))
    if failure:
        write(f"{failure}\n", 2)
        return 1
    return 0


def _aligned(rows: list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows) + 1
    return "".join(f"{left:<{width}}{right}\n" if right or left.startswith("  ") else f"{left}\n" for left, right in rows)


def _server(server: dict[str, Any]) -> str:
    name = (server.get("Platform") or {}).get("Name")
    rows: list[tuple[str, str]] = [(f"Server: {name}" if name else "Server:", "")]
    components = server.get("Components") or [{"Name": "Engine", "Version": server.get("Version", ""), "Details": server}]
    for component in components:
        details = component.get("Details") or {}
        rows += [(f" {component['Name']}:", ""), ("  Version:", str(component.get("Version") or ""))]
        if component["Name"] == "Engine":
            rows += [("  API version:", f"{details.get('ApiVersion')} (minimum version {details.get('MinAPIVersion')})")]
            rows += [
                (f"  {label}:", str(details[key]))
                for key, label in (
                    ("GoVersion", "Go version"),
                    ("PythonVersion", "Python version"),
                    ("GitCommit", "Git commit"),
                    ("BuildTime", "Built"),
                )
                if details.get(key)
            ]
            rows += [
                ("  OS/Arch:", f"{details.get('Os')}/{details.get('Arch')}"),
                ("  Experimental:", str(details.get("Experimental", "false"))),
            ]
        else:
            rows += [(f"  {key}:", str(details[key] or "")) for key in sorted(details)]
    return _aligned(rows)


# --- info ------------------------------------------------------------------------------------------------------------


def info(call: Call) -> int:
    """`boxship info`."""
    form = call.format()
    client = {"Debug": False, "Version": __version__, "Context": "default", "Plugins": []}
    failure = ""
    try:
        found = call.engine.send("GET", "/info").json()
    except ConnectFailed as error:
        failure, found = str(error), {}
    if form:
        write(_render(form, {**found, "ClientInfo": client, **({"ServerErrors": [failure]} if failure else {})}))
    else:
        write(f"Client:\n Version:    {__version__}\n Context:    default\n Debug Mode: false\n\nServer:\n")
        if not failure:
            write(_info(found))
    if failure:
        write(f"{failure}\n", 2)
        return 1
    for warning in [] if form else found.get("Warnings") or []:
        write(f"{warning}\n", 2)
    return 0


def _info(found: dict[str, Any]) -> str:
    lines = [f"Containers: {found.get('Containers', 0)}"]
    lines += [f" {label}: {found.get(f'Containers{label}', 0)}" for label in ("Running", "Paused", "Stopped")]
    lines += [f"Images: {found.get('Images', 0)}"]
    lines += _set(found, ("ServerVersion", "Server Version"), ("Driver", "Storage Driver"))
    lines += [f" {name}: {value}" for name, value in found.get("DriverStatus") or []]
    lines += _set(
        found, ("LoggingDriver", "Logging Driver"), ("CgroupDriver", "Cgroup Driver"), ("CgroupVersion", "Cgroup Version")
    )
    plugins = found.get("Plugins") or {}
    lines += ["Plugins:"] + [
        f" {label}: {' '.join(plugins[label])}" for label in ("Volume", "Network", "Authorization", "Log") if plugins.get(label)
    ]
    swarm = found.get("Swarm") or {}
    lines += [f"Swarm: {swarm.get('LocalNodeState') or 'inactive'}"]
    if found.get("Runtimes"):
        lines += [f"Runtimes: {' '.join(sorted(found['Runtimes']))}", f"Default Runtime: {found.get('DefaultRuntime', '')}"]
    lines += _set(found, ("InitBinary", "Init Binary"))
    for key, label in (("ContainerdCommit", "containerd"), ("RuncCommit", "runc"), ("InitCommit", "init")):
        commit = found.get(key)
        if commit:
            lines += [f"{label} version: {commit.get('ID', '')}"]
    lines += _security(found.get("SecurityOptions") or [])
    lines += _set(
        found,
        ("KernelVersion", "Kernel Version"),
        ("OperatingSystem", "Operating System"),
        ("OSType", "OSType"),
        ("Architecture", "Architecture"),
    )
    lines += [f"CPUs: {found.get('NCPU', 0)}", f"Total Memory: {units.binary_size(found.get('MemTotal', 0))}"]
    lines += _set(found, ("Name", "Name"), ("ID", "ID"), ("DockerRootDir", "Docker Root Dir"))
    lines += [f"Debug Mode: {_yes(found.get('Debug'))}"]
    lines += _set(found, ("HttpProxy", "HTTP Proxy"), ("HttpsProxy", "HTTPS Proxy"), ("NoProxy", "No Proxy"))
    if found.get("Labels"):
        lines += ["Labels:", *(f" {label}" for label in found["Labels"])]
    lines += [f"Experimental: {_yes(found.get('ExperimentalBuild'))}"]
    registry = found.get("RegistryConfig") or {}
    insecure = [name for name, index in sorted((registry.get("IndexConfigs") or {}).items()) if not index.get("Secure")]
    networks = registry.get("InsecureRegistryCIDRs") or []
    if insecure or networks:
        lines += ["Insecure Registries:", *(f" {name}" for name in [*insecure, *networks])]
    if registry.get("Mirrors"):
        lines += ["Registry Mirrors:", *(f" {name}" for name in registry["Mirrors"])]
    lines += [f"Live Restore Enabled: {_yes(found.get('LiveRestoreEnabled'))}"]
    return "".join(f" {line}\n" for line in lines) + "\n"


def _set(found: dict[str, Any], *names: tuple[str, str]) -> list[str]:
    return [f"{label}: {found[key]}" for key, label in names if found.get(key)]


def _yes(value: object) -> str:
    return "true" if value else "false"


def _security(options: list[str]) -> list[str]:
    lines = ["Security Options:"] if options else []
    for option in options:
        pairs = dict(pair.partition("=")[::2] for pair in option.split(","))
        lines.append(f" {pairs.pop('name', option)}")
        lines += [f"  {key.title()}: {value}" for key, value in pairs.items()]
    return lines


# --- system df -------------------------------------------------------------------------------------------------------

_SUMMARY = {"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE"}


def _kind(name: str, total: int, active: int, size: int, reclaimable: int, *, share: bool = True) -> dict[str, object]:
    percent = f" ({reclaimable * 100 // size}%)" if share and size > 0 else ""
    return {
        "Type": name,
        "TotalCount": str(total),
        "Active": str(active),
        "Size": units.size(size),
        "Reclaimable": units.size(reclaimable) + percent,
    }


def summary(found: dict[str, Any]) -> list[dict[str, object]]:
    """The four lines of `system df`."""
    images, containers = found.get("Images") or [], found.get("Containers") or []
    volumes, caches = found.get("Volumes") or [], found.get("BuildCache") or []
    used_images = [image for image in images if (image.get("Containers") or 0) > 0]
    layers = found.get("LayersSize") or 0
    # What images in use need and share with none: the rest can go.
    used = sum(image["Size"] - max(image.get("SharedSize") or 0, 0) for image in used_images if image.get("Size", -1) >= 0)
    running = [container for container in containers if container.get("State") in ("running", "paused", "restarting")]
    size = sum(container.get("SizeRw") or 0 for container in containers)
    usage = [volume.get("UsageData") or {} for volume in volumes]
    volume_size = sum(max(item.get("Size", 0), 0) for item in usage)
    volume_free = sum(max(item.get("Size", 0), 0) for item in usage if not item.get("RefCount"))
    cache_size = sum(cache.get("Size", 0) for cache in caches if not cache.get("Shared"))
    cache_free = sum(cache.get("Size", 0) for cache in caches if not cache.get("Shared") and not cache.get("InUse"))
    return [
        _kind("Images", len(images), len(used_images), layers, max(layers - used, 0)),
        _kind(
            "Containers", len(containers), len(running), size, size - sum(container.get("SizeRw") or 0 for container in running)
        ),
        _kind("Local Volumes", len(volumes), sum(1 for item in usage if item.get("RefCount", 0) > 0), volume_size, volume_free),
        _kind("Build Cache", len(caches), sum(1 for cache in caches if cache.get("InUse")), cache_size, cache_free, share=False),
    ]


def disk_usage(call: Call) -> int:
    """`boxship system df`."""
    from boxship.kit.errors import BoxshipError

    form = call.format()
    found = call.engine.send("GET", "/system/df").json()
    if not call.on("verbose"):
        Listing(form, tuple(_SUMMARY), _SUMMARY).show(summary(found))
        return 0
    if form == "json":
        write(text.dumps({key: found.get(key) or [] for key in ("Images", "Containers", "Volumes", "BuildCache")}) + "\n")
        return 0
    if form:
        raise BoxshipError("the verbose and the format options conflict")
    from boxship.cli.verbs import images as image_verbs
    from boxship.cli.verbs import ps

    lines = [image_verbs.rows(image)[0] for image in found.get("Images") or []]
    write("Images space usage:\n\n")
    names = ("Repository", "Tag", "ID", "CreatedSince", "Size", "SharedSize", "UniqueSize", "Containers")
    Listing("", names, image_verbs.HEADINGS).show(lines)
    write("\nContainers space usage:\n\n")
    names = ("ID", "Image", "Command", "LocalVolumes", "Size", "RunningFor", "Status", "Names")
    Listing("", names, ps.HEADINGS).show(
        [ps.container({**container, "SizeRootFs": 0}) for container in found.get("Containers") or []]
    )
    write("\nLocal Volumes space usage:\n\n")
    rows = [
        [
            str(volume["Name"]),
            str((volume.get("UsageData") or {}).get("RefCount", "N/A")),
            units.size((volume.get("UsageData") or {}).get("Size", 0)),
        ]
        for volume in found.get("Volumes") or []
    ]
    write(columns([["VOLUME NAME", "LINKS", "SIZE"], *rows]))
    caches = found.get("BuildCache") or []
    write(f"\nBuild cache usage: {units.size(sum(cache.get('Size', 0) for cache in caches))}\n\n")
    rows = [
        [
            cache["ID"][:12],
            cache.get("Type", ""),
            units.size(cache.get("Size", 0)),
            "",
            "",
            str(cache.get("UsageCount", 0)),
            _yes(cache.get("Shared")),
        ]
        for cache in caches
    ]
    write(columns([["CACHE ID", "CACHE TYPE", "SIZE", "CREATED", "LAST USED", "USAGE", "SHARED"], *rows]))
    return 0


# --- system check ----------------------------------------------------------------------------------------------------


def check(call: Call) -> int:
    """`boxship system check`: looks at the store itself, with or without a daemon."""
    from boxship.containerd.metadata import check as store

    root = call.text("root")
    if not root:
        root = "/var/lib/boxship"
        if os.geteuid():
            data = call.environ.get("XDG_DATA_HOME") or os.path.join(call.environ.get("HOME", "/"), ".local/share")
            root = os.path.join(data, "boxship")
    found = store.root(root)
    write("".join(line + "\n" for line in found) or f"{root}: all is well\n")
    return 1 if found else 0


_FORMAT = """
f,format string | Format output using a custom template: 'json' or a Go template
json | Print the output as JSON
"""
COMMANDS = {
    "info": Command(" [OPTIONS]", "Display system-wide information", info, _FORMAT),
    "version": Command(" [OPTIONS]", "Show the version information of the command and the engine", version, _FORMAT),
    "system check": Command(
        " [OPTIONS]",
        "Check that metadata, content and snapshots agree; reads all content",
        check,
        """
root string | Directory of the daemon (default "/var/lib/boxship")
""",
    ),
    "system df": Command(
        " [OPTIONS]",
        "Show how much disk space is used",
        disk_usage,
        """
format string | Format output using a custom template: 'table', 'json' or a Go template
json | Print the output as JSON, one object a line
v,verbose | Show detailed information on space usage
""",
    ),
}
