"""Platforms: how people write them, which of an index's manifests fits the machine, and which fits best.

Runs in: the daemon.
Spec: image-spec 1.1.1, image-index.md (platform); the normalisation and the order of what is compatible are those of
github.com/containerd/platforms, so that the same image is chosen as by containerd.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from boxship.kit.errors import InvalidArgument
from boxship.oci.image import Descriptor, Platform

_MACHINES = {
    "x86_64": ("amd64", ""), "aarch64": ("arm64", ""), "armv7l": ("arm", "v7"), "armv8l": ("arm", "v8"), "armv6l": ("arm", "v6"),
    "i686": ("386", ""), "i586": ("386", ""), "i386": ("386", ""), "ppc64le": ("ppc64le", ""), "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""), "loongarch64": ("loong64", ""), "mips64": ("mips64le", ""),
}
_SYSTEMS = frozenset((
    "aix", "android", "darwin", "dragonfly", "freebsd", "hurd", "illumos", "ios", "js", "linux", "nacl", "netbsd", "openbsd",
    "plan9", "solaris", "windows", "zos",
))
_ARCHITECTURES = frozenset((
    "386", "amd64", "amd64p32", "arm", "armbe", "arm64", "arm64be", "ppc64", "ppc64le", "loong64", "mips", "mipsle", "mips64",
    "mips64le", "mips64p32", "mips64p32le", "ppc", "riscv", "riscv64", "s390", "s390x", "sparc", "sparc64", "wasm",
))
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")

# The last minor version of arm64 v8 whose features v9.N includes: N + 5, and v8.9 is the last there is.
_V8_OF_V9 = (5, 6, 7, 8, 9, 9, 9, 9)


def host() -> Platform:
    """What this machine runs."""
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    return Platform(os="linux", architecture=architecture, variant=variant)


def normalize(platform: Platform) -> Platform:
    """The same platform in canonical words."""
    architecture, variant = _architecture(platform.architecture, platform.variant)
    return Platform(
        os=_system(platform.os), architecture=architecture, variant=variant, os_version=platform.os_version,
        os_features=sorted(platform.os_features),
    )


def parse(text: str) -> Platform:
    """`OS[(VERSION[+FEATURE...])]`, `ARCH`, `OS/ARCH` or `OS/ARCH/VARIANT`; raises InvalidArgument."""
    if "*" in text:
        raise InvalidArgument(f'"{text}": wildcards not yet supported')
    parts = text.split("/")
    name, version, features = _options(parts[0], text)
    for part in (name, *parts[1:]):
        if not part or not _WORD.issuperset(part):
            raise InvalidArgument(f'"{part}" is an invalid component of "{text}"')
    variant = ""
    if len(parts) == 1:
        own = host()
        if _system(name) in _SYSTEMS:
            system, architecture, variant = _system(name), own.architecture, own.variant if own.variant != "v7" else ""
        else:
            system = "linux"
            architecture, variant = _architecture(name, "")
            if architecture not in _ARCHITECTURES:
                raise InvalidArgument(f'"{text}": unknown operating system or architecture')
    elif len(parts) <= 3:
        system = _system(name)
        architecture, variant = _architecture(parts[1], parts[2] if len(parts) == 3 else "")
        if len(parts) == 3 and architecture == "arm64" and not variant:
            variant = "v8"
    else:
        raise InvalidArgument(f'"{text}": cannot parse platform specifier')
    if len(parts) < 3 and architecture == "arm" and variant == "v7":
        variant = ""
    return Platform(os=system, architecture=architecture, variant=variant, os_version=version, os_features=features)


def format(platform: Platform) -> str:  # noqa: A001 - the counterpart of parse
    """`OS/ARCH[/VARIANT]`."""
    if not platform.os:
        return "unknown"
    return "/".join(part for part in (platform.os, platform.architecture, platform.variant) if part)


class Matcher:
    """Which platforms will do, and which of two does better."""

    def __init__(self, accepted: Sequence[Platform], name: str) -> None:
        self._accepted = [normalize(platform) for platform in accepted]
        self.name = name

    def rank(self, platform: Platform) -> int | None:
        """0 for the best; None when it will not do."""
        asked = normalize(platform)
        for index, own in enumerate(self._accepted):
            if (
                own.os == asked.os and own.architecture == asked.architecture and own.variant == asked.variant
                and set(asked.os_features) <= set(own.os_features)
            ):
                return index
        return None

    def match(self, platform: Platform) -> bool:
        """Whether it will do."""
        return self.rank(platform) is not None


class Everything(Matcher):
    """Any platform will do."""

    def __init__(self) -> None:
        super().__init__((), "all platforms")

    def rank(self, platform: Platform) -> int | None:
        return 0


def only(platform: Platform) -> Matcher:
    """The platform and what runs on it too: an older variant, 386 on amd64, arm on arm64."""
    own = normalize(platform)
    return Matcher(_compatible(own), format(own))


def strict(platform: Platform) -> Matcher:
    """The platform itself."""
    own = normalize(platform)
    return Matcher((own,), format(own))


def any_of(wanted: Iterable[Platform]) -> Matcher:
    """Any of several, in their order, each as by `only`; everything when there are none."""
    platforms = list(wanted)
    if not platforms:
        return Everything()
    accepted = [other for own in platforms for other in _compatible(normalize(own))]
    return Matcher(accepted, ", ".join(format(own) for own in platforms))


def choose(manifests: Iterable[Descriptor], matcher: Matcher) -> list[Descriptor]:
    """The manifests that will do, the best first; one that says no platform comes last, since it has to be looked into."""
    ranked = []
    for descriptor in manifests:
        if descriptor.platform is None:
            ranked.append((1 << 20, descriptor))
            continue
        rank = matcher.rank(descriptor.platform)
        if rank is not None:
            ranked.append((rank, descriptor))
    return [descriptor for _, descriptor in sorted(ranked, key=lambda pair: pair[0])]


def _options(text: str, whole: str) -> tuple[str, str, list[str]]:
    """The operating system, its version and its features."""
    name, bracket, rest = text.partition("(")
    if not bracket:
        return text, "", []
    if not rest.endswith(")"):
        raise InvalidArgument(f'"{text}" is an invalid OS component of "{whole}"')
    version, *features = rest[:-1].split("+")
    return name, version, [feature for feature in features if feature]


def _system(text: str) -> str:
    text = text.lower()
    return {"": "linux", "macos": "darwin"}.get(text, text)


def _architecture(architecture: str, variant: str) -> tuple[str, str]:
    architecture, variant = architecture.lower(), variant.lower()
    if architecture == "i386":
        return "386", ""
    if architecture in ("x86_64", "x86-64", "amd64"):
        return "amd64", "" if variant == "v1" else variant
    if architecture in ("aarch64", "arm64"):
        return "arm64", {"8": "", "v8": "", "v8.0": "", "9": "v9", "9.0": "v9", "v9.0": "v9"}.get(variant, variant)
    if architecture == "armhf":
        return "arm", "v7"
    if architecture == "armel":
        return "arm", "v6"
    if architecture == "arm":
        return "arm", {"": "v7", "7": "v7", "5": "v5", "6": "v6", "8": "v8"}.get(variant, variant)
    return architecture, variant


def _compatible(platform: Platform) -> list[Platform]:
    """A canonical platform and what it can run, the best first."""

    def other(architecture: str, variant: str = "") -> Platform:
        return Platform(
            os=platform.os, architecture=architecture, variant=variant, os_version=platform.os_version,
            os_features=list(platform.os_features),
        )

    number = platform.variant[1:] if platform.variant[:1] == "v" else ""
    if platform.architecture == "amd64":
        older = range(int(number) - 1, 0, -1) if number.isdecimal() else ()
        return [platform, *(other("amd64", f"v{level}") for level in older), other("386")]
    if platform.architecture == "arm":
        older = range(int(number) - 1, 4, -1) if number.isdecimal() else ()
        return [platform, *(other("arm", f"v{level}") for level in older)]
    if platform.architecture != "arm64":
        return [platform]
    major, _, minor = (number or "8").partition(".")
    if major not in ("8", "9") or (minor and not minor.isdecimal()):
        return [platform]
    last = int(minor or 0)
    versions = [(9, level) for level in range(last, -1, -1)] if major == "9" else []
    eighth = last if major == "8" else _V8_OF_V9[min(last, len(_V8_OF_V9) - 1)]
    versions += [(8, level) for level in range(eighth, -1, -1)]
    arm64 = [other("arm64", f"v{major}.{level}" if level else f"v{major}") for major, level in versions]
    return [*arm64, *(other("arm", f"v{level}") for level in range(8, 4, -1))]
