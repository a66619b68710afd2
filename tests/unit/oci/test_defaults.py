"""The configuration that `runc spec` writes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from boxship.oci import text
from boxship.oci.config import Spec
from boxship.oci.defaults import default_spec, to_rootless


def rootless_spec() -> dict[str, object]:
    spec = default_spec()
    to_rootless(spec)
    return spec


@pytest.mark.parametrize("spec", [default_spec(), default_spec(cgroup_v2=True), rootless_spec()])
def test_members_are_in_the_order_of_the_specifications_types(spec: dict[str, object]) -> None:
    assert text.dumps(Spec.decode(spec).encode()) == text.dumps(spec)


def test_two_calls_share_nothing() -> None:
    to_rootless(default_spec())
    assert default_spec() == default_spec()
    assert Spec.decode(default_spec()).linux != Spec.decode(rootless_spec()).linux


def test_unified_hierarchy_gets_a_cgroup_namespace() -> None:
    linux = default_spec(cgroup_v2=True)["linux"]
    assert isinstance(linux, dict)
    assert linux["namespaces"][-1] == {"type": "cgroup"}


def test_rootless_shares_the_network_maps_the_caller_and_has_no_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("os.getegid", lambda: 100)
    spec = Spec.decode(rootless_spec())
    assert spec.linux is not None
    assert [space.type for space in spec.linux.namespaces] == ["pid", "ipc", "uts", "mount", "user"]
    assert spec.linux.uid_mappings[0].encode() == {"containerID": 0, "hostID": 1000, "size": 1}
    assert spec.linux.gid_mappings[0].encode() == {"containerID": 0, "hostID": 100, "size": 1}
    assert spec.linux.resources is None
    by_place = {mount.destination: mount for mount in spec.mounts}
    assert by_place["/sys"].encode() == {
        "destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"],
    }  # fmt: skip
    assert "gid=5" not in by_place["/dev/pts"].options
    assert by_place["/sys/fs/cgroup"].type == "cgroup"


def test_mount_left_without_options_has_none_written() -> None:
    spec: dict[str, object] = {
        "mounts": [{"destination": "/x", "options": ["gid=5", "uid=3"]}, {"destination": "//sys/", "type": "sysfs"}],
        "linux": {"namespaces": [{"type": "user"}], "uidMappings": [], "sysctl": {}},
    }
    to_rootless(spec)
    assert spec["mounts"] == [
        {"destination": "/x"},
        {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]},
    ]
    linux = spec["linux"]
    assert isinstance(linux, dict)
    assert list(linux) == ["uidMappings", "gidMappings", "namespaces", "sysctl"]


@pytest.mark.skipif(not shutil.which("runc"), reason="no runc to compare with")
@pytest.mark.parametrize("rootless", [False, True])
def test_equals_what_runc_writes(tmp_path: Path, rootless: bool) -> None:
    """Older runcs write an older version and some sets of capabilities more; the rest is equal byte for byte."""
    subprocess.run(["runc", "spec", *(["--rootless"] if rootless else [])], cwd=tmp_path, check=True)
    theirs = text.loads((tmp_path / "config.json").read_bytes(), "config.json")
    ours = rootless_spec() if rootless else default_spec(cgroup_v2=Path("/sys/fs/cgroup/cgroup.controllers").exists())
    assert isinstance(theirs, dict)
    for spec in (theirs, ours):
        del spec["ociVersion"]
        process = spec["process"]
        assert isinstance(process, dict)
        for kind in ("ambient", "inheritable"):
            process["capabilities"].pop(kind, None)
    assert text.dumps(ours, indent="\t") == text.dumps(theirs, indent="\t")
