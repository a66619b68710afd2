"""AppArmor profiles, which Debian's kernel enforces: a container and what is executed in it are confined by the one they ask for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from support.boxrun import Boxrun, said
from support.machine import Bundle

pytestmark = pytest.mark.lane("plain")

PROFILES = """
profile boxship-test flags=(attach_disconnected,mediate_deleted) {
  file,
  capability,
  network,
  signal,
  deny /secret r,
}
profile boxship-other flags=(attach_disconnected,mediate_deleted) {
  file,
  capability,
  signal,
}
"""


@pytest.fixture(autouse=True)
def profiles() -> Iterator[None]:
    """The two profiles, loaded into the kernel."""
    if not os.path.exists("/sys/kernel/security/apparmor"):
        said("mount", "-t", "securityfs", "securityfs", "/sys/kernel/security")
    subprocess.run(["apparmor_parser", "--replace", "--skip-cache"], input=PROFILES, text=True, check=True)
    yield
    subprocess.run(["apparmor_parser", "--remove"], input=PROFILES, text=True, check=True)


@pytest.fixture
def confined(bundle: Bundle) -> Bundle:
    """A bundle that asks for the first profile and holds a file which that one denies."""
    (bundle.rootfs / "secret").write_text("hidden\n")
    bundle.process["apparmorProfile"] = "boxship-test"
    return bundle


def test_a_container_is_confined_from_its_first_program_on(boxrun: Boxrun, confined: Bundle) -> None:
    confined.shell("cat /proc/self/attr/current; cat /secret; echo $?")
    done = boxrun("run", "--bundle", confined.write(), boxrun.name())
    assert done.out == "boxship-test (enforce)\n1\n", done
    assert "'/secret': Permission denied" in done.err


def test_without_a_profile_it_is_not(boxrun: Boxrun, confined: Bundle) -> None:
    del confined.process["apparmorProfile"]
    confined.shell("cat /proc/self/attr/current; cat /secret")
    assert boxrun.ok("run", "--bundle", confined.write(), boxrun.name()) == "unconfined\nhidden\n"


def test_exec_takes_the_containers_profile_or_its_own(boxrun: Boxrun, confined: Bundle) -> None:
    confined.shell("while :; do sleep 1; done")
    box = boxrun.run(confined)
    assert boxrun.ok("exec", box, "cat", "/proc/self/attr/current") == "boxship-test (enforce)\n"
    assert boxrun("exec", box, "cat", "/secret").code == 1
    assert boxrun.ok("exec", "--apparmor", "boxship-other", box, "cat", "/proc/self/attr/current") == "boxship-other (enforce)\n"


def test_a_profile_that_is_not_loaded_ends_the_start(boxrun: Boxrun, confined: Bundle) -> None:
    confined.process["apparmorProfile"] = "boxship-not-there"
    confined.shell("echo began")
    done = boxrun("run", "--bundle", confined.write(), boxrun.name())
    assert done.code == 1 and not done.out
    assert "unable to apply apparmor profile: apparmor failed to apply profile" in done.err
