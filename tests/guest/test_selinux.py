"""SELinux labels, which Debian's kernel enforces when it is booted so: of processes, of mounts, and with a policy of these tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.boxrun import Boxrun, said
from support.guest import SELINUX
from support.machine import Bundle

pytestmark = pytest.mark.lane(SELINUX)

SIDS = (
    "kernel", "security", "unlabeled", "fs", "file", "file_labels", "init", "any_socket", "port", "netif", "netmsg", "node",
    "igmp_packet", "icmp_socket", "tcp_socket", "sysctl_modprobe", "sysctl", "sysctl_fs", "sysctl_kernel", "sysctl_net",
    "sysctl_net_unix", "sysctl_vm", "sysctl_dev", "kmod", "policy", "scmp_packet", "devnull",
)
"""The kernel's initial identifiers, whose order is part of its interface (security/selinux/include/initial_sid_to_string.h)."""
PROCESS, OTHER = "system_u:system_r:container_t:s0:c1,c2", "system_u:system_r:other_t:s0:c3"
FILE = "system_u:object_r:container_file_t:s0:c1,c2"


def policy() -> str:
    """The smallest policy in CIL that knows these labels. What it has no class for is allowed; the types may not be mixed."""
    types = ("base_t", "container_t", "other_t", "container_file_t")
    categories = [f"c{number}" for number in range(8)]
    lines = [
        "(handleunknown allow)", "(mls true)", "(policycap nnp_nosuid_transition)",
        *(f"(sid {sid})" for sid in SIDS), f"(sidorder ({' '.join(SIDS)}))",
        *(f"(sidcontext {sid} (system_u {'system_r' if sid in ('kernel', 'init') else 'object_r'} base_t ((s0) (s0))))" for sid in SIDS),
        "(class process (transition dyntransition))", "(classorder (process))", "(sensitivity s0)", "(sensitivityorder (s0))",
        *(f"(category {category})" for category in categories), f"(categoryorder ({' '.join(categories)}))",
        "(sensitivitycategory s0 (range c0 c7))", "(role system_r)", "(role object_r)", "(user system_u)",
        "(userrole system_u system_r)", "(userrole system_u object_r)", "(userlevel system_u (s0))",
        "(userrange system_u ((s0) (s0 (range c0 c7))))",
        *(line for name in types for line in (f"(type {name})", f"(roletype system_r {name})", f"(roletype object_r {name})")),
        *(f"(allow base_t {name} (process (transition)))" for name in ("base_t", "container_t")),
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def enforced(tmp_path: Path) -> None:
    """The policy is loaded, and enforced; for the rest of the guest's life, as the kernel has it."""
    if not os.path.exists("/sys/fs/selinux/load"):
        said("mount", "-t", "selinuxfs", "selinuxfs", "/sys/fs/selinux")
    (tmp_path / "policy.cil").write_text(policy())
    said("secilc", str(tmp_path / "policy.cil"), "-o", str(tmp_path / "policy"), "-f", "/dev/null")
    try:
        Path("/sys/fs/selinux/load").write_bytes((tmp_path / "policy").read_bytes())
    except OSError:
        print(said("dmesg")[-3000:])
        raise
    Path("/sys/fs/selinux/enforce").write_text("1")


@pytest.fixture
def labelled(bundle: Bundle) -> Bundle:
    """A bundle with a label for its process and one for its mounts."""
    bundle.process["selinuxLabel"] = PROCESS
    bundle.linux["mountLabel"] = FILE
    return bundle


def test_the_process_and_the_mounts_have_their_labels(boxrun: Boxrun, labelled: Bundle) -> None:
    labelled.shell("cat /proc/self/attr/current | tr -d '\\0'; echo; grep ' /dev/shm ' /proc/self/mounts")
    process, mount = boxrun.ok("run", "--bundle", labelled.write(), boxrun.name()).splitlines()
    assert process == PROCESS
    assert f'context="{FILE}"' in mount


def test_exec_takes_the_containers_label_or_its_own(boxrun: Boxrun, labelled: Bundle) -> None:
    labelled.shell("while :; do sleep 1; done")
    box = boxrun.run(labelled)
    assert boxrun.ok("exec", box, "cat", "/proc/self/attr/current").rstrip("\0\n") == PROCESS
    other = PROCESS.replace("c1,c2", "c5")
    assert boxrun.ok("exec", "--process-label", other, box, "cat", "/proc/self/attr/current").rstrip("\0\n") == other


@pytest.mark.parametrize(("label", "why"), [(OTHER, "permission denied"), ("system_u:system_r:unknown_t:s0", "invalid argument")])
def test_a_label_that_the_policy_refuses_ends_the_start(boxrun: Boxrun, labelled: Bundle, label: str, why: str) -> None:
    labelled.process["selinuxLabel"] = label
    labelled.shell("echo began")
    done = boxrun("run", "--bundle", labelled.write(), boxrun.name())
    assert done.code and not done.out
    assert why in done.err.lower(), done
