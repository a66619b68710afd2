"""Host ports: what was asked for, and that nobody gets what somebody has."""

from __future__ import annotations

import socket

import pytest

from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.network.ports import Ports, Wanted, container_port, wanted


def _wanted(bindings: object, exposed: object = None, *, everything: bool = False) -> list[Wanted]:
    return wanted(bindings, exposed, publish_all=everything, default_ip="")  # type: ignore[arg-type]


def test_bindings_are_read_as_docker_sends_them() -> None:
    assert _wanted({"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}) == [Wanted("tcp", 80, "", 8080, 8080)]
    assert _wanted({"53/udp": [{"HostIp": "127.0.0.1", "HostPort": "5000-5009"}]}) == [Wanted("udp", 53, "127.0.0.1", 5000, 5009)]
    assert _wanted({"80": [{}], "81/tcp": None}) == [Wanted("tcp", 80, "", 0, 0), Wanted("tcp", 81, "", 0, 0)]
    assert _wanted({"80/tcp": [{"HostIp": "[::1]", "HostPort": "1"}]}) == [Wanted("tcp", 80, "::1", 1, 1)]


def test_all_that_is_exposed_is_published_once_and_after_those_who_want_a_certain_port() -> None:
    found = _wanted({"80/tcp": [{"HostPort": "8080"}]}, {"80/tcp": {}, "81/udp": {}}, everything=True)
    assert found == [Wanted("tcp", 80, "", 8080, 8080), Wanted("udp", 81, "", 0, 0)]


@pytest.mark.parametrize("bindings", [
    {"x/tcp": [{}]}, {"0/tcp": [{}]}, {"70000/tcp": [{}]}, {"80/icmp": [{}]}, {"80/tcp": [{"HostPort": "x"}]},
    {"80/tcp": [{"HostPort": "9-8"}]}, {"80/tcp": [{"HostPort": "70000"}]}, {"80/tcp": [{"HostIp": "host"}]}, {"80/tcp": ["8080"]},
])
def test_what_no_port_can_be_is_refused(bindings: object) -> None:
    with pytest.raises(InvalidArgument):
        _wanted(bindings)


def test_a_container_port_has_a_protocol() -> None:
    assert container_port("80") == (80, "tcp")
    assert container_port("80/sctp") == (80, "sctp")


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_is_given_once_until_it_is_released() -> None:
    ports, number = Ports(), _free()
    (first,) = ports.allocate([Wanted("tcp", 80, "127.0.0.1", number, number)], ("0.0.0.0",))
    with pytest.raises(BoxshipError, match=f"Bind for 127.0.0.1:{number} failed: port is already allocated"):
        ports.allocate([Wanted("tcp", 80, "127.0.0.1", number, number)], ("0.0.0.0",))
    with pytest.raises(BoxshipError, match=f"Bind for 0.0.0.0:{number} failed: port is already allocated"):
        ports.allocate([Wanted("tcp", 80, "", number, number)], ("0.0.0.0",))
    other = ports.allocate([Wanted("udp", 80, "127.0.0.1", number, number), Wanted("tcp", 80, "127.0.0.2", number, number)], ("0.0.0.0",))
    ports.release(first)
    again = ports.allocate([Wanted("tcp", 80, "127.0.0.1", number, number)], ("0.0.0.0",))
    for each in [*other, *again]:
        ports.release(each)


def test_a_port_that_another_program_has_is_refused_and_of_a_range_the_next_is_taken() -> None:
    ports = Ports()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = int(other.getsockname()[1])
        with pytest.raises(BoxshipError, match="address already in use"):
            ports.allocate([Wanted("tcp", 80, "127.0.0.1", number, number)], ("0.0.0.0",))
        (found,) = ports.allocate([Wanted("tcp", 80, "127.0.0.1", number, number + 20)], ("0.0.0.0",))
        assert found.host_port > number
        ports.release(found)


def test_of_several_bindings_all_are_taken_or_none() -> None:
    ports, number = Ports(), _free()
    with pytest.raises(BoxshipError):
        ports.allocate([Wanted("tcp", 80, "127.0.0.1", number, number)] * 2, ("0.0.0.0",))
    (found,) = ports.allocate([Wanted("tcp", 80, "127.0.0.1", number, number)], ("0.0.0.0",))
    ports.release(found)
