"""The flags of `create` and `run`, and the engine's request that they stand for.

Runs in: the boxship command; imported by `create` and `run` only.
Spec: docker run's reference; Docker Engine API, POST /containers/create.
Not here: what the values mean to the engine, which checks them again.
"""

from __future__ import annotations

import os

from boxship.cli import flags as f
from boxship.cli import values
from boxship.cli.verbs.lifecycle import LIMITS, resources
from boxship.kit.errors import BoxshipError, InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from boxship.cli.command import Call

FLAGS = (
    LIMITS
    + """
add-host list | Add a custom host-to-IP mapping (host:ip)
annotation map | Add an annotation to the container (passed through to the OCI runtime)
a,attach list | Attach to STDIN, STDOUT or STDERR
blkio-weight-device list | Block IO weight (relative device weight)
cap-add list | Add Linux capabilities
cap-drop list | Drop Linux capabilities
cgroup-parent string | Optional parent cgroup for the container
cgroupns string | Cgroup namespace to use (host|private)
cidfile string | Write the container ID to the file
device list | Add a host device to the container
device-cgroup-rule list | Add a rule to the cgroup allowed devices list
device-read-bps list | Limit read rate (bytes per second) from a device
device-read-iops list | Limit read rate (IO per second) from a device
device-write-bps list | Limit write rate (bytes per second) to a device
device-write-iops list | Limit write rate (IO per second) to a device
dns list | Set custom DNS servers
dns-opt list |
dns-option list | Set DNS options
dns-search list | Set custom DNS search domains
domainname string | Container NIS domain name
entrypoint string | Overwrite the default ENTRYPOINT of the image
e,env list | Set environment variables; a name alone takes the caller's value
env-file list | Read in a file of environment variables
expose list | Expose a port or a range of ports
gpus gpu-request | GPU devices to add to the container ('all' to pass all GPUs)
group-add list | Add additional groups to join
health-cmd string | Command to run to check health
health-interval duration | Time between running the check (ms|s|m|h)
health-retries int | Consecutive failures needed to report unhealthy
health-start-interval duration | Time between running the check during the start period (ms|s|m|h)
health-start-period duration | Time for the container to initialize before health retries count (ms|s|m|h)
health-timeout duration | Maximum time to allow one check to run (ms|s|m|h)
h,hostname string | Container host name
init | Run an init inside the container that forwards signals and reaps processes
i,interactive | Keep STDIN open even if not attached
ip string | IPv4 address (e.g., 172.30.100.104)
ip6 string | IPv6 address (e.g., 2001:db8::33)
ipc string | IPC mode to use
isolation string | Container isolation technology
l,label list | Set meta data on a container
label-file list | Read in a line delimited file of labels
link list | Add link to another container
link-local-ip list | Container IPv4/IPv6 link-local addresses
log-driver string | Logging driver for the container
log-opt list | Log driver options
mac-address string | Container MAC address (e.g., 92:d0:c6:0a:29:33)
mount mount | Attach a filesystem mount to the container
name string | Assign a name to the container
net network |
net-alias list |
network network | Connect a container to a network
network-alias list | Add network-scoped alias for the container
no-healthcheck | Disable any container-specified HEALTHCHECK
oom-kill-disable | Disable OOM Killer
oom-score-adj int | Tune host's OOM preferences (-1000 to 1000)
pid string | PID namespace to use
platform string | Set platform if the engine has images of several
privileged | Give extended privileges to this container
p,publish list | Publish a container's port(s) to the host
P,publish-all | Publish all exposed ports to random ports
pull string | Pull image before running ("always", "missing", "never")
q,quiet | Suppress the pull output
read-only | Mount the container's root filesystem as read only
rm | Remove the container and its anonymous volumes when it exits
runtime string | Runtime to use for this container
security-opt list | Security Options
shm-size bytes | Size of /dev/shm
stop-signal string | Signal to stop the container
stop-timeout int | Timeout (in seconds) to stop a container
storage-opt list | Storage driver options for the container
sysctl map | Sysctl options
tmpfs list | Mount a tmpfs directory
t,tty | Allocate a pseudo-TTY
ulimit ulimit | Ulimit options
u,user string | Username or UID (format: <name|uid>[:<group|gid>])
userns string | User namespace to use (host|private)
uts string | UTS namespace to use
v,volume list | Bind mount a volume
volume-driver string | Optional volume driver for the container
volumes-from list | Mount volumes from the specified container(s)
w,workdir string | Working directory inside the container
"""
)


def request(call: Call) -> dict[str, Any]:
    """The body of POST /containers/create. Raises UsageError, InvalidArgument, NotFound."""
    words = call.words
    attach = [word.lower() for word in call.all("attach")]
    for word in attach:
        if word not in ("stdin", "stdout", "stderr"):
            raise f.UsageError(f'invalid argument "{word}" for "-a, --attach" flag: valid streams are STDIN, STDOUT and STDERR')
    everything = not attach and call.parsed.values.get("detach") is not True
    stdin = "stdin" in attach or (everything and call.on("interactive"))
    body: dict[str, Any] = {
        "Image": words[0],
        "Cmd": words[1:] or None,
        "Hostname": call.text("hostname"),
        "Domainname": call.text("domainname"),
        "User": call.text("user"),
        "Tty": call.on("tty"),
        "OpenStdin": call.on("interactive"),
        "AttachStdin": stdin,
        "StdinOnce": stdin and call.on("interactive"),
        "AttachStdout": everything or "stdout" in attach,
        "AttachStderr": everything or "stderr" in attach,
        "WorkingDir": call.text("workdir"),
        "Env": environment(call),
        "Labels": labels(call),
    }
    if call.parsed.text("entrypoint") is not None:
        body["Entrypoint"] = [call.text("entrypoint")] if call.text("entrypoint") else [""]
    for flag, key in (("stop-signal", "StopSignal"), ("mac-address", "MacAddress")):
        if call.text(flag):
            body[key] = call.text(flag)
    if call.number("stop-timeout") is not None:
        body["StopTimeout"] = call.number("stop-timeout")
    health = healthcheck(call)
    if health:
        body["Healthcheck"] = health
    exposed, bindings = ports(call.all("publish"), call.all("expose"))
    body["ExposedPorts"] = exposed
    volumes, binds = _volumes(call)
    if volumes:
        body["Volumes"] = volumes
    body["HostConfig"] = _host(call, binds, bindings)
    networks = _networks(call, body["HostConfig"])
    if networks:
        body["NetworkingConfig"] = {"EndpointsConfig": networks}
    return body


_NETWORKING = frozenset((
    "expose", "ip", "ip6", "link", "link-local-ip", "mac-address", "net", "net-alias", "network", "network-alias", "publish",
    "publish-all",
))
_SHARING = frozenset(("cgroupns", "ipc", "pid", "privileged", "userns", "uts"))


def keep_apart(call: Call, body: dict[str, Any]) -> None:
    """Change a request for the image `host`: what is the machine's own gets less than docker gives unless flags say otherwise.

    No network but loopback, no power by set-user-id programs, and, of our own engine, capabilities that end at the container.
    """
    from boxship.cli.http.where import address

    if call.words[1:2] == ["--"]:
        body["Cmd"] = call.words[2:] or None
    given = call.parsed.given
    own_defaults(
        body["HostConfig"],
        networked=bool(given & _NETWORKING),
        sharing=bool(given & _SHARING),
        own=address(call.environ)[1],
    )


def own_defaults(host: dict[str, Any], *, networked: bool, sharing: bool, own: bool) -> None:
    """The same for a HostConfig: whether a network or a shared namespace was asked for, and whether the engine is ours."""
    if not networked:
        host["NetworkMode"] = "none"
        if own and not sharing and _user_namespaces():
            host["UsernsMode"] = host["CgroupnsMode"] = "private"
    if not host["Privileged"] and not any(word.startswith("no-new-privileges") for word in host["SecurityOpt"] or []):
        host["SecurityOpt"] = [*(host["SecurityOpt"] or []), "no-new-privileges"]


def _user_namespaces() -> bool:
    try:
        with open("/proc/sys/user/max_user_namespaces", encoding="ascii") as file:
            return int(file.read()) > 0
    except OSError:
        return False


def environment(call: Call) -> list[str]:
    """--env-file, then --env."""
    found = [word for name in call.all("env-file") for word in values.environment_file(name, call.environ)]
    for word in call.all("env"):
        if not word or word.startswith("="):
            raise f.UsageError(f'invalid argument "{word}" for "-e, --env" flag: invalid environment variable: {word}')
    return found + values.environment(call.all("env"), call.environ)


def labels(call: Call) -> dict[str, str]:
    """--label-file, then --label."""
    lines: list[str] = []
    for name in call.all("label-file"):
        lines += values.environment_file(name, call.environ)
    return pairs([*lines, *call.all("label")])


def pairs(words: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE as a map; NAME alone is empty."""
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        found[name] = value
    return found


def healthcheck(call: Call) -> dict[str, Any]:
    """The flags --health-…; empty when none is given."""
    from boxship.cli.show.units import seconds

    durations = {
        "health-interval": "Interval",
        "health-timeout": "Timeout",
        "health-start-period": "StartPeriod",
        "health-start-interval": "StartInterval",
    }
    given = {flag: call.text(flag) for flag in durations if call.text(flag)}
    command, retries = call.text("health-cmd"), call.number("health-retries")
    if call.on("no-healthcheck"):
        if given or command or retries:
            raise InvalidArgument("--no-healthcheck conflicts with --health-* options")
        return {"Test": ["NONE"]}
    found: dict[str, Any] = {"Test": ["CMD-SHELL", command]} if command else {}
    for flag, text in given.items():
        try:
            nanoseconds = round(seconds(text) * 1e9)
        except InvalidArgument as error:
            raise f.UsageError(f'invalid argument "{text}" for "--{flag}" flag: {error}') from None
        if nanoseconds < 0:
            raise InvalidArgument(f"--{flag} cannot be negative")
        found[durations[flag]] = nanoseconds
    if retries:
        if retries < 0:
            raise InvalidArgument("--health-retries cannot be negative")
        found["Retries"] = retries
    return found


def _span(text: str, whole: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise InvalidArgument(f"invalid containerPort: {whole}")
    start, end = int(first), int(last or first)
    if not 0 <= start <= end <= 65535:
        raise InvalidArgument(f"invalid range format for port: {whole}")
    return start, end


def ports(publish: Iterable[str], expose: Iterable[str]) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """(ExposedPorts, PortBindings) of `-p [IP:][HOST[-HOST]:]PORT[-PORT][/PROTO]` and `--expose`. Raises InvalidArgument."""
    exposed: dict[str, Any] = {}
    bindings: dict[str, list[dict[str, str]]] = {}
    for word in publish:
        rest, _, protocol = word.partition("/")
        protocol = (protocol or "tcp").lower()
        if protocol not in ("tcp", "udp", "sctp"):
            raise InvalidArgument(f"invalid proto: {protocol}")
        front, _, inside = rest.rpartition(":")
        if front.startswith("["):
            address, _, host = front[1:].partition("]")
            host = host.removeprefix(":")
        else:
            address, _, host = front.rpartition(":")
        if address and not _is_address(address):
            raise InvalidArgument(f"invalid IP address: {address}")
        if not inside:
            raise InvalidArgument(f"no port specified: {word}<empty>")
        first, last = _span(inside, inside)
        if host:
            host_first, host_last = _span(host, host)
            if host_last - host_first != last - first and first != last:
                raise InvalidArgument(f"invalid ranges specified for container and host Ports: {inside} and {host}")
        for offset in range(last - first + 1):
            key = f"{first + offset}/{protocol}"
            exposed[key] = {}
            if not host:
                number = ""
            elif first == last and host_first != host_last:
                number = f"{host_first}-{host_last}"
            else:
                number = str(host_first + offset)
            bindings.setdefault(key, []).append({"HostIp": address, "HostPort": number})
    for word in expose:
        if ":" in word:
            raise InvalidArgument(f"invalid port format for --expose: {word}")
        rest, _, protocol = word.partition("/")
        first, last = _span(rest, word)
        for each in range(first, last + 1):
            exposed.setdefault(f"{each}/{(protocol or 'tcp').lower()}", {})
    return exposed, bindings


def _is_address(text: str) -> bool:
    import _socket

    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            _socket.inet_pton(family, text)
        except OSError:
            continue
        return True
    return False


def _volumes(call: Call) -> tuple[dict[str, Any], list[str]]:
    """(anonymous volumes, Binds)."""
    anonymous: dict[str, Any] = {}
    binds = []
    for word in call.all("volume"):
        source, colon, rest = word.partition(":")
        if not colon:
            if not word.startswith("/"):
                raise InvalidArgument(f"invalid volume specification: '{word}': mount path must be absolute")
            anonymous[word] = {}
            continue
        if source in (".", "..") or source.startswith(("./", "../", "~")):
            word = f"{os.path.normpath(os.path.join(os.getcwd(), os.path.expanduser(source)))}:{rest}"
        binds.append(word)
    return anonymous, binds


def mount(text: str) -> dict[str, Any]:
    """The mount of `--mount type=bind,src=…,dst=…,…`. Raises UsageError."""

    def refuse(why: str) -> f.UsageError:
        return f.UsageError(f'invalid argument "{text}" for "--mount" flag: {why}')

    found: dict[str, Any] = {"Type": "volume"}
    for field in _csv(text):
        name, equals, value = field.partition("=")
        name = name.strip().lower()
        flag = name in ("readonly", "ro", "volume-nocopy", "bind-nonrecursive")
        if not equals and not flag:
            raise refuse(f"invalid field '{field}' must be a key=value pair")
        if flag and value.lower() not in ("", "1", "0", "true", "false"):
            raise refuse(f"invalid value for {name}: {value}")
        on = value.lower() not in ("0", "false")
        options = {
            kind: found.setdefault(f"{kind.title()}Options", {})
            for kind in ("bind", "volume", "tmpfs")
            if name.startswith(f"{kind}-")
        }
        if name == "type":
            found["Type"] = value.lower()
        elif name in ("source", "src"):
            found["Source"] = os.path.abspath(value) if value.startswith(".") else value
        elif name in ("target", "dst", "destination"):
            found["Target"] = value
        elif name in ("readonly", "ro"):
            found["ReadOnly"] = on
        elif name == "consistency":
            found["Consistency"] = value.lower()
        elif name == "bind-propagation":
            options["bind"]["Propagation"] = value.lower()
        elif name == "bind-nonrecursive":
            options["bind"]["NonRecursive"] = on
        elif name == "bind-recursive":
            _bind_recursive(options["bind"], value, found, refuse)
        elif name == "volume-nocopy":
            options["volume"]["NoCopy"] = on
        elif name == "volume-subpath":
            options["volume"]["Subpath"] = value
        elif name == "volume-label":
            options["volume"].setdefault("Labels", {}).update(pairs([value]))
        elif name == "volume-driver":
            options["volume"].setdefault("DriverConfig", {})["Name"] = value
        elif name == "volume-opt":
            options["volume"].setdefault("DriverConfig", {}).setdefault("Options", {}).update(pairs([value]))
        elif name == "tmpfs-size":
            options["tmpfs"]["SizeBytes"] = values.size(value)
        elif name == "tmpfs-mode":
            options["tmpfs"]["Mode"] = int(value, 8)
        else:
            raise refuse(f"unexpected key '{name}' in '{field}'")
    if "VolumeOptions" in found:
        found["VolumeOptions"].setdefault("DriverConfig", {})
    if not found.get("Target"):
        raise refuse("target is required")
    return found


def _bind_recursive(options: dict[str, Any], value: str, found: dict[str, Any], refuse: Any) -> None:
    if value == "disabled":
        options["NonRecursive"] = True
    elif value == "writable":
        options["ReadOnlyNonRecursive"] = True
    elif value == "readonly":
        options["ReadOnlyForceRecursive"] = True
    elif value != "enabled":
        raise refuse(f'invalid value for bind-recursive: {value} (must be "enabled", "disabled", "writable", or "readonly")')


def _csv(text: str) -> list[str]:
    fields, field, quoted = [], "", False
    for char in text:
        if char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            fields.append(field)
            field = ""
        else:
            field += char
    return [*fields, field]


def _capabilities(words: Iterable[str]) -> list[str] | None:
    names = {word.strip().upper() for word in words}
    if "ALL" in names:
        return ["ALL"]
    return sorted(name if name.startswith("CAP_") else f"CAP_{name}" for name in names) or None


def _device(text: str) -> dict[str, str]:
    parts = text.split(":")
    permissions = "rwm"
    if len(parts) > 1 and parts[-1] and set(parts[-1]) <= set("rwm"):
        permissions = parts.pop()
    if len(parts) > 2 or not parts[0]:
        raise InvalidArgument(f"bad format for path: {text}")
    return {"PathOnHost": parts[0], "PathInContainer": parts[-1], "CgroupPermissions": permissions}


def ulimit(text: str) -> dict[str, Any]:
    """`--ulimit` as the engine takes it. Raises UsageError."""
    name, equals, value = text.partition("=")
    soft, _, hard = value.partition(":")
    if not equals:
        raise f.UsageError(f'invalid argument "{text}" for "--ulimit" flag: invalid ulimit argument: {text}')
    try:
        low, high = int(soft), int(hard or soft)
    except ValueError:
        wrong = hard if soft.lstrip("-").isdigit() else soft
        raise f.UsageError(
            f'invalid argument "{text}" for "--ulimit" flag: strconv.ParseInt: parsing "{wrong}": invalid syntax'
        ) from None
    if high != -1 and low > high:
        raise f.UsageError(
            f'invalid argument "{text}" for "--ulimit" flag: '
            f"ulimit soft limit must be less than or equal to hard limit: {low} > {high}"
        )
    return {"Name": name, "Soft": low, "Hard": high}


def _security(words: Iterable[str]) -> list[str]:
    """A seccomp profile is read here: the engine may be elsewhere."""
    found = []
    for word in words:
        name, separator, value = word.partition("=") if "=" in word else word.partition(":")
        if name == "seccomp" and value not in ("unconfined", "builtin"):
            try:
                with open(value, encoding="utf-8") as file:
                    profile = file.read()
            except OSError as error:
                raise NotFound(
                    f"opening seccomp profile ({value}) failed: open {value}: {(error.strerror or '').lower()}"
                ) from None
            from boxship.oci import text

            word = f"seccomp={text.dumps(text.loads(profile, value))}"
        elif name == "no-new-privileges" and not separator:
            word = name
        elif not separator and name != "no-new-privileges":
            raise InvalidArgument(f'invalid --security-opt: "{word}"')
        found.append(word)
    return found


_RATES = ("ReadBps", "WriteBps", "ReadIOps", "WriteIOps")


def _throttles(call: Call) -> dict[str, Any]:
    found: dict[str, Any] = {key: [] for key in ("BlkioWeightDevice", *(f"BlkioDevice{what}" for what in _RATES))}
    for flag, key, parse in (
        ("device-read-bps", "BlkioDeviceReadBps", values.size),
        ("device-write-bps", "BlkioDeviceWriteBps", values.size),
        ("device-read-iops", "BlkioDeviceReadIOps", int),
        ("device-write-iops", "BlkioDeviceWriteIOps", int),
    ):
        for word in call.all(flag):
            device, _, rate = word.partition(":")
            if not device.startswith("/dev/") or not rate:
                raise f.UsageError(f'invalid argument "{word}" for "--{flag}" flag: bad format: {word}')
            found[key].append({"Path": device, "Rate": parse(rate)})
    for word in call.all("blkio-weight-device"):
        device, _, weight = word.partition(":")
        if not device.startswith("/dev/") or not weight.isdigit():
            raise f.UsageError(f'invalid argument "{word}" for "--blkio-weight-device" flag: bad format: {word}')
        found["BlkioWeightDevice"].append({"Path": device, "Weight": int(weight)})
    return found


def _host(call: Call, binds: list[str], bindings: dict[str, Any]) -> dict[str, Any]:
    from boxship.cli.http import stream

    networks = call.all("network") + call.all("net")
    first = _network(networks[0])[0] if networks else "default"
    found: dict[str, Any] = {
        "Binds": binds or None,
        "ContainerIDFile": call.text("cidfile"),
        "NetworkMode": first,
        "PortBindings": bindings,
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "AutoRemove": call.on("rm"),
        "CapAdd": _capabilities(call.all("cap-add")),
        "CapDrop": _capabilities(call.all("cap-drop")),
        "Dns": call.all("dns"),
        "DnsOptions": call.all("dns-option") + call.all("dns-opt"),
        "DnsSearch": call.all("dns-search"),
        "ExtraHosts": [_extra_host(word) for word in call.all("add-host")] or None,
        "GroupAdd": call.all("group-add") or None,
        "Links": call.all("link") or None,
        "Privileged": call.on("privileged"),
        "PublishAllPorts": call.on("publish-all"),
        "ReadonlyRootfs": call.on("read-only"),
        "SecurityOpt": _security(call.all("security-opt")) or None,
        "VolumesFrom": call.all("volumes-from") or None,
        "LogConfig": {"Type": call.text("log-driver"), "Config": pairs(call.all("log-opt"))},
        "Devices": [_device(word) for word in call.all("device")],
        "DeviceCgroupRules": call.all("device-cgroup-rule") or None,
        **resources(call),
        **_throttles(call),
    }
    if found["RestartPolicy"]["Name"] not in ("", "no") and call.on("rm"):
        raise InvalidArgument("conflicting options: cannot specify both --restart and --rm")
    for flag, key in (
        ("volume-driver", "VolumeDriver"),
        ("ipc", "IpcMode"),
        ("pid", "PidMode"),
        ("uts", "UTSMode"),
        ("userns", "UsernsMode"),
        ("cgroupns", "CgroupnsMode"),
        ("runtime", "Runtime"),
        ("cgroup-parent", "CgroupParent"),
        ("isolation", "Isolation"),
    ):
        if call.text(flag):
            found[key] = call.text(flag)
    for flag, key in (("tmpfs", "Tmpfs"), ("sysctl", "Sysctls"), ("storage-opt", "StorageOpt"), ("annotation", "Annotations")):
        if call.all(flag):
            split = [word.replace(":", "=", 1) if flag == "tmpfs" else word for word in call.all(flag)]
            found[key] = pairs(split)
    if call.text("shm-size"):
        try:
            found["ShmSize"] = values.size(call.text("shm-size"))
        except InvalidArgument as error:
            raise f.UsageError(f'invalid argument "{call.text("shm-size")}" for "--shm-size" flag: {error}') from None
    if call.number("oom-score-adj") is not None:
        found["OomScoreAdj"] = call.number("oom-score-adj")
    if call.on("oom-kill-disable"):
        found["OomKillDisable"] = True
    if "init" in call.parsed.given:
        found["Init"] = call.on("init")
    limits = {limit["Name"]: limit for limit in map(ulimit, call.all("ulimit"))}
    found["Ulimits"] = [limits[name] for name in sorted(limits)]
    if call.all("mount"):
        found["Mounts"] = [mount(word) for word in call.all("mount")]
    if call.all("gpus"):
        found["DeviceRequests"] = [_gpus(word) for word in call.all("gpus")]
    rows, columns = stream.window() if call.on("tty") else (0, 0)
    found["ConsoleSize"] = [rows, columns]
    return found


def _gpus(word: str) -> dict[str, object]:
    count = -1 if word == "all" else int(word) if word.isdigit() else 0
    request: dict[str, object] = {"Driver": "", "Count": count, "DeviceIDs": None, "Capabilities": [["gpu"]], "Options": {}}
    if not count:
        fields = pairs(_csv(word))
        request["DeviceIDs"] = fields.get("device", "").split(",") if fields.get("device") else None
    return request


def _extra_host(word: str) -> str:
    name, separator, address = word.partition("=")
    if not separator:
        name, separator, address = word.partition(":")
    if not separator or not name:
        raise f.UsageError(f'invalid argument "{word}" for "--add-host" flag: bad format for add-host: "{word}"')
    return f"{name}:{address.strip('[]')}"


def _network(text: str) -> tuple[str, dict[str, Any]]:
    """(name, endpoint) of `NAME` or `name=NAME,alias=…,ip=…`."""
    if "=" not in text:
        return text, {}
    name = ""
    endpoint: dict[str, Any] = {}
    for field in _csv(text):
        key, _, value = field.partition("=")
        if key == "name":
            name = value
        elif key == "alias":
            endpoint.setdefault("Aliases", []).append(value)
        elif key in ("ip", "ip6"):
            endpoint.setdefault("IPAMConfig", {})["IPv4Address" if key == "ip" else "IPv6Address"] = value
        elif key == "link-local-ip":
            endpoint.setdefault("IPAMConfig", {}).setdefault("LinkLocalIPs", []).append(value)
        elif key == "driver-opt":
            endpoint.setdefault("DriverOpts", {}).update(pairs([value]))
        elif key == "mac-address":
            endpoint["MacAddress"] = value
        elif key == "gw-priority":
            endpoint["GwPriority"] = int(value)
        else:
            raise f.UsageError(f'invalid argument "{text}" for "--network" flag: invalid field {key}')
    return name, endpoint


def _networks(call: Call, host: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    words = call.all("network") + call.all("net")
    for word in words:
        name, endpoint = _network(word)
        if name in found:
            raise InvalidArgument(f'network "{name}" is specified multiple times')
        found[name] = endpoint
    aliases = call.all("network-alias") + call.all("net-alias")
    addresses = {key: call.text(flag) for flag, key in (("ip", "IPv4Address"), ("ip6", "IPv6Address")) if call.text(flag)}
    if call.all("link-local-ip"):
        addresses["LinkLocalIPs"] = call.all("link-local-ip")  # type: ignore[assignment]
    if aliases or addresses or call.text("mac-address") or call.all("link"):
        endpoint = found.setdefault(host["NetworkMode"], {})
        if aliases:
            endpoint["Aliases"] = aliases
        if addresses:
            endpoint["IPAMConfig"] = addresses
        if call.text("mac-address"):
            endpoint["MacAddress"] = call.text("mac-address")
        if call.all("link"):
            endpoint["Links"] = call.all("link")
    return found if len(found) > 1 or any(found.values()) else {}


def check_id_file(name: str) -> None:
    """Raises BoxshipError when the file of --cidfile is there already."""
    if name and os.path.lexists(name):
        raise BoxshipError(f"container ID file found, make sure the other container isn't running or delete {name}")
