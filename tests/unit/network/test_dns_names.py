"""Names of containers: each network's own, and nobody's after its end."""

from hypothesis import given
from hypothesis import strategies as st

from boxship.network.dns.names import Names


def names() -> Names:
    made = Names()
    made.network("n1", "Front")
    made.network("n2", "back.end")
    made.join("n1", "e1", ["web", "0123456789ab", "www"], ["10.0.0.2", "fd00::2"])
    made.join("n1", "e2", ["web2", "www"], ["10.0.0.3"])
    made.join("n2", "e3", ["db"], ["10.1.0.2"])
    return made


def test_names_are_found_on_the_networks_one_is_on() -> None:
    made = names()
    assert made.find([("n1", {})], "web") == ["10.0.0.2", "fd00::2"]
    assert made.find([("n1", {})], "www") == ["10.0.0.2", "fd00::2", "10.0.0.3"]
    assert made.find([("n1", {})], "db") is None
    assert made.find([("n1", {}), ("n2", {})], "db") == ["10.1.0.2"]
    assert made.find([("nowhere", {})], "db") is None


def test_the_network_may_be_named_too() -> None:
    made = names()
    both = [("n1", dict[str, str]()), ("n2", dict[str, str]())]
    assert made.find(both, "web.front") == ["10.0.0.2", "fd00::2"]
    assert made.find(both, "db.back.end") == ["10.1.0.2"]
    assert made.find(both, "db.front") is None
    assert made.find([("n1", {})], "db.back.end") is None


def test_links_are_names_of_one_container() -> None:
    made = names()
    assert made.find([("n1", {"server": "web2"})], "server") == ["10.0.0.3"]
    assert made.find([("n1", {"server": "web2"})], "server.front") == ["10.0.0.3"]
    assert made.find([("n1", {})], "server") is None


def test_addresses_are_told_as_the_first_name() -> None:
    made = names()
    assert made.reverse([("n1", {})], "fd00::2") == "web.front"
    assert made.reverse([("n2", {})], "10.0.0.2") == ""


def test_what_was_not_named_again_is_gone() -> None:
    made = names()
    made.begin()
    made.network("n1", "front")
    made.join("n1", "e2", ["web2"], ["10.0.0.4"])
    made.end()
    assert made.find([("n1", {})], "web") is None
    assert made.find([("n1", {})], "www") is None
    assert made.find([("n1", {})], "web2") == ["10.0.0.4"]
    assert made.find([("n2", {})], "db") is None
    assert made.reverse([("n1", {})], "10.0.0.3") == ""


@given(st.lists(st.tuples(st.sampled_from(["join", "leave"]), st.integers(0, 5), st.sets(st.sampled_from("abc"), min_size=1)), max_size=40))
def test_after_any_story_it_knows_what_is_there(story: list[tuple[str, int, set[str]]]) -> None:
    made = Names()
    there: dict[int, set[str]] = {}
    for what, who, called in story:
        if what == "join":
            made.join("n", str(who), sorted(called), [f"10.0.0.{who}"])
            there[who] = called
        else:
            made.leave(str(who))
            there.pop(who, None)
    for name in "abc":
        found = made.find([("n", {})], name)
        assert sorted(found or []) == sorted(f"10.0.0.{who}" for who, called in there.items() if name in called)
