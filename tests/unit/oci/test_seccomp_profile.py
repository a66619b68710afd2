"""The default filter allows what dockerd's does: the rules that have reasons of their own."""

from boxship.cli.spec import CAPABILITIES
from boxship.oci.seccomp_profile import profile


def allowed(rules: dict[str, object]) -> set[str]:
    entries = rules["syscalls"]
    assert isinstance(entries, list)
    return {name for rule in entries if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule for name in rule["names"]}


def test_calls_that_change_the_machine_are_left_out() -> None:
    rules = profile(CAPABILITIES, "x86_64")
    assert rules is not None
    assert rules["defaultAction"] == "SCMP_ACT_ERRNO"
    assert not allowed(rules) & {
        "init_module", "kexec_load", "reboot", "swapon", "mount", "unshare", "setns", "clone", "clone3", "bpf", "perf_event_open",
        "keyctl", "add_key", "io_uring_setup", "userfaultfd", "settimeofday", "open_by_handle_at", "acct", "personality", "socket",
    }
    assert {"chroot", "openat2", "execve", "futex", "arch_prctl", "landlock_create_ruleset", "statmount"} <= allowed(rules)


def test_a_capability_brings_its_calls() -> None:
    rules = profile([*CAPABILITIES, "CAP_SYS_ADMIN"], "x86_64")
    assert rules is not None
    assert {"mount", "unshare", "clone", "clone3"} <= allowed(rules)


def test_without_it_clone3_does_not_exist_and_clone_makes_no_namespaces() -> None:
    rules = profile(CAPABILITIES, "aarch64")
    assert rules is not None
    clone = [rule for rule in rules["syscalls"] if rule["names"] == ["clone"]]
    assert clone == [
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
         "args": [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
    ]
    assert {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38} in rules["syscalls"]
    assert "arch_prctl" not in allowed(rules)


def test_an_unknown_machine_has_no_profile() -> None:
    assert profile(CAPABILITIES, "vax") is None
