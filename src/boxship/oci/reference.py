"""Image references: `registry/repository:tag@digest`, and the short forms that people type.

Runs in: whatever names images.
Spec: the grammar of github.com/distribution/reference, and Docker's normalisation: `ubuntu` is
`docker.io/library/ubuntu`. The words of errors are those of that package.

    reference  := name [ ":" tag ] [ "@" digest ]
    name       := domain "/" path
    domain     := host [ ":" port ]        host: domain name, IPv4 address, or IPv6 address in brackets
    path       := component { "/" component }
"""

from __future__ import annotations

from boxship.kit.errors import InvalidArgument
from boxship.oci import digest as digests

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
MAX_PATH = 255

_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library/"

_DIGITS = frozenset("0123456789")
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_ALPHANUMERIC = _LETTERS | _DIGITS
_HEX = frozenset("0123456789abcdefABCDEF")


class Reference:
    """A full reference; `tag` and `digest` are "" where it has none.

    `str()` is the canonical form, `familiar()` the one that people are shown.
    """

    __slots__ = ("digest", "domain", "path", "tag")

    def __init__(self, domain: str, path: str, tag: str = "", digest: str = "") -> None:
        self.domain = domain
        self.path = path
        self.tag = tag
        self.digest = digest

    @property
    def name(self) -> str:
        """The repository, with its registry."""
        return f"{self.domain}/{self.path}"

    def familiar_name(self) -> str:
        """The repository without what Docker's normalisation adds."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        short = self.path.removeprefix(_OFFICIAL)
        return self.path if "/" in short else short

    def familiar(self) -> str:
        """The whole reference in short."""
        return self.familiar_name() + self._suffix()

    def tagged(self) -> Reference:
        """Itself, or with the tag `latest` when it has neither tag nor digest."""
        return self if self.tag or self.digest else Reference(self.domain, self.path, DEFAULT_TAG)

    def pinned(self) -> Reference:
        """What is to be fetched: without the tag when there is a digest, otherwise as `tagged`."""
        return Reference(self.domain, self.path, "", self.digest) if self.digest else self.tagged()

    def with_tag(self, tag: str) -> Reference:
        """The same repository (and digest) under another tag; raises InvalidArgument."""
        if not _is_tag(tag):
            raise InvalidArgument("invalid tag format")
        return Reference(self.domain, self.path, tag, self.digest)

    def with_digest(self, digest: str) -> Reference:
        """The same repository (and tag) at a digest; raises InvalidArgument."""
        if not _is_digest(digest):
            raise InvalidArgument("invalid digest format")
        return Reference(self.domain, self.path, self.tag, digest)

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        return self.name + self._suffix()

    def __repr__(self) -> str:
        return f"Reference({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def is_identifier(text: str) -> bool:
    """Whether `text` is a full image id: 64 lower-case hexadecimal digits."""
    return len(text) == 64 and not text.strip("0123456789abcdef")


def parse(text: str) -> Reference:
    """The reference that a person means by `text`; raises InvalidArgument."""
    if is_identifier(text):
        raise InvalidArgument(f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings")
    domain, rest = _split_domain(text)
    repository = rest.partition(":")[0]
    if repository.lower() != repository:
        raise InvalidArgument(f"invalid reference format: repository name ({repository}) must be lowercase")
    rest, at, digest = rest.partition("@")
    path, colon, tag = rest.partition(":")
    if not _is_domain(domain) or not _is_path(path) or (colon and not _is_tag(tag)):
        raise InvalidArgument("invalid reference format")
    if at:
        if not _is_digest(digest):
            raise InvalidArgument("invalid reference format")
        if digests.split(digest)[0] not in digests.LENGTHS:
            raise InvalidArgument("unsupported digest algorithm")
    if len(path) > MAX_PATH:
        raise InvalidArgument(f"repository name must not be more than {MAX_PATH} characters")
    return Reference(domain, path, tag, digest)


def parse_any(text: str) -> Reference | str:
    """A reference, or a digest when `text` is one or a full image id; raises InvalidArgument."""
    if is_identifier(text):
        return f"sha256:{text}"
    if text.partition(":")[0] in digests.LENGTHS:
        try:
            digests.check(text)
        except InvalidArgument:
            return parse(text)
        return text
    return parse(text)


def _split_domain(text: str) -> tuple[str, str]:
    """Registry and the rest, with what Docker's normalisation adds."""
    first, slash, rest = text.partition("/")
    if not slash:
        return DEFAULT_DOMAIN, _OFFICIAL + text
    if first == _LEGACY_DOMAIN:
        first = DEFAULT_DOMAIN
    elif first != "localhost" and "." not in first and ":" not in first and first.lower() == first:
        first, rest = DEFAULT_DOMAIN, text
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = _OFFICIAL + rest
    return first, rest


def _is_domain(text: str) -> bool:
    if text.startswith("["):
        address, bracket, port = text[1:].partition("]")
        if not bracket or not address or address.strip("0123456789abcdefABCDEF:") or port[:1] not in ("", ":"):
            return False
        colon, port = port[:1], port[1:]
    else:
        host, colon, port = text.partition(":")
        for label in host.split("."):
            if not label or label[0] == "-" or label[-1] == "-" or not _ALPHANUMERIC.issuperset(label.replace("-", "")):
                return False
    return not colon or (port != "" and _DIGITS.issuperset(port))


def _is_path(text: str) -> bool:
    return all(_is_component(component) for component in text.split("/"))


def _is_component(text: str) -> bool:
    """Words of lower-case letters and digits, between them a dot, one or two underscores, or any number of dashes."""
    if not text or text[0] not in _LOWER or text[-1] not in _LOWER:
        return False
    separator = ""
    for letter in text:
        if letter in _LOWER:
            if separator not in ("", ".", "_", "__") and separator.strip("-"):
                return False
            separator = ""
        elif letter in "._-":
            separator += letter
        else:
            return False
    return True


def _is_tag(text: str) -> bool:
    return (
        0 < len(text) <= 128
        and text[0] not in ".-"
        and _ALPHANUMERIC.issuperset(text.replace("_", "").replace(".", "").replace("-", ""))
    )


def _is_digest(text: str) -> bool:
    algorithm, _, encoded = text.partition(":")
    for separator in "+._-":
        algorithm = algorithm.replace(separator, " ")
    words = algorithm.split(" ")
    if not all(word and word[0] in _LETTERS and _ALPHANUMERIC.issuperset(word) for word in words):
        return False
    if len(encoded) < 32 or not _HEX.issuperset(encoded):
        return False
    digests.check(text)
    return True
