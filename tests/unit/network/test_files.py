"""hosts and resolv.conf of containers."""

from __future__ import annotations

from boxship.network import files

HOST = "# comment\nnameserver 127.0.0.53\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.org\noptions edns0\n"


def test_servers_of_the_hosts_loopback_are_left_out_and_search_and_options_stay() -> None:
    assert files.resolv(HOST) == "nameserver 192.0.2.53\nsearch example.org\noptions edns0\n"
    assert "2001:db8::53" in files.resolv(HOST, v6=True)
    assert files.resolv("nameserver 127.0.0.53\n") == "nameserver 8.8.8.8\nnameserver 8.8.4.4\n"


def test_flags_stand_in_for_what_the_host_has() -> None:
    assert files.resolv(HOST, dns=["1.2.3.4"], search=["a.b", "c"], options=["ndots:3"]) == (
        "nameserver 1.2.3.4\nsearch a.b c\noptions ndots:3\n")
    assert files.resolv(HOST, search=["."]) == "nameserver 192.0.2.53\noptions edns0\n"
    assert files.resolv(HOST, keep_local=True).startswith("nameserver 127.0.0.53\n")


def test_on_networks_that_users_made_the_only_server_is_ours() -> None:
    assert files.resolv(HOST, dns=["1.2.3.4"], resolver=True) == "nameserver 127.0.0.11\nsearch example.org\noptions edns0 ndots:0\n"
    assert files.external(HOST)[0] == "127.0.0.53"


def test_hosts_has_the_containers_addresses_last() -> None:
    text = files.hosts(["172.17.0.2", "fd00::2"], "box", [("192.0.2.7", "extra")])
    assert text.startswith("127.0.0.1\tlocalhost\n::1\tlocalhost")
    assert text.endswith("192.0.2.7\textra\n172.17.0.2\tbox\nfd00::2\tbox\n")
