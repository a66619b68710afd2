"""Which servers stand for a registry: the registry itself, its mirrors, and how each is reached.

Runs in: the daemon, and whatever else pulls.
Spec: the form and the rules of containerd's `hosts.toml` (containerd docs/hosts.md) below any number of directories, and
of Docker's certificate directories (`HOST/*.crt`, `*.cert` with `*.key`); distribution-spec 1.1, "pull-through" (`ns=`).

    DIR/docker.io/hosts.toml         for docker.io
    DIR/registry.example_5000_/      for registry.example:5000 (`registry.example:5000` is tried first)
    DIR/_default/hosts.toml          for every other

Not here: credentials (`boxship.images.auth`).
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urlsplit

from boxship.kit.errors import InvalidArgument, from_os_error

DOCKER_HUB = "docker.io"
DOCKER_HUB_SERVER = "registry-1.docker.io"

PULL, RESOLVE, PUSH, REFERRERS = "pull", "resolve", "push", "referrers"
CAPABILITIES = frozenset((PULL, RESOLVE, PUSH, REFERRERS))

DIRECTORIES = ("/etc/boxship/certs.d", "/etc/containerd/certs.d", "/etc/docker/certs.d")
"""Where hosts.toml and certificates are looked for when the configuration names nothing; the first that has the host wins."""

_LIMIT = 1 << 20


@dataclass(frozen=True)
class TLS:
    """How a server's certificate is checked, and which one it is shown."""

    verify: bool = True
    authorities: tuple[str, ...] = ()
    """Files with certificates that are trusted beside the system's."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Files with our certificate and with its key; "": the key is in the first."""

    def context(self) -> ssl.SSLContext:
        """Raises InvalidArgument when a file cannot be read or is no certificate."""
        if not self.verify:
            # The system's authorities are not even read: that takes longer than a pull from this machine's own registry.
            made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            made.check_hostname = False
            made.verify_mode = ssl.CERT_NONE
        elif not self.authorities and not self.pairs:
            return _system_context()
        else:
            made = ssl.create_default_context()
        try:
            for path in self.authorities:
                made.load_verify_locations(cafile=path)
            for certificate, key in self.pairs:
                made.load_cert_chain(certificate, key or None)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join([*self.authorities, *(name for pair in self.pairs for name in pair if name)])
            raise InvalidArgument(f"cannot use the certificates {files}: {error}") from None
        return made


@lru_cache(maxsize=1)
def _system_context() -> ssl.SSLContext:
    """The system's authorities, read once."""
    return ssl.create_default_context()


@dataclass(frozen=True)
class Host:
    """One server that answers for a registry."""

    scheme: str
    """`http`, `https`, or "" when https is tried first and then http."""
    address: str
    """Host name with port."""
    path: str = "/v2"
    capabilities: frozenset[str] = CAPABILITIES
    tls: TLS = TLS()
    headers: tuple[tuple[str, str], ...] = ()
    connect_timeout_s: float = 0
    """0: the client's own."""
    namespace: str = ""
    """The registry that it stands for, when that is another: sent as `ns`."""

    def url(self, scheme: str = "") -> str:
        """The root of its API."""
        return f"{scheme or self.scheme or 'https'}://{self.address}{self.path}"


@dataclass(frozen=True)
class Configuration:
    """What is configured about registries; the defaults need nothing."""

    directories: Sequence[str] = DIRECTORIES
    """With `hosts.toml` files and certificates, as above; a registry that has a directory is configured by it alone."""
    mirrors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Registry → URLs that are asked before it (Docker's `registry-mirrors` are those of docker.io)."""
    insecure: Sequence[str] = ()
    """Hosts, `host:port` or networks in CIDR notation that need no valid certificate and may be reached by HTTP."""
    plain_http: bool = False
    """HTTP for every registry."""
    tls: TLS = TLS()
    """For registries that have no directory of their own."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def hosts(self, registry: str, capability: str) -> list[Host]:
        """The servers to ask for `registry`, in order, that can do `capability`.

        Raises InvalidArgument for a configuration that cannot be read: it is not skipped, since a mirror or a
        certificate that is silently left out would send requests where they must not go.
        """
        found = self._from_directories(registry)
        if found is None:
            found = [_mirror(url, registry) for url in self.mirrors.get(registry, ())]
            found.append(self._own(registry, self.tls))
        extra = tuple(self.headers.items())
        return [
            Host(**{**host.__dict__, "headers": (*extra, *host.headers)}) if extra else host
            for host in found if capability in host.capabilities
        ]

    def _from_directories(self, registry: str) -> list[Host] | None:
        for name in (registry, _directory_name(registry), "_default"):
            for directory in self.directories:
                path = os.path.join(directory, name)
                if os.path.isdir(path):
                    return self._load(path, registry)
        return None

    def _load(self, path: str, registry: str) -> list[Host]:
        name = os.path.join(path, "hosts.toml")
        try:
            with open(name, "rb") as file:
                text = file.read(_LIMIT)
        except FileNotFoundError:
            return [self._own(registry, _certificates(path))]
        except OSError as error:
            raise from_os_error(error, "reading") from None
        try:
            document = tomllib.loads(text.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{name}: {error}") from None
        tables = document.get("host", {})
        if not isinstance(tables, dict):
            raise InvalidArgument(f"{name}: host: expected tables")
        hosts = [_from_table(url, table, registry, path, name) for url, table in tables.items()]
        server = document.get("server", "")
        if server:
            hosts.append(_from_table(server, document, registry, path, name))
        else:
            own = self._own(registry, self.tls)
            table = _table(document, path, name)
            hosts.append(Host(
                scheme=own.scheme, address=own.address, tls=table.tls if _has_tls(document) else own.tls,
                headers=table.headers, capabilities=table.capabilities, connect_timeout_s=table.connect_timeout_s,
            ))
        return hosts

    def _own(self, registry: str, tls: TLS) -> Host:
        """The registry itself."""
        if registry == DOCKER_HUB:
            return Host("https", DOCKER_HUB_SERVER, tls=tls)
        name, port = split_port(registry)
        if self.plain_http:
            return Host("http", registry, tls=tls)
        loopback = is_loopback(name)
        if not loopback and not self._is_insecure(name, registry):
            return Host("https", registry, tls=tls)
        scheme = {"80": "http", "443": "https"}.get(port, "https" if not port and loopback else "")
        return Host(scheme, registry, tls=tls if tls.authorities else TLS(False, tls.authorities, tls.pairs))

    def _is_insecure(self, name: str, registry: str) -> bool:
        for entry in self.insecure:
            if entry in (name, registry):
                return True
            try:
                if "/" in entry and ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False):
                    return True
            except ValueError:
                continue
        return False


def split_port(address: str) -> tuple[str, str]:
    """Host name (without brackets) and port ("" when there is none)."""
    if address.startswith("["):
        name, _, rest = address[1:].partition("]")
        return name, rest.removeprefix(":")
    name, _, port = address.partition(":")
    return name, port


def is_loopback(name: str) -> bool:
    """Whether a host name means this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _directory_name(registry: str) -> str:
    """`host:port` as a name of a directory that other systems allow."""
    name, colon, port = registry.rpartition(":")
    return f"{name}_{port}_" if colon and name else registry


def _mirror(url: str, registry: str) -> Host:
    scheme, address, path = _split_url(url, override_path=False)
    name, _ = split_port(address)
    return Host(scheme, address, path, frozenset((PULL, RESOLVE)), TLS(verify=not is_loopback(name)), namespace=registry)


def _split_url(url: str, *, override_path: bool) -> tuple[str, str, str]:
    """Scheme, address and path of the API; raises InvalidArgument."""
    parts = urlsplit(url if "://" in url else f"https://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
        raise InvalidArgument(f"invalid registry server {url!r}", "http[s]://HOST[:PORT][/PATH], without user and password")
    path = parts.path.rstrip("/")
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    return parts.scheme, parts.netloc, path


@dataclass(frozen=True)
class _Table:
    capabilities: frozenset[str]
    tls: TLS
    headers: tuple[tuple[str, str], ...]
    connect_timeout_s: float
    override_path: bool


def _from_table(server: str, value: object, registry: str, base: str, name: str) -> Host:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name}: host {server!r}: expected a table")
    table = _table(value, base, name)
    scheme, address, path = _split_url(server, override_path=table.override_path)
    own = address == registry or (registry == DOCKER_HUB and address == DOCKER_HUB_SERVER)
    return Host(
        scheme, address, path, table.capabilities, table.tls, table.headers, table.connect_timeout_s, "" if own else registry
    )


def _has_tls(value: Mapping[str, object]) -> bool:
    return any(key in value for key in ("ca", "client", "skip_verify"))


def _table(value: Mapping[str, object], base: str, name: str) -> _Table:
    """The settings of one server."""
    capabilities = _strings(value.get("capabilities", []), "capabilities", name)
    unknown = [word for word in capabilities if word.lower() not in CAPABILITIES]
    if unknown:
        raise InvalidArgument(f"{name}: unknown capability {unknown[0]}")
    skip = value.get("skip_verify", False)
    override = value.get("override_path", False)
    if not isinstance(skip, bool) or not isinstance(override, bool):
        raise InvalidArgument(f"{name}: skip_verify and override_path are true or false")
    header = value.get("header", {})
    if not isinstance(header, dict):
        raise InvalidArgument(f"{name}: header: expected a table")
    return _Table(
        frozenset(word.lower() for word in capabilities) or CAPABILITIES,
        TLS(
            not skip,
            tuple(os.path.join(base, path) for path in _strings(value.get("ca", []), "ca", name)),
            tuple(_pairs(value.get("client", []), base, name)),
        ),
        tuple((key, text) for key, texts in header.items() for text in _strings(texts, f"header {key}", name)),
        _seconds(value.get("dial_timeout", ""), name),
        override,
    )


def _strings(value: object, key: str, name: str) -> list[str]:
    """A string or a list of them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    raise InvalidArgument(f"{name}: {key}: expected a string or a list of strings")


def _pairs(value: object, base: str, name: str) -> list[tuple[str, str]]:
    """A file, a list of files, or a list of pairs of files."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise InvalidArgument(f"{name}: client: expected files")
    found = []
    for part in value:
        files = _strings(part, "client", name)
        if len(files) not in (1, 2) or (isinstance(part, list) and len(files) == 1):
            raise InvalidArgument(f"{name}: client: expected a certificate and its key")
        found.append((os.path.join(base, files[0]), os.path.join(base, files[1]) if len(files) == 2 and files[1] else ""))
    return found


def _seconds(value: object, name: str) -> float:
    """A duration in Go's notation, of one unit."""
    if value == "":
        return 0
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    if isinstance(value, str):
        number = value.rstrip("mhs")
        try:
            return float(number) * units[value[len(number):]]
        except (KeyError, ValueError):
            pass
    raise InvalidArgument(f"{name}: dial_timeout: invalid duration {value!r}")


def _certificates(path: str) -> TLS:
    """Docker's directory of certificates: *.crt are authorities, *.cert ours with the key beside it."""
    names = sorted(os.listdir(path))
    return TLS(
        authorities=tuple(os.path.join(path, name) for name in names if name.endswith(".crt")),
        pairs=tuple(
            (os.path.join(path, name), os.path.join(path, f"{name[:-5]}.key") if f"{name[:-5]}.key" in names else "")
            for name in names if name.endswith(".cert")
        ),
    )
