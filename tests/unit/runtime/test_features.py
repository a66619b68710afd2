"""features says what the tables hold, and no more."""

from __future__ import annotations

import json

from boxship.oci import text
from boxship.oci.config import Hooks, Spec
from boxship.runtime.features import features


def test_every_hook_that_is_listed_is_a_member_of_the_configuration() -> None:
    hooks = {name: [{"path": "/bin/true"}] for name in features()["hooks"]}  # type: ignore[attr-defined]
    decoded = Hooks.decode(hooks, "hooks")
    assert decoded.extra == {}
    assert all(getattr(decoded, name) for name in Hooks.__annotations__)


def test_every_namespace_that_is_listed_is_one_that_a_configuration_can_have() -> None:
    linux = {"namespaces": [{"type": kind} for kind in features()["linux"]["namespaces"]]}  # type: ignore[index]
    spec = Spec.decode({"ociVersion": "1.3.0", "linux": linux}, "")
    assert spec.linux and len(spec.linux.namespaces) == 8


def test_the_structure_is_json_with_the_required_members() -> None:
    read = json.loads(text.dumps(features(), indent=4))
    assert read["ociVersionMin"] <= read["ociVersionMax"]
    assert read["annotations"]["org.opencontainers.runc.checkpoint.enabled"] == "true"
    assert "rro" in read["mountOptions"]  # by this containerd's CRI decides on recursive read-only mounts
    assert read["mountOptions"] == sorted(set(read["mountOptions"]))
