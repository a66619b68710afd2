"""CDI documents: which devices they offer, and what injecting one changes."""

from __future__ import annotations

from typing import Any

import pytest

from boxship.kit.errors import InvalidArgument, NotFound
from boxship.oci import cdi

DOCUMENT = {
    "cdiVersion": "0.6.0", "kind": "vendor.example/tpu",
    "containerEdits": {"env": ["ALL=1"]},
    "devices": [
        {"name": "0", "containerEdits": {
            "env": ["FIRST=0"],
            "deviceNodes": [{"path": "/dev/tpu0", "hostPath": "/dev/real0", "permissions": "rw"},
                            {"path": "/dev/tpuctl", "type": "c", "major": 9, "minor": 1, "fileMode": 0o600}],
            "mounts": [{"hostPath": "/opt/lib", "containerPath": "/usr/lib/tpu", "options": ["ro", "bind"]}],
            "hooks": [{"hookName": "createContainer", "path": "/bin/ldcache", "args": ["ldcache", "-u"]}],
            "additionalGids": [44]}},
        {"name": "1", "containerEdits": {"env": ["FIRST=1"]}},
    ],
}


def node_of(path: str) -> dict[str, Any]:
    assert path == "/dev/real0"
    return {"type": "c", "major": 7, "minor": 3}


def config() -> dict[str, Any]:
    return {"process": {"env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}, "mounts": [], "linux": {"resources": {"devices": []}}}


def test_a_device_brings_its_edits_and_those_of_its_document_once() -> None:
    made, devices = config(), cdi.registry([(0, DOCUMENT)])
    cdi.inject(made, ["vendor.example/tpu=0", "vendor.example/tpu=1"], devices, node_of)
    assert made["process"]["env"] == ["PATH=/bin", "ALL=1", "FIRST=1"]
    assert made["process"]["user"]["additionalGids"] == [44]
    assert made["linux"]["devices"] == [
        {"path": "/dev/tpu0", "type": "c", "major": 7, "minor": 3},
        {"path": "/dev/tpuctl", "type": "c", "major": 9, "minor": 1, "fileMode": 0o600}]
    assert made["linux"]["resources"]["devices"] == [
        {"allow": True, "type": "c", "major": 7, "minor": 3, "access": "rw"},
        {"allow": True, "type": "c", "major": 9, "minor": 1, "access": "rwm"}]
    assert made["mounts"] == [
        {"destination": "/usr/lib/tpu", "type": "bind", "source": "/opt/lib", "options": ["ro", "bind"]}]
    assert made["hooks"] == {"createContainer": [{"path": "/bin/ldcache", "args": ["ldcache", "-u"]}]}


def test_what_nobody_offers_is_named() -> None:
    with pytest.raises(NotFound, match=r"unresolvable CDI devices vendor\.example/tpu=9, other/x=y\Z"):
        cdi.inject(config(), ["vendor.example/tpu=9", "vendor.example/tpu=0", "other/x=y"], cdi.registry([(0, DOCUMENT)]), node_of)


def test_the_higher_directory_wins_and_equals_are_nobodys() -> None:
    other = {"kind": "vendor.example/tpu", "devices": [{"name": "0", "containerEdits": {"env": ["OTHER=1"]}}]}
    assert cdi.registry([(0, DOCUMENT), (1, other)])["vendor.example/tpu=0"].edits == {"env": ["OTHER=1"]}
    assert set(cdi.registry([(0, DOCUMENT), (0, other)])) == {"vendor.example/tpu=1"}


@pytest.mark.parametrize("document", [{}, {"kind": 3, "devices": [{"name": "0"}]}, {"kind": "a/b", "devices": ["x"]},
                                      {"kind": "no-class", "devices": [{"name": "0"}]}, {"kind": "a/b", "devices": [{"name": ""}]}])
def test_what_is_no_document_offers_nothing(document: dict[str, Any]) -> None:
    assert cdi.registry([(0, document)]) == {}


def test_a_hook_that_the_runtime_does_not_know_is_refused() -> None:
    document = {"kind": "a.b/c", "devices": [{"name": "0", "containerEdits": {"hooks": [{"hookName": "x", "path": "/bin/x"}]}}]}
    with pytest.raises(InvalidArgument, match="unknown hook name 'x'"):
        cdi.inject(config(), ["a.b/c=0"], cdi.registry([(0, document)]), node_of)
