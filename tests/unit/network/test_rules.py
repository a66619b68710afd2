"""The text of the nftables table, and the same elements as the kernel keeps them."""

from __future__ import annotations

from boxship.network import Published, rules
from boxship.network.rules import Bridge

OPEN = Bridge("br-open", ("10.1.0.0/16", "fd00:1::/64"), masquerade=True, icc=True, internal=False)
SHUT = Bridge("br-shut", ("10.2.0.0/16",), masquerade=False, icc=False, internal=True)


def test_the_text_replaces_the_whole_table_and_no_other() -> None:
    text = rules.render("boxship", [OPEN], [], strict=False)
    assert text.splitlines()[:2] == ["table inet boxship {}", "delete table inet boxship"]
    assert "flush ruleset" not in text
    heads = [line.split("inet ")[1] for line in text.splitlines() if line.startswith(("table", "delete"))]
    assert {head.split()[0] for head in heads} == {"boxship"}


def test_the_same_state_gives_the_same_text_whatever_its_order() -> None:
    ports = [Published("tcp", "0.0.0.0", 8080, 80, "10.1.0.2"), Published("udp", "192.0.2.1", 53, 53, "10.1.0.3")]
    assert rules.render("t", [OPEN, SHUT], ports, strict=True) == rules.render("t", [SHUT, OPEN], ports[::-1], strict=True)


def test_networks_do_not_reach_each_other_and_an_internal_one_reaches_nothing() -> None:
    lines = [line.strip() for line in rules.render("t", [OPEN, SHUT], [], strict=False).splitlines()]
    forward = lines[lines.index("chain filter_forward {"):]
    assert forward.index('iifname "br-open" oifname "br-open" accept') < forward.index("oifname @bridges drop")
    assert forward.index('iifname "br-shut" oifname "br-shut" drop') < forward.index('iifname "br-shut" drop')
    assert 'ip saddr 10.1.0.0/16 oifname != "br-open" masquerade' in lines
    assert 'ip6 saddr fd00:1::/64 oifname != "br-open" masquerade' in lines
    assert not [line for line in lines if "10.2.0.0/16" in line and "!=" in line]


def test_others_traffic_is_let_alone_unless_it_was_us_who_made_the_machine_a_router() -> None:
    first = "iifname != @bridges oifname != @bridges"
    assert f"{first} accept" in rules.render("t", [OPEN], [], strict=False)
    assert f"{first} drop" in rules.render("t", [OPEN], [], strict=True)


def test_published_ports_are_elements_and_the_hosts_loopback_is_the_proxys() -> None:
    ports = [
        Published("tcp", "0.0.0.0", 8080, 80, "10.1.0.2"), Published("tcp", "192.0.2.1", 8081, 80, "10.1.0.2"),
        Published("tcp", "127.0.0.1", 8082, 80, "10.1.0.2"), Published("tcp", "::", 8083, 80, "10.1.0.2"),
        Published("sctp", "::", 8084, 80, "fd00:1::2"),
    ]
    text = rules.render("t", [OPEN], ports, strict=False)
    assert "ports4 { type inet_proto . inet_service : ipv4_addr . inet_service; elements = { tcp . 8080 : 10.1.0.2 . 80 }; }" in text
    assert "elements = { 192.0.2.1 . tcp . 8081 : 10.1.0.2 . 80 }" in text
    assert "elements = { sctp . 8084 : fd00:1::2 . 80 }" in text
    assert "8082" not in text
    assert "8083" not in text


def test_an_element_is_padded_field_by_field() -> None:
    made = rules.map_element(Published("tcp", "192.0.2.1", 8081, 80, "10.1.0.2"))
    assert made.name == "ports4_at"
    assert made.key == bytes([192, 0, 2, 1, 6, 0, 0, 0, 0x1F, 0x91, 0, 0])
    assert made.value == bytes([10, 1, 0, 2, 0, 80, 0, 0])
