"""config.json as dockerd makes it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from boxship.engine import shapes, spec, validate
from boxship.kit.errors import InvalidArgument


def configurations(config: dict[str, Any] | None = None, host: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    made = shapes.shape(config or {}, shapes.CONTAINER_CONFIG, "Config"), shapes.shape(host or {}, shapes.HOST_CONFIG, "HostConfig")
    validate.check(*made)
    return made


def inputs(**more: Any) -> spec.Inputs:
    base: dict[str, Any] = {
        "uid": 0, "gid": 0, "groups": [], "home": "/root", "mounts": [], "hostname": "h", "cgroups_path": "/boxship/c", "shm_path": "",
        "namespaces": {"mount": "", "network": "", "uts": "", "pid": "", "ipc": ""}, "init": ""}
    return spec.Inputs(**{**base, **more})


def build(config: dict[str, Any] | None = None, host: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return spec.build(*configurations(config, host), ["sh"], inputs(**more))


def test_the_default_has_dockers_capabilities_namespaces_and_masks() -> None:
    made = build()
    assert set(made["process"]["capabilities"]["bounding"]) <= set(spec.DEFAULT_CAPABILITIES)
    assert {each["type"] for each in made["linux"]["namespaces"]} == {"mount", "network", "uts", "pid", "ipc"}
    assert made["linux"]["maskedPaths"] == list(spec.MASKED)
    assert made["linux"]["readonlyPaths"] == list(spec.READ_ONLY)
    assert made["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert made["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]
            } in made["mounts"]


def test_a_privileged_one_has_neither_masks_nor_a_filter() -> None:
    made = build(host={"Privileged": True})
    assert made["linux"]["maskedPaths"] == made["linux"]["readonlyPaths"] == []
    assert "seccomp" not in made["linux"]
    assert made["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert all("ro" not in mount["options"] for mount in made["mounts"] if mount["destination"].startswith("/sys"))


def test_the_environment_is_dockers_and_the_users_wins() -> None:
    made = build({"Env": ["PATH=/bin", "A=b=c", "HOSTNAME"], "Tty": True})
    assert made["process"]["env"] == ["PATH=/bin", "TERM=xterm", "A=b=c", "HOME=/root"]


def test_who_is_not_root_has_no_effective_capabilities() -> None:
    capabilities = build(uid=1000, gid=1000)["process"]["capabilities"]
    assert "effective" not in capabilities
    assert capabilities["bounding"]


@pytest.mark.parametrize(("add", "drop", "has", "has_not"), [
    (["NET_ADMIN"], [], "CAP_NET_ADMIN", "CAP_SYS_ADMIN"), ([], ["cap_chown"], "CAP_KILL", "CAP_CHOWN"),
    (["CHOWN"], ["ALL"], "CAP_CHOWN", "CAP_KILL"), (["ALL"], ["KILL"], "CAP_SYS_ADMIN", "CAP_KILL"),
])
def test_capabilities_are_added_and_dropped(add: list[str], drop: list[str], has: str, has_not: str) -> None:
    made = spec.capability_set(add, drop, privileged=False)
    assert has in made
    assert has_not not in made


def test_limits_become_resources() -> None:
    found = spec.resources(configurations(host={
        "Memory": 64 << 20, "NanoCpus": 500_000_000, "PidsLimit": 10, "CpuShares": 512, "CpusetCpus": "0"})[1])
    assert found["memory"] == {"limit": 64 << 20, "swap": 128 << 20}
    assert found["cpu"] == {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0"}
    assert found["pids"] == {"limit": 10}


def test_pids_are_limited_when_that_was_asked_for() -> None:
    assert "pids" not in spec.resources(configurations(host={"PidsLimit": 0})[1])
    assert spec.resources(configurations(host={"PidsLimit": -1})[1])["pids"] == {"limit": -1}


def test_a_profile_of_ones_own_is_decided_by_capabilities() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO", "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}}]}
    plain = build(host={"SecurityOpt": [f"seccomp={json.dumps(profile)}"]})["linux"]["seccomp"]["syscalls"]
    assert [each["names"] for each in plain] == [["clone"]]


@pytest.mark.parametrize(("config", "host"), [
    ({"Env": ["=x"]}, {}), ({"WorkingDir": "relative"}, {}), ({"StopSignal": "SIGNOTHING"}, {}), ({}, {"CapAdd": ["NONSENSE"]}),
    ({}, {"Memory": 1}), ({}, {"Memory": 64 << 20, "MemorySwap": 32 << 20}), ({}, {"NanoCpus": 10 ** 15}), ({}, {"SecurityOpt": ["x=y"]}),
    ({}, {"RestartPolicy": {"Name": "sometimes"}}), ({}, {"RestartPolicy": {"Name": "always"}, "AutoRemove": True}),
    ({}, {"LogConfig": {"Type": "nothing"}}), ({}, {"IpcMode": "everybody"}), ({}, {"OomScoreAdj": 2000}),
    ({"Healthcheck": {"Test": ["CMD", "x"], "Interval": 10}}, {}),
])
def test_what_no_container_can_have_is_refused(config: dict[str, Any], host: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        configurations(config, host)


def test_an_ulimit_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        build(host={"Ulimits": [{"Name": "nonsense", "Soft": 1, "Hard": 1}]})
