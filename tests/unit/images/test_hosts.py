"""Which servers are asked for a registry: defaults, mirrors, insecure hosts, hosts.toml and Docker's certificate directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from boxship.images.hosts import PULL, PUSH, RESOLVE, Configuration
from boxship.kit.errors import InvalidArgument

NOTHING = Configuration(directories=())


def urls(configuration: Configuration, registry: str, capability: str = PULL) -> list[str]:
    return [host.url() for host in configuration.hosts(registry, capability)]


def test_the_hub_is_asked_at_its_server() -> None:
    assert urls(NOTHING, "docker.io") == ["https://registry-1.docker.io/v2"]


def test_a_registry_is_reached_by_tls_with_its_certificate_checked() -> None:
    [host] = NOTHING.hosts("registry.example", PULL)
    assert (host.scheme, host.tls.verify, host.namespace) == ("https", True, "")


@pytest.mark.parametrize(("registry", "scheme"), [
    ("localhost:5000", ""), ("127.0.0.1:5000", ""), ("[::1]:5000", ""), ("localhost:80", "http"), ("localhost:443", "https"), ("localhost", "https"),
    ("127.0.0.1.example:5000", "https"), ("localhost.example:5000", "https"),
])
def test_only_this_machine_may_answer_by_http_unasked(registry: str, scheme: str) -> None:
    [host] = NOTHING.hosts(registry, PULL)
    assert host.scheme == scheme


@pytest.mark.parametrize(("listed", "registry", "found"), [
    ("registry.lan:5000", "registry.lan:5000", True), ("registry.lan", "registry.lan:5000", True), ("10.0.0.0/8", "10.1.2.3:5000", True),
    ("10.0.0.0/8", "11.1.2.3:5000", False), ("registry.lan:5000", "registry.lan:6000", False), ("lan", "registry.lan:5000", False),
])
def test_listed_hosts_need_no_certificate(listed: str, registry: str, found: bool) -> None:
    [host] = Configuration(directories=(), insecure=[listed]).hosts(registry, PULL)
    assert (host.scheme == "" and not host.tls.verify) is found


def test_mirrors_are_asked_first_and_never_pushed_to() -> None:
    configuration = Configuration(directories=(), mirrors={"docker.io": ["https://mirror.example", "http://cache.lan:5000/hub/"]})
    assert urls(configuration, "docker.io") == [
        "https://mirror.example/v2", "http://cache.lan:5000/hub/v2", "https://registry-1.docker.io/v2",
    ]
    assert urls(configuration, "docker.io", PUSH) == ["https://registry-1.docker.io/v2"]
    assert [host.namespace for host in configuration.hosts("docker.io", PULL)] == ["docker.io", "docker.io", ""]
    assert urls(configuration, "quay.io") == ["https://quay.io/v2"]


@pytest.mark.parametrize("url", ["ftp://mirror.example", "https://", "https://user:secret@mirror.example"])
def test_a_mirror_that_is_no_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument):
        Configuration(directories=(), mirrors={"docker.io": [url]}).hosts("docker.io", PULL)


def hosts_toml(directory: Path, name: str, text: str) -> Configuration:
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(text)
    return Configuration(directories=[str(directory)])


def test_hosts_toml_names_servers_in_its_order(tmp_path: Path) -> None:
    configuration = hosts_toml(tmp_path, "docker.io", """
server = "https://registry-1.docker.io"
[host."https://z.example"]
  capabilities = ["pull", "resolve"]
  dial_timeout = "2.5s"
[host."http://a.example:5000/v2/"]
  capabilities = ["resolve"]
  [host."http://a.example:5000/v2/".header]
    x-one = "1"
    x-two = ["2", "3"]
[host."https://own.example/odd/api"]
  override_path = true
  skip_verify = true
  ca = "ca.pem"
  client = [["cert.pem", "key.pem"], "both.pem"]
""")
    assert urls(configuration, "docker.io", RESOLVE) == [
        "https://z.example/v2", "http://a.example:5000/v2", "https://own.example/odd/api", "https://registry-1.docker.io/v2",
    ]
    first, second, third, last = configuration.hosts("docker.io", RESOLVE)
    assert first.connect_timeout_s == 2.5
    assert second.headers == (("x-one", "1"), ("x-two", "2"), ("x-two", "3"))
    assert third.tls.verify is False
    assert third.tls.authorities == (str(tmp_path / "docker.io/ca.pem"),)
    assert third.tls.pairs == ((str(tmp_path / "docker.io/cert.pem"), str(tmp_path / "docker.io/key.pem")), (str(tmp_path / "docker.io/both.pem"), ""))
    assert (first.namespace, last.namespace) == ("docker.io", "")
    assert urls(configuration, "docker.io", PUSH) == ["https://own.example/odd/api", "https://registry-1.docker.io/v2"]


def test_without_a_server_the_registry_itself_comes_last(tmp_path: Path) -> None:
    configuration = hosts_toml(tmp_path, "registry.example", '[host."https://mirror.example"]\n')
    assert urls(configuration, "registry.example") == ["https://mirror.example/v2", "https://registry.example/v2"]


def test_the_directory_of_a_port_and_the_default_are_found(tmp_path: Path) -> None:
    hosts_toml(tmp_path, "registry.example_5000_", 'server = "https://one.example"\n')
    configuration = hosts_toml(tmp_path, "_default", '[host."https://mirror.example"]\n')
    assert urls(configuration, "registry.example:5000") == ["https://one.example/v2"]
    assert urls(configuration, "other.example") == ["https://mirror.example/v2", "https://other.example/v2"]


def test_a_directory_of_the_registry_goes_before_a_default_in_another_place(tmp_path: Path) -> None:
    hosts_toml(tmp_path / "first", "_default", '[host."https://mirror.example"]\n')
    hosts_toml(tmp_path / "second", "registry.example", 'server = "https://one.example"\n')
    configuration = Configuration(directories=[str(tmp_path / "first"), str(tmp_path / "second")])
    assert urls(configuration, "registry.example") == ["https://one.example/v2"]


@pytest.mark.parametrize("text", [
    "server = [", '[host."https://m.example"]\ncapabilities = ["fly"]\n', '[host."https://m.example"]\nskip_verify = "yes"\n',
    '[host."https://m.example"]\ndial_timeout = "soon"\n', '[host."https://m.example"]\nclient = [["a", "b", "c"]]\n', 'host = "https://m.example"\n',
])
def test_a_broken_hosts_toml_stops_the_pull_and_is_named(tmp_path: Path, text: str) -> None:
    configuration = hosts_toml(tmp_path, "docker.io", text)
    with pytest.raises(InvalidArgument, match=r"hosts\.toml"):
        configuration.hosts("docker.io", PULL)


def test_certificates_of_dockers_directories_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "registry.example"
    folder.mkdir()
    for name in ("ca.crt", "client.cert", "client.key", "other.txt"):
        (folder / name).write_text("")
    [host] = Configuration(directories=[str(tmp_path)]).hosts("registry.example", PULL)
    assert host.tls.authorities == (str(folder / "ca.crt"),)
    assert host.tls.pairs == ((str(folder / "client.cert"), str(folder / "client.key")),)
