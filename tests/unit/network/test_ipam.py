"""Addresses: none is given twice, each is of its subnet, and what dockerd refuses is refused in its words."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import AlreadyExists, BoxshipError, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from boxship.network import Endpoint, Pool, Sandbox, ipam
from boxship.network.store import Store

STEPS = st.lists(st.one_of(st.just("give"), st.integers(0, 40).map(lambda n: ("take", n)), st.integers(0, 20).map(lambda n: ("release", n))), max_size=60)


@given(STEPS, st.sampled_from(["10.1.0.0/28", "10.1.0.0/30", "10.1.0.0/31", "10.1.0.0/32", "fd00::/124", "fd00::/64"]))
def test_no_address_is_given_while_somebody_has_it(steps: list[object], subnet: str) -> None:
    space = ipam.Space(Pool(subnet))
    network = ip_network(subnet)
    had: list[str] = []
    for step in steps:
        try:
            if step == "give":
                got = space.give()
            elif step[0] == "take":  # type: ignore[index]
                got = space.take(str(network.network_address + step[1]))  # type: ignore[index]
            else:
                if step[1] < len(had):  # type: ignore[index]
                    space.release(had.pop(step[1]))  # type: ignore[index]
                continue
        except BoxshipError:
            continue
        assert got not in had
        assert ip_address(got) in network
        had.append(got)


def test_addresses_come_in_order_and_one_that_was_returned_comes_late() -> None:
    space = ipam.Space(Pool("10.1.0.0/29"))
    space.take("10.1.0.1")
    assert [space.give() for _ in range(3)] == ["10.1.0.2", "10.1.0.3", "10.1.0.4"]
    space.release("10.1.0.2")
    assert [space.give() for _ in range(3)] == ["10.1.0.5", "10.1.0.6", "10.1.0.2"]
    with pytest.raises(FailedPrecondition, match="no available IPv4 addresses"):
        space.give()


def test_a_range_is_kept_to_and_the_rest_of_the_subnet_can_be_asked_for() -> None:
    space = ipam.Space(Pool("10.1.0.0/16", ip_range="10.1.9.0/30"))
    assert [space.give() for _ in range(4)] == ["10.1.9.0", "10.1.9.1", "10.1.9.2", "10.1.9.3"]
    assert space.take("10.1.200.7") == "10.1.200.7"
    with pytest.raises(PermissionDenied, match="Address already in use"):
        space.take("10.1.200.7")
    with pytest.raises(InvalidArgument):
        space.take("10.2.0.1")


@given(st.lists(st.sampled_from([str(each) for base, size in ipam.DEFAULT_POOLS for each in ip_network(base).subnets(new_prefix=size)]), max_size=31))
def test_a_chosen_subnet_overlaps_nothing_that_is_used(used: list[str]) -> None:
    taken = [ip_network(each) for each in used]
    try:
        chosen = ipam.choose_subnet(taken)
    except NotFound:
        assert len(set(used)) == 31
        return
    assert not any(ipam.overlaps(chosen, each) for each in taken)


def test_the_pools_are_dockers_and_other_ones_can_be_set() -> None:
    assert str(ipam.choose_subnet([])) == "172.17.0.0/16"
    assert str(ipam.choose_subnet([ip_network("172.17.0.0/16"), ip_network("172.18.5.0/24")])) == "172.19.0.0/16"
    pools = ipam.parse_pools(["10.9.0.0/16,24"])
    assert str(ipam.choose_subnet([ip_network("10.9.0.0/24")], pools)) == "10.9.1.0/24"
    for wrong in ("10.9.0.0/16", "10.9.0.0/16,8", "x,24", "10.9.0.0/16,33"):
        with pytest.raises(InvalidArgument):
            ipam.parse_pools([wrong])


def test_subnets_of_ipv6_are_of_the_machines_own_prefix() -> None:
    first = ipam.choose_subnet6([], "machine")
    second = ipam.choose_subnet6([first], "machine")
    assert first.prefixlen == second.prefixlen == 64
    assert first != second
    assert first.supernet(new_prefix=48) == second.supernet(new_prefix=48) != ipam.choose_subnet6([], "other").supernet(new_prefix=48)
    assert first.is_private


@pytest.mark.parametrize(("pool", "words"), [
    (Pool("10.78.3.0"), "invalid subnet 10.78.3.0: invalid CIDR block notation"),
    (Pool(""), "invalid subnet : invalid CIDR block notation"),
    (Pool("10.78.3.1/24"), "invalid subnet 10.78.3.1/24: it should be 10.78.3.0/24"),
    (Pool("10.78.3.0/24", "10.99.0.1"), "invalid gateway 10.99.0.1: parent subnet 10.78.3.0/24 doesn't contain this address"),
    (Pool("10.78.3.0/24", ip_range="10.99.0.0/24"), "invalid ip-range 10.99.0.0/24: parent subnet 10.78.3.0/24 doesn't contain ip-range"),
    (Pool("10.78.3.0/24", "fd00::1"), "invalid gateway fd00::1: parent subnet"),
])
def test_a_pool_that_contradicts_itself_is_refused_in_dockerds_words(pool: Pool, words: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        ipam.check_pool(pool)
    assert str(raised.value).startswith(words)


def _sandbox(number: int, address: str) -> Sandbox:
    endpoint = Endpoint(f"e{number}", "net", f"c{number}", "name", "eth0", "veth0", "02:42:00:00:00:01", ipv4=address, prefix4=24)
    return Sandbox(f"s{number}", f"c{number}", f"/netns/{number}", endpoints=[endpoint])


def test_the_store_itself_refuses_an_address_that_somebody_has(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put_sandbox(_sandbox(1, "10.0.0.2"))
    store.put_sandbox(_sandbox(1, "10.0.0.2"))
    with pytest.raises(AlreadyExists):
        store.put_sandbox(_sandbox(2, "10.0.0.2"))
    assert [each.container for each in store.sandboxes()] == ["c1"], "of a refused sandbox nothing stays"
    store.close()
    store = Store(str(tmp_path))
    assert store.sandboxes() == [_sandbox(1, "10.0.0.2")]
    store.delete_sandbox(_sandbox(1, "10.0.0.2"))
    store.put_sandbox(_sandbox(2, "10.0.0.2"))
    store.close()
