"""Networks through the docker CLI: addresses, routes, published ports, isolation, connecting, and what is left: nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from support.image import NAME
from support.networks import HOST, NEIGHBOUR, Site, open_site


@pytest.fixture(scope="module")
def opened() -> Iterator[Site]:
    with open_site() as made:
        yield made


@pytest.fixture
def site(opened: Site) -> Iterator[Site]:
    yield opened
    opened.clean()


def _pings(site: Site, name: str, address: str) -> bool:
    return site.code("exec", name, "busybox", "ping", "-c", "1", "-W", "1", address) == 0


def test_the_machines_network_is_not_touched_before_a_container_needs_it() -> None:
    with open_site() as fresh:
        assert fresh.kernel() == {"veths": [], "bridges": [], "namespaces": [], "ports": []}
        assert fresh.stage.out("cat", "/proc/sys/net/ipv4/ip_forward") == "0"
        assert fresh("network", "ls", "--format", "{{.Name}} {{.Driver}}").split("\n") == ["bridge bridge", "host host", "none null"]
        fresh("run", "--rm", "--network", "none", NAME, "true")
        assert fresh.kernel()["bridges"] == []


def test_a_container_of_the_default_bridge_has_an_address_a_way_out_and_its_name_in_hosts(site: Site) -> None:
    found = site.run("one")
    assert (found["IPAddress"], found["Gateway"], found["IPPrefixLen"]) == ("172.17.0.2", "172.17.0.1", 16)
    assert found["Networks"]["bridge"]["IPAddress"] == found["IPAddress"]
    assert site("exec", "one", "ip", "-o", "-4", "address", "show", "eth0").split()[3] == "172.17.0.2/16"
    assert found["MacAddress"] in site("exec", "one", "ip", "link", "show", "eth0")
    assert site("exec", "one", "ip", "route").startswith("default via 172.17.0.1")
    assert site("exec", "one", "tail", "-1", "/etc/hosts").split() == ["172.17.0.2", site("exec", "one", "hostname")]
    assert _pings(site, "one", NEIGHBOUR)
    assert "172.17" not in site.stage.out("nsenter", f"--net={site.folder}/neighbour", "ip", "neighbour"), "under the host's address"
    assert site("exec", "one", "cat", "/proc/sys/net/ipv6/conf/eth0/disable_ipv6") == "1"
    site("stop", "--time", "0", "one")
    after = site.inspect("one")["NetworkSettings"]
    assert (after["IPAddress"], after["SandboxID"], after["Ports"]) == ("", "", {})


def test_a_published_port_is_reached_from_everywhere_and_the_container_itself_from_nowhere_else(site: Site) -> None:
    found = site.serve("web", "--publish", "8080:80", "--publish", "127.0.0.1:8081:80")
    address = found["IPAddress"]
    site.run("beside")
    site("network", "create", "other")
    site.run("elsewhere", "--network", "other")
    for where in ("neighbour", "host", "beside", "elsewhere", "web"):
        assert site.ask(where, HOST, 8080) == "web", where
    assert site.ask("beside", address) == "web"
    assert site.ask("elsewhere", address) == "", "networks do not reach each other"
    site.stage.run("nsenter", f"--net={site.folder}/neighbour", "ip", "route", "replace", "172.17.0.0/16", "via", HOST)
    assert site.ask("neighbour", address) == "", "a neighbour that knows the way"
    assert site("port", "web").splitlines()[0] == "80/tcp -> 0.0.0.0:8080"
    assert "0.0.0.0:8080->80/tcp" in site("ps", "--format", "{{.Ports}}", "--filter", "publish=8080")
    site("rm", "--force", "web")
    assert site.ask("neighbour", HOST, 8080) == ""


def test_the_hosts_loopback_leads_to_published_ports_too(site: Site) -> None:
    site.serve("web", "--publish", "8080:80", "--publish", "127.0.0.1:8081:80")
    for address, port in (("127.0.0.1", 8080), ("::1", 8080), ("127.0.0.1", 8081)):
        assert site.ask("host", address, port) == "web", address
    assert site.ask("neighbour", HOST, 8081) == "", "bound to the loopback alone"
    assert [each["HostIp"] for each in site.inspect("web")["NetworkSettings"]["Ports"]["80/tcp"]] == ["0.0.0.0", "::", "127.0.0.1"]


def test_a_port_that_is_taken_is_refused_in_dockers_words_and_free_again_at_once(site: Site) -> None:
    site.serve("first", "--publish", "8080:80")
    said = site.fails("run", "--name", "second", "--publish", "8080:80", NAME, "true")
    assert "Bind for 0.0.0.0:8080 failed: port is already allocated" in said
    assert site.inspect("second")["State"]["Status"] == "created"
    assert site.code("rm", "second") == 0
    site("rm", "--force", "first")
    site.serve("third", "--publish", "8080:80")
    assert site.ask("neighbour", HOST, 8080) == "third"
    listener = site.stage.start("busybox", "nc", "-l", "-p", "8085", log=site.folder / "listener")
    site.stage.eventually(lambda: ":1F95 " in site.stage.out("cat", "/proc/net/tcp", "/proc/net/tcp6"), why="a program on the port")
    assert "address already in use" in site.fails("run", "--rm", "--publish", "8085:80", NAME, "true")
    site.stage.stop(listener)


def test_ports_are_chosen_for_who_does_not_choose(site: Site) -> None:
    site.run("all", "--publish-all", "--expose", "70", "--expose", "71/udp", "--publish", "9000-9005:72")
    ports = site.inspect("all")["NetworkSettings"]["Ports"]
    numbers = {key: int(value[0]["HostPort"]) for key, value in ports.items()}
    low, high = map(int, site.stage.out("cat", "/proc/sys/net/ipv4/ip_local_port_range").split())
    assert numbers["72/tcp"] == 9000
    assert all(low <= numbers[key] <= high for key in ("70/tcp", "71/udp"))
    site.run("next", "--publish", "9000-9005:72")
    assert site("port", "next", "72").split()[0] == "0.0.0.0:9001"


def test_networks_are_made_shown_and_removed(site: Site) -> None:
    made = site("network", "create", "--subnet", "10.5.0.0/16", "--gateway", "10.5.0.9", "--ip-range", "10.5.1.0/24", "--label", "a=b",
        "--aux-address", "x=10.5.1.0", "mine")
    found = site.inspect("mine", "network")
    assert found["Id"] == made
    assert found["IPAM"]["Config"] == [
        {"Subnet": "10.5.0.0/16", "IPRange": "10.5.1.0/24", "Gateway": "10.5.0.9", "AuxiliaryAddresses": {"x": "10.5.1.0"}}]
    assert f"br-{made[:12]}" in site.kernel()["bridges"]
    assert site("network", "ls", "--quiet", "--no-trunc", "--filter", "label=a=b", "--filter", "type=custom") == made
    assert site.run("one", "--network", "mine")["Networks"]["mine"]["IPAddress"] == "10.5.1.1"
    assert site.run("two", "--network", "mine", "--ip", "10.5.200.1")["Networks"]["mine"]["IPAddress"] == "10.5.200.1"
    assert "Address already in use" in site.fails("run", "--rm", "--network", "mine", "--ip", "10.5.200.1", NAME, "true")
    assert set(site.inspect("mine", "network")["Containers"]) == {site.inspect("one")["Id"], site.inspect("two")["Id"]}
    assert "has active endpoints" in site.fails("network", "rm", "mine")
    assert "Pool overlaps" in site.fails("network", "create", "--subnet", "10.5.7.0/24", "over")
    assert "already exists" in site.fails("network", "create", "mine")
    site("rm", "--force", "one", "two")
    site("network", "rm", "mine")
    assert f"br-{made[:12]}" not in site.kernel()["bridges"]
    assert "pre-defined network" in site.fails("network", "rm", "bridge")


def test_a_static_address_is_there_again_after_a_restart(site: Site) -> None:
    site("network", "create", "--subnet", "10.6.0.0/30", "tight")
    site.run("one", "--network", "tight", "--ip", "10.6.0.2", "--mac-address", "02:00:00:00:00:07")
    assert "no available IPv4 addresses" in site.fails("run", "--rm", "--network", "tight", NAME, "true")
    for _ in range(3):
        site("restart", "--time", "0", "one")
    found = site.inspect("one")["NetworkSettings"]["Networks"]["tight"]
    assert (found["IPAddress"], found["MacAddress"]) == ("10.6.0.2", "02:00:00:00:00:07")
    site("rm", "--force", "one")
    assert site.run("two", "--network", "tight")["Networks"]["tight"]["IPAddress"] == "10.6.0.2", "the last one, given back"


def test_running_containers_are_connected_and_disconnected(site: Site) -> None:
    site("network", "create", "back")
    site.serve("base", "--network", "back")
    address = site.inspect("base")["NetworkSettings"]["Networks"]["back"]["IPAddress"]
    site.run("front", "--publish", "8090:80")
    assert site.ask("front", address) == ""
    site("network", "connect", "--alias", "x", "back", "front")
    assert site.ask("front", address) == "base"
    assert {"lo", "eth0", "eth1"} == set(site("exec", "front", "ls", "/sys/class/net").split())
    assert set(site.inspect("front")["NetworkSettings"]["Networks"]) == {"bridge", "back"}
    assert "already exists in network back" in site.fails("network", "connect", "back", "front")
    site("network", "disconnect", "bridge", "front")
    assert _pings(site, "front", NEIGHBOUR), "the way out is that of the other network now"
    site("network", "disconnect", "back", "front")
    assert site.ask("front", address) == ""
    assert "is not connected to network" in site.fails("network", "disconnect", "back", "front")
    events = site("events", "--since", "60s", "--until", "0s", "--filter", "type=network", "--format", "{{.Action}} {{.Actor.Attributes.name}}")
    assert "connect back" in events
    assert "disconnect bridge" in events


def test_ipv6_internal_networks_and_networks_without_talk(site: Site) -> None:
    site("network", "create", "--ipv6", "--subnet", "fd00:7::/64", "--subnet", "10.7.0.0/24", "six")
    site.serve("one", "--network", "six")
    site.run("two", "--network", "six")
    found = site.inspect("one")["NetworkSettings"]["Networks"]["six"]
    assert (found["GlobalIPv6Address"], found["GlobalIPv6PrefixLen"], found["IPv6Gateway"]) == ("fd00:7::2", 64, "fd00:7::1")
    assert site.ask("two", "fd00:7::2") == "one"
    assert "default via fd00:7::1" in site("exec", "two", "ip", "-6", "route")
    site("network", "create", "--internal", "shut")
    site.serve("in", "--network", "shut")
    site.run("in2", "--network", "shut")
    assert site.ask("in2", site.inspect("in")["NetworkSettings"]["Networks"]["shut"]["IPAddress"]) == "in"
    assert not _pings(site, "in", NEIGHBOUR)
    assert "default" not in site("exec", "in", "ip", "route")
    site("network", "create", "--opt", "com.docker.network.bridge.enable_icc=false", "mute")
    site.serve("m1", "--network", "mute")
    site.run("m2", "--network", "mute")
    assert site.ask("m2", site.inspect("m1")["NetworkSettings"]["Networks"]["mute"]["IPAddress"]) == ""
    assert _pings(site, "m2", NEIGHBOUR)


def test_macvlan_on_a_device_of_the_host(site: Site) -> None:
    site("network", "create", "--driver", "macvlan", "--opt", "parent=up0", "--subnet", "203.0.113.0/24", "--gateway", NEIGHBOUR,
        "--ip-range", "203.0.113.64/26", "lan")
    found = site.run("one", "--network", "lan")["Networks"]["lan"]
    assert found["IPAddress"].startswith("203.0.113.6")
    assert _pings(site, "one", NEIGHBOUR)
    assert "not found" not in site.fails("network", "create", "--driver", "macvlan", "--opt", "parent=nope", "no")


def _lookup(site: Site, where: str, name: str) -> set[str]:
    """Addresses that the container's own name server tells."""
    said = site.stage.run(*site._words("exec", where, "busybox", "nslookup", name), check=False).stdout
    return {line.split()[1 if line.startswith("Address:") else 2] for line in said.splitlines()[2:] if line.startswith("Address")}


def test_names_are_resolved_on_networks_that_users_make(site: Site) -> None:
    for name in ("front", "back"):
        site("network", "create", name)
    site.run("db", "--network", "back", "--network-alias", "store")
    site.run("web", "--network", "front")
    site.run("app", "--network", "back", "--link", "db:linked")
    address = site.inspect("db")["NetworkSettings"]["Networks"]["back"]["IPAddress"]
    assert site("exec", "app", "head", "-1", "/etc/resolv.conf") == "nameserver 127.0.0.11"
    for name in ("db", "store", "linked", "db.back", site.inspect("db")["Id"][:12]):
        assert _lookup(site, "app", name) == {address}, name
    assert _lookup(site, "web", "db") == set(), "on another network"
    site("network", "connect", "--alias", "late", "back", "web")
    assert _lookup(site, "web", "db") == {address}
    assert _lookup(site, "app", "late") == {site.inspect("web")["NetworkSettings"]["Networks"]["back"]["IPAddress"]}
    site("network", "disconnect", "back", "web")
    assert _lookup(site, "app", "late") == set()
    site("rename", "db", "other")
    assert _lookup(site, "app", "other") == {address}
    namespace = site.inspect("app")["NetworkSettings"]["SandboxKey"]
    site.kill()
    assert address in site.stage.out("nsenter", f"--net={namespace}", "busybox", "nslookup", "other", "127.0.0.11"), "without a daemon"
    site.start()
    assert _lookup(site, "app", "other") == {address}
    site("rm", "--force", "other")
    assert _lookup(site, "app", "other") == set()


def test_links_on_the_default_bridge(site: Site) -> None:
    site.serve("db", "--expose", "80")
    env = site("run", "--rm", "--link", "db:store", NAME, "env").splitlines()
    assert "STORE_PORT_80_TCP_ADDR=172.17.0." in "\n".join(env)
    assert "store" in site("run", "--rm", "--link", "db:store", NAME, "cat", "/etc/hosts")


def test_nothing_is_left_when_containers_and_networks_are_gone(site: Site) -> None:
    site("network", "create", "gone")
    for number in range(3):
        site.run(f"c{number}", "--network", "gone", "--publish-all", "--expose", "80")
    site.clean()
    site.stage.eventually(lambda: not site.kernel()["veths"], why="pairs going")
    left = site.kernel()
    assert left["ports"] == []
    assert len(left["namespaces"]) <= 3, "those made ahead"
    assert len(left["bridges"]) == 1, "the default one stays"


def test_a_killed_daemons_containers_keep_their_networks_and_those_that_ended_give_them_back(site: Site) -> None:
    site.serve("stays", "--publish", "8080:80")
    before = site.inspect("stays")["NetworkSettings"]
    site.run("ends", "--publish", "8081:80")
    pid = site.inspect("ends")["State"]["Pid"]
    site.kill()
    assert site.ask("neighbour", HOST, 8080) == "stays", "without a daemon"
    site.stage.run("kill", "-9", str(pid))
    site.start()
    after = site.inspect("stays")["NetworkSettings"]
    assert json.dumps(after, sort_keys=True) == json.dumps(before, sort_keys=True)
    assert site.ask("neighbour", HOST, 8080) == "stays"
    site.stage.eventually(lambda: len(site.kernel()["veths"]) == 1, why="the pair of the dead container going")
    site.serve("new", "--publish", "8081:80")
    assert site.inspect("new")["NetworkSettings"]["IPAddress"] != after["IPAddress"]
    assert site.ask("neighbour", HOST, 8081) == "new"
