"""The copied part of the image `host` is kept while it is right, and no longer."""

import os
import threading
from pathlib import Path

import pytest

from boxship.cli import template
from boxship.cli.scratch import Scratch


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    root = tmp_path / "machine"
    (root / "etc/ssl/certs").mkdir(parents=True)
    (root / "etc/services").write_text("ssh 22/tcp\n")
    (root / "etc/ssl/certs/ca.pem").write_text("certificate\n")
    (root / "etc/ssl/certs/0.0").symlink_to("ca.pem")
    (root / "etc/ssl/certs/private").symlink_to("../../../root/key")
    return root


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "boxship/scratch").mkdir(parents=True, mode=0o700)
    return str(tmp_path / "boxship/scratch")


def hold(base: str, machine: Path) -> str:
    held = template.hold(os.path.join(os.path.dirname(base), "host"), base, str(machine))
    held.release()
    return held.path


def test_it_is_made_once(base: str, machine: Path) -> None:
    first = hold(base, machine)
    assert Path(first, "etc/services").read_text() == "ssh 22/tcp\n"
    assert hold(base, machine) == first


def test_links_inside_a_folder_stay_and_others_out_of_it_do_not(base: str, machine: Path) -> None:
    certs = Path(hold(base, machine), "etc/ssl/certs")
    assert sorted(path.name for path in certs.iterdir()) == ["0.0", "ca.pem"]
    assert os.readlink(certs / "0.0") == "ca.pem"


@pytest.mark.parametrize("change", ["edited", "added", "removed", "hidden", "deep"])
def test_a_change_of_the_machine_makes_a_new_one(base: str, machine: Path, change: str) -> None:
    first = hold(base, machine)
    if change == "edited":
        times = os.stat(machine / "etc/services")
        (machine / "etc/services").write_text("ssh 23/tcp\n")
        os.utime(machine / "etc/services", ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "added":
        (machine / "etc/protocols").write_text("tcp 6\n")
    elif change == "removed":
        (machine / "etc/services").unlink()
    elif change == "hidden":
        (machine / "etc/services").chmod(0o600)
    else:
        (machine / "etc/ssl/certs/new.pem").write_text("new\n")
    second = hold(base, machine)
    assert second != first
    etc = Path(second, "etc")
    assert (etc / "protocols").exists() == (change == "added")
    assert (etc / "services").exists() == (change not in ("removed", "hidden"))
    assert (etc / "ssl/certs/new.pem").exists() == (change == "deep")


def test_a_change_of_the_rules_makes_a_new_one(base: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hold(base, machine)
    monkeypatch.setattr(template.host, "FILES", ("services",))
    assert hold(base, machine) != first


def test_an_old_one_goes_when_no_container_uses_it(base: str, machine: Path) -> None:
    first = hold(base, machine)
    run = Scratch(base, "t1")
    run.layer(f"{first}/etc")
    (machine / "etc/services").write_text("changed\n")
    second = hold(base, machine)
    assert os.path.isdir(first)
    run.remove()
    (machine / "etc/services").write_text("changed again\n")
    third = hold(base, machine)
    assert not os.path.exists(first)
    assert not os.path.exists(second)
    assert sorted(os.listdir(os.path.dirname(third))) == sorted(["current", os.path.basename(third)])


def test_what_a_killed_process_left_goes_too_but_not_what_is_being_made(base: str, machine: Path) -> None:
    home = Path(hold(base, machine)).parent
    (home / ".left").mkdir()
    (home / ".making").mkdir()
    import fcntl

    fd = os.open(home / ".making", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    (machine / "etc/services").write_text("changed\n")
    hold(base, machine)
    assert not (home / ".left").exists()
    assert (home / ".making").exists()
    os.close(fd)


def test_a_damaged_record_makes_a_new_one(base: str, machine: Path) -> None:
    first = hold(base, machine)
    Path(first, "sources.json").write_text("{")
    assert hold(base, machine) != first


def test_many_at_once_all_get_one(base: str, machine: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(hold(base, machine))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert Path(hold(base, machine), "etc/services").exists()
