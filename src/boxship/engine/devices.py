"""Devices that vendors describe: `--device VENDOR/CLASS=NAME` and `--gpus`.

Runs in: the daemon.
Spec: boxship.oci.cdi; Docker Engine API, DeviceRequest. Documents are read anew for each start: vendors' tools write them when a
device comes or goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from boxship.engine import spec
from boxship.kit.errors import BoxshipError, InvalidArgument, Unsupported
from boxship.oci import cdi

_GPU_VENDORS = ("nvidia.com", "amd.com", "intel.com")


def known(directories: tuple[str, ...]) -> dict[str, cdi.Device]:
    """Every device that a document offers, by its full name. What is no document is left out, as the specification has it."""
    return cdi.registry(_documents(directories))


def _documents(directories: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    for rank, directory in enumerate(directories):
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            if name.endswith((".json", ".yaml", ".yml")):
                found = _read(os.path.join(directory, name))
                if isinstance(found, dict):
                    yield rank, found


def _read(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    if path.endswith(".json"):
        return None
    try:
        import yaml  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        raise Unsupported(f"{path} is written in YAML", "pip install pyyaml, or have it written as JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def add(config: dict[str, Any], requests: list[dict[str, Any]], directories: tuple[str, ...]) -> None:
    """Give a container the devices of HostConfig.DeviceRequests: changes its runtime configuration.

    Raises NotFound for a device that nobody offers, BoxshipError for a request that no driver here serves.
    """
    if not requests:
        return
    devices = known(directories)
    names: list[str] = []
    for request in requests:
        names += _names(request, devices)
    cdi.inject(config, names, devices, spec.device_numbers)


def _names(request: dict[str, Any], devices: dict[str, cdi.Device]) -> list[str]:
    driver, wanted = str(request.get("Driver") or ""), [str(each) for each in request.get("DeviceIDs") or []]
    if driver == "cdi":
        return wanted
    capabilities = request.get("Capabilities") or []
    vendors = [vendor for vendor in _GPU_VENDORS if any(name.startswith(f"{vendor}/gpu=") for name in devices)]
    if driver:
        vendors = [vendor for vendor in vendors if vendor.partition(".")[0] == driver]
    if not vendors or not any("gpu" in each for each in capabilities):
        shown = "[" + " ".join("[" + " ".join(map(str, each)) + "]" for each in capabilities) + "]"
        raise BoxshipError(
            f'could not select device driver "{driver}" with capabilities: {shown}',
            "write a CDI document for the device into /etc/cdi, as nvidia-ctk cdi generate does")
    kind, count = f"{vendors[0]}/gpu", request.get("Count") or 0
    if not isinstance(count, int):
        raise InvalidArgument("DeviceRequest.Count is not a number")
    if wanted:
        if count:
            raise InvalidArgument("cannot set both Count and DeviceIDs on device request")
        return [each if cdi.is_name(each) else f"{kind}={each}" for each in wanted]
    return [f"{kind}=all"] if count < 0 else [f"{kind}={number}" for number in range(count)]
