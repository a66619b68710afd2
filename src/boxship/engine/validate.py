"""What dockerd checks of a container's configuration before it makes one, and the defaults that it fills in.

Runs in: the daemon.
Spec: Docker Engine API, ContainerCreate; dockerd's words for what it refuses.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from boxship.engine import logs, spec
from boxship.kit.errors import InvalidArgument

NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_RESTARTS = ("", "no", "always", "unless-stopped", "on-failure")
_SIGNALS: dict[str, int] = {}
_MEMORY_MIN = 6 << 20


def name(text: str) -> str:
    """A container's name without the slash. Raises InvalidArgument."""
    if not NAME.match(text):
        raise InvalidArgument(f"Invalid container name ({text}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return text.removeprefix("/")


def signal(text: str) -> int:
    """The number of a signal by name or number. Raises InvalidArgument."""
    import signal as signals

    if not _SIGNALS:
        _SIGNALS.update({each.name.removeprefix("SIG"): each.value for each in signals.Signals})
        _SIGNALS["CLD"], _SIGNALS["POLL"] = 17, 29
        _SIGNALS.update({f"RTMIN+{n}": 34 + n for n in range(1, 16)} | {f"RTMAX-{n}": 64 - n for n in range(1, 16)})
    if text.isdigit():
        if 0 < int(text) <= 64:
            return int(text)
        raise InvalidArgument(f"the linux daemon does not support signal {text}")
    found = _SIGNALS.get(text.upper().removeprefix("SIG"))
    if found is None:
        raise InvalidArgument(f"invalid signal: {text}")
    return found


def check(config: dict[str, Any], host: dict[str, Any]) -> list[str]:
    """Raise InvalidArgument for what no container can have, fill in defaults of `host`; returns warnings."""
    warnings: list[str] = []
    for word in config["Env"] or []:
        if not word or word.startswith("="):
            raise InvalidArgument(f"invalid environment variable: {word}")
    if config["WorkingDir"] and not config["WorkingDir"].startswith("/"):
        raise InvalidArgument(f"the working directory '{config['WorkingDir']}' is invalid, it needs to be an absolute path")
    if config["StopSignal"]:
        signal(config["StopSignal"])
    if config["StopTimeout"] is not None and config["StopTimeout"] < -1:
        config["StopTimeout"] = None
    _check_health(config["Healthcheck"])
    restart_policy(host["RestartPolicy"], auto_remove=host["AutoRemove"])
    host["RestartPolicy"]["Name"] = host["RestartPolicy"]["Name"] or "no"
    log = host["LogConfig"]
    log["Type"] = log["Type"] or "json-file"
    logs.check_options(log["Type"], log["Config"])
    resources(host)
    spec.capability_set(host["CapAdd"] or [], host["CapDrop"] or [], privileged=False)
    spec.security_options(host["SecurityOpt"] or [])
    _modes(host)
    _unused(host)
    for path in host["Tmpfs"] or {}:
        if not path.startswith("/"):
            raise InvalidArgument(f"invalid mount path: '{path}' mount path must be absolute")
    for entry in host["ExtraHosts"] or []:
        mapping = entry.partition("=" if "=" in entry else ":")
        if not mapping[0] or not mapping[2]:
            raise InvalidArgument(f'bad format for add-host: "{entry}"')
    for address in host["Dns"] or []:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise InvalidArgument(f"bad nameserver address {address}: unable to parse IP") from None
    if host["Memory"] > 0 and host["MemorySwap"] == 0:
        host["MemorySwap"] = host["Memory"] * 2
    host["ShmSize"] = host["ShmSize"] or spec.SHM_SIZE
    if host["ShmSize"] < 0:
        raise InvalidArgument("SHM size can not be less than 0")
    if host["OomKillDisable"] is None:
        host["OomKillDisable"] = False
    if host["Privileged"]:
        host["MaskedPaths"] = host["MaskedPaths"] or []
        host["ReadonlyPaths"] = host["ReadonlyPaths"] or []
        if not any(option.startswith("label") for option in host["SecurityOpt"] or []):
            host["SecurityOpt"] = [*(host["SecurityOpt"] or []), "label=disable"]
    elif any(option == "systempaths=unconfined" for option in host["SecurityOpt"] or []):
        host["MaskedPaths"], host["ReadonlyPaths"] = [], []
    else:
        if host["MaskedPaths"] is None:
            host["MaskedPaths"] = list(spec.MASKED)
        if host["ReadonlyPaths"] is None:
            host["ReadonlyPaths"] = list(spec.READ_ONLY)
    return warnings


def _unused(host: dict[str, Any]) -> None:
    """Raise InvalidArgument for what dockerd on Linux has no use for, or only on file systems with quotas of projects."""
    if host["Isolation"] not in ("", "default"):
        raise InvalidArgument(f"invalid isolation ({host['Isolation']}): linux only supports 'default'")
    if host["StorageOpt"]:
        raise InvalidArgument("--storage-opt is supported only for overlay over xfs with 'pquota' mount option")


def restart_policy(policy: dict[str, Any], *, auto_remove: bool = False) -> None:
    """Raise InvalidArgument for a policy that is none."""
    kind, count = policy["Name"], policy["MaximumRetryCount"]
    if kind not in _RESTARTS:
        raise InvalidArgument(
            f"invalid restart policy: unknown policy '{kind}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'")
    if kind != "on-failure" and count:
        raise InvalidArgument("invalid restart policy: maximum retry count can only be used with 'on-failure'" + (
            " and cannot be negative" if count < 0 else ""))
    if count < 0:
        raise InvalidArgument("invalid restart policy: maximum retry count cannot be negative")
    if auto_remove and kind not in ("", "no"):
        raise InvalidArgument("can't create 'AutoRemove' container with restart policy")


def resources(host: dict[str, Any]) -> None:
    """Raise InvalidArgument for limits that contradict each other or the machine."""
    memory, swap = host["Memory"], host["MemorySwap"]
    if memory and memory < _MEMORY_MIN:
        raise InvalidArgument("Minimum memory limit allowed is 6MB")
    if memory > 0 and 0 < swap < memory:
        raise InvalidArgument("Minimum memoryswap limit should be larger than memory limit, see usage")
    if not memory and swap > 0:
        raise InvalidArgument("You should always set the Memory limit when using Memoryswap limit, see usage")
    if host["MemorySwappiness"] is not None and not -1 <= host["MemorySwappiness"] <= 100:
        raise InvalidArgument(f"Invalid value: {host['MemorySwappiness']}, valid memory swappiness range is 0-100")
    if 0 < host["MemoryReservation"] < _MEMORY_MIN:
        raise InvalidArgument("Minimum memory reservation allowed is 6MB")
    if memory > 0 and memory < host["MemoryReservation"]:
        raise InvalidArgument("Minimum memory limit can not be less than memory reservation limit, see usage")
    if host["NanoCpus"] < 0:
        raise InvalidArgument("Range of CPUs is from 0.01 upwards, as there are only positive amounts of them")
    if host["NanoCpus"] > 0 and (host["CpuPeriod"] or host["CpuQuota"]):
        raise InvalidArgument("Conflicting options: Nano CPUs and CPU Period cannot both be set")
    import os

    available = os.cpu_count() or 1
    if host["NanoCpus"] > available * 1_000_000_000:
        raise InvalidArgument(
            f"range of CPUs is from 0.01 to {available:.2f}, as there are only {available} CPUs available")
    if host["CpuPeriod"] and not 1000 <= host["CpuPeriod"] <= 1_000_000:
        raise InvalidArgument("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
    if 0 < host["CpuQuota"] < 1000:
        raise InvalidArgument("CPU cfs quota can not be less than 1ms (i.e. 1000)")
    if host["CpuShares"] < 0:
        raise InvalidArgument(f"invalid CPU shares ({host['CpuShares']}): value must be a positive integer")
    if host["BlkioWeight"] and not 10 <= host["BlkioWeight"] <= 1000:
        raise InvalidArgument("Range of blkio weight is from 10 to 1000")
    if not -1000 <= host["OomScoreAdj"] <= 1000:
        raise InvalidArgument(f"Invalid value {host['OomScoreAdj']}, range for oom score adj is [-1000, 1000]")


def _check_health(check: dict[str, Any] | None) -> None:
    if check is None:
        return
    for key in ("Interval", "Timeout", "StartPeriod", "StartInterval"):
        if 0 != check[key] < 1_000_000:
            raise InvalidArgument(f"{key} in Healthcheck cannot be less than 1ms")
    if check["Retries"] < 0:
        raise InvalidArgument("Retries in Healthcheck cannot be negative")


def _modes(host: dict[str, Any]) -> None:
    """Namespaces' modes: known words, or `container:NAME`."""
    for key, words, default in (
        ("NetworkMode", ("none", "host", "bridge", "default"), "default"),
        ("IpcMode", ("none", "private", "shareable", "host"), "private"),
        ("PidMode", ("host",), ""), ("UTSMode", ("host",), ""), ("UsernsMode", ("host", "private"), ""),
        ("CgroupnsMode", ("host", "private"), "")):
        value = host[key]
        if not value:
            host[key] = default
        elif value not in words and not (value.startswith("container:") and len(value) > 10 and key in ("NetworkMode", "IpcMode",
            "PidMode")):
            if key == "NetworkMode":
                continue  # the name of a network: whether it is there is asked at the start
            shown = {"IpcMode": "IPC", "PidMode": "PID", "UTSMode": "UTS", "UsernsMode": "user namespace",
                "CgroupnsMode": "cgroup namespace"}
            raise InvalidArgument(f"invalid {shown[key]} mode: {value}")
    # Ours, beside docker's "host": every id is itself, but capabilities end at the container. /sys belongs to who owns the
    # network namespace, and mqueue to who owns the ipc namespace.
    if host["UsernsMode"] == "private" and (host["NetworkMode"] != "none" or host["Privileged"]
            or any(host[key] not in ("", "private") for key in ("PidMode", "UTSMode", "IpcMode"))):
        raise InvalidArgument("user namespace mode private: the container needs namespaces of its own, and network none")
    if host["UTSMode"] == "host" and host["NetworkMode"] == "":
        raise InvalidArgument("invalid UTS mode")
