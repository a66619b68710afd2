"""Image references; the valid and invalid names are those that github.com/distribution/reference tests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxship.kit.errors import InvalidArgument
from boxship.oci.reference import Reference, is_identifier, parse, parse_any

IDENTIFIER = "1a3f5e7d9c1b3a5f7e9d1c3b5a7f9e1d3c5b7a9f1e3d5d7c9b1a3f5e7d9c1b3a"
SHA = "sha256:86e0e091d0da6bde2456dbb48306f3956bbeb2eae1b5b9a43045843f69fe4aaa"


@pytest.mark.parametrize(
    ("typed", "full", "familiar"),
    [
        ("ubuntu", "docker.io/library/ubuntu", "ubuntu"),
        ("ubuntu:22.04", "docker.io/library/ubuntu:22.04", "ubuntu:22.04"),
        ("library/ubuntu", "docker.io/library/ubuntu", "ubuntu"),
        ("docker.io/ubuntu", "docker.io/library/ubuntu", "ubuntu"),
        ("index.docker.io/ubuntu", "docker.io/library/ubuntu", "ubuntu"),
        ("index.docker.io/library/ubuntu-12.04-base", "docker.io/library/ubuntu-12.04-base", "ubuntu-12.04-base"),
        ("fooo/bar", "docker.io/fooo/bar", "fooo/bar"),
        ("library/foo/bar", "docker.io/library/foo/bar", "library/foo/bar"),
        ("other/library", "docker.io/other/library", "other/library"),
        ("localhost/fooo", "localhost/fooo", "localhost/fooo"),
        ("LOCALDOMAIN/fooo/bar", "LOCALDOMAIN/fooo/bar", "LOCALDOMAIN/fooo/bar"),
        ("Foo/bar", "Foo/bar", "Foo/bar"),
        ("127.0.0.1:8000/private/moonbase", "127.0.0.1:8000/private/moonbase", "127.0.0.1:8000/private/moonbase"),
        ("example.com:8000/base:v1", "example.com:8000/base:v1", "example.com:8000/base:v1"),
        ("[fc00::1]:5000/docker", "[fc00::1]:5000/docker", "[fc00::1]:5000/docker"),
        ("[fc00:1:2:3:4:5:6:7]/a", "[fc00:1:2:3:4:5:6:7]/a", "[fc00:1:2:3:4:5:6:7]/a"),
        ("192.168.0.1", "docker.io/library/192.168.0.1", "192.168.0.1"),
        ("192.168.0.1:80", "docker.io/library/192.168.0.1:80", "192.168.0.1:80"),
        ("docker---rules/docker", "docker.io/docker---rules/docker", "docker---rules/docker"),
        ("dock__er/docker", "docker.io/dock__er/docker", "dock__er/docker"),
        ("d/docker", "docker.io/d/docker", "d/docker"),
        ("docker.io/" + IDENTIFIER, "docker.io/library/" + IDENTIFIER, IDENTIFIER),
        ("busybox:latest@" + SHA, "docker.io/library/busybox:latest@" + SHA, "busybox:latest@" + SHA),
        ("busybox@" + SHA, "docker.io/library/busybox@" + SHA, "busybox@" + SHA),
        ("a:" + "x" * 128, "docker.io/library/a:" + "x" * 128, "a:" + "x" * 128),
        ("a:_x.-Y", "docker.io/library/a:_x.-Y", "a:_x.-Y"),
    ],
)
def test_what_people_type_means(typed: str, full: str, familiar: str) -> None:
    reference = parse(typed)
    assert str(reference) == full
    assert reference.familiar() == familiar
    assert parse(full) == reference


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("", "invalid reference format"),
        (":", "invalid reference format"),
        ("@", "invalid reference format"),
        ("https://github.com/docker/docker", "invalid reference format"),
        ("docker/Docker", "invalid reference format: repository name (docker/Docker) must be lowercase"),
        ("Ubuntu", "invalid reference format: repository name (library/Ubuntu) must be lowercase"),
        ("docker.io/docker/Docker", "invalid reference format: repository name (docker/Docker) must be lowercase"),
        ("-docker", "invalid reference format"),
        ("-docker.io/docker/docker", "invalid reference format"),
        ("docker-/docker", "invalid reference format"),
        ("docker///docker", "invalid reference format"),
        ("docker/", "invalid reference format"),
        ("/docker", "invalid reference format"),
        ("____/____", "invalid reference format"),
        ("_docker/_docker", "invalid reference format"),
        ("dock..er/docker", "invalid reference format"),
        ("a/dock..er", "invalid reference format"),
        ("dock_.er/docker", "invalid reference format"),
        ("a/dock___er", "invalid reference format"),
        ("a/dock-.er", "invalid reference format"),
        ("[fc00::1]", "invalid reference format"),
        ("[fc00::1]:5000", "invalid reference format"),
        ("fc00::1:5000/debian", "invalid reference format"),
        ("[fe80::1%eth0]:5000/debian", "invalid reference format"),
        ("[2001:db8:3:4::192.0.2.33]:5000/debian", "invalid reference format"),
        ("localhost:/a", "invalid reference format"),
        ("a.b:x/c", "invalid reference format"),
        ("a:", "invalid reference format"),
        ("a:-x", "invalid reference format"),
        ("a:.x", "invalid reference format"),
        ("a:" + "x" * 129, "invalid reference format"),
        ("a:b:c", "invalid reference format"),
        ("a b", "invalid reference format"),
        ("a\0", "invalid reference format"),
        ("\u0430", "invalid reference format"),
        ("../../etc", "invalid reference format"),
        ("a@sha256:abc", "invalid reference format"),
        ("a@sha256:" + "AB" * 32, "invalid checksum digest format"),
        ("a@" + SHA + "00", "invalid checksum digest length"),
        ("a@" + SHA.upper(), "invalid reference format: repository name (library/a@SHA256) must be lowercase"),
        ("a@md5:" + "a" * 32, "unsupported digest algorithm"),
        ("a@" + SHA + "@" + SHA, "invalid reference format"),
        (IDENTIFIER, f"invalid repository name ({IDENTIFIER}), cannot specify 64-byte hexadecimal strings"),
        ("a" * 256 + "/docker", "repository name must not be more than 255 characters"),
    ],
)
def test_what_is_no_reference_is_refused(typed: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(typed)
    assert str(caught.value) == words


def test_parts() -> None:
    reference = parse("example.com:5000/team/app:v1@" + SHA)
    assert (reference.domain, reference.path, reference.tag, reference.digest) == ("example.com:5000", "team/app", "v1", SHA)
    assert reference.name == "example.com:5000/team/app"
    assert reference.familiar_name() == "example.com:5000/team/app"


def test_default_tag_is_added_only_where_nothing_else_is_said() -> None:
    assert str(parse("a").tagged()) == "docker.io/library/a:latest"
    assert str(parse("a:x").tagged()) == "docker.io/library/a:x"
    assert str(parse("a@" + SHA).tagged()) == "docker.io/library/a@" + SHA


def test_digest_counts_more_than_tag_when_fetching() -> None:
    assert str(parse("a:x@" + SHA).pinned()) == "docker.io/library/a@" + SHA
    assert str(parse("a").pinned()) == "docker.io/library/a:latest"


def test_tag_and_digest_can_be_put_on() -> None:
    assert str(parse("a@" + SHA).with_tag("y")) == f"docker.io/library/a:y@{SHA}"
    assert str(parse("a:x").with_digest(SHA)) == f"docker.io/library/a:x@{SHA}"
    with pytest.raises(InvalidArgument, match="invalid tag format"):
        parse("a").with_tag("-foo")
    with pytest.raises(InvalidArgument, match="invalid digest format"):
        parse("a").with_digest("foo")


def test_identifier_and_digest_are_references_too() -> None:
    assert is_identifier(IDENTIFIER)
    assert not is_identifier(IDENTIFIER.upper())
    assert parse_any(IDENTIFIER) == "sha256:" + IDENTIFIER
    assert parse_any(SHA) == SHA
    assert parse_any("redis") == Reference("docker.io", "library/redis")
    assert parse_any("sha256:" + "a" * 20) == Reference("docker.io", "library/sha256", "a" * 20)


def test_references_can_be_keys() -> None:
    assert {parse("a"), parse("docker.io/library/a")} == {parse("a")}
    assert repr(parse("a")) == "Reference('docker.io/library/a')"
    assert parse("a") != "docker.io/library/a"


@given(st.text(st.sampled_from(list("aZ0.:/@-_[]")), max_size=20))
def test_canonical_form_is_stable_and_safe(typed: str) -> None:
    try:
        reference = parse(typed)
    except InvalidArgument:
        return
    assert parse(str(reference)) == reference
    assert parse(reference.familiar()) == reference
    assert not any(part in ("", ".", "..") for part in reference.path.split("/"))
