"""Hooks: when they run, in which namespaces, what they are told, and what comes of their failure."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.machine import Bundle, Machine

Ask = Callable[[Callable[[], object]], object]
KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def hook(bundle: Bundle, kind: str, path: str, *args: str, **more: object) -> None:
    hooks = bundle.spec.setdefault("hooks", {})
    hooks.setdefault(kind, []).append({"path": path, "args": [path, *args], **more})  # type: ignore[attr-defined]


@pytest.fixture
def noted(bundle: Bundle, tmp_path: Path) -> Callable[[], list[dict[str, object]]]:
    """A hook of every kind that writes down its state, its namespaces and its environment; what they wrote, in order.

    The two kinds that init runs find their shell in the image and write there; the image is where the notes are.
    """
    bundle.writable()
    notes = bundle.rootfs / "notes"
    notes.mkdir()
    # Its own name counts up, so that the order is that of the names.
    text = (
        'n=$(ls {notes} | wc -l); cat > {notes}/$n.$1.state; for k in pid net mnt uts; do readlink /proc/self/ns/$k; done'
        " > {notes}/$n.$1.ns; env > {notes}/$n.$1.env; pwd > {notes}/$n.$1.pwd"
    )
    outside = script(tmp_path / "outside", text.format(notes=notes))
    # createContainer: the container's namespaces, and the root file system not yet entered.
    script(bundle.rootfs / "inside", text.format(notes="/notes"))
    for kind in KINDS:
        hook(bundle, kind, "/inside" if kind == "startContainer" else outside, kind, env=[f"KIND={kind}", "PATH=/bin:/usr/bin"])

    def read() -> list[dict[str, object]]:
        found = []
        for path in sorted(notes.glob("*.state"), key=lambda p: int(p.name.split(".")[0])):
            name = path.name.removesuffix(".state")
            found.append(
                {
                    "kind": name.split(".")[1], "state": json.loads(path.read_text()),
                    "ns": (notes / f"{name}.ns").read_text().split(),
                    "env": dict(line.split("=", 1) for line in (notes / f"{name}.env").read_text().splitlines()),
                    "pwd": (notes / f"{name}.pwd").read_text().strip(),
                }
            )
        return found

    return read


def test_all_six_run_in_order_with_the_state_on_standard_input(
    machine: Machine, bundle: Bundle, box: str, noted: Callable[[], list[dict[str, object]]], way: bool
) -> None:
    bundle.spec["annotations"] = {"x.y": "z"}
    machine.ok("create", "--bundle", bundle.write(), box, warm=way)
    assert [note["kind"] for note in noted()] == ["prestart", "createRuntime", "createContainer"]
    pid = machine.state(box)["pid"]
    machine.ok("start", box, warm=way)
    assert [note["kind"] for note in noted()] == list(KINDS[:5])
    machine.ok("delete", "--force", box, warm=way)
    notes = noted()
    assert [note["kind"] for note in notes] == list(KINDS)
    for note in notes:
        told = note["state"]
        assert isinstance(told, dict)
        assert told["id"] == box and told["bundle"] == str(bundle.path) and told["annotations"] == {"x.y": "z"}, note
        assert told["ociVersion"] == bundle.spec["ociVersion"]
        # config.md: exactly the environment that the hook's entry has; PWD and the like are the shell's own.
        assert note["env"].get("KIND") == note["kind"], note  # type: ignore[attr-defined]
        assert set(note["env"]) <= {"KIND", "PATH", "PWD", "SHLVL", "_", "OLDPWD"}, note  # type: ignore[call-overload]
    statuses = [note["state"]["status"] for note in notes]  # type: ignore[index]
    # For prestart the standard and its validation programs disagree; this is what crun says, and what passes them.
    assert statuses == ["created", "creating", "creating", "created", "running", "stopped"]
    pids = [note["state"].get("pid", 0) for note in notes]  # type: ignore[attr-defined]
    assert pids[1] == pids[4] == pid and pids[5] == 0


def test_hooks_run_in_the_namespaces_that_the_standard_says(
    machine: Machine, bundle: Bundle, box: str, noted: Callable[[], list[dict[str, object]]]
) -> None:
    machine.ok("run", "--detach", "--bundle", bundle.write(), box)
    theirs = [os.readlink(f"/proc/{machine.state(box)['pid']}/ns/{kind}") for kind in ("pid", "net", "mnt", "uts")]
    ours = [os.readlink(f"/proc/{machine.holder.pid}/ns/{kind}") for kind in ("pid", "net", "mnt", "uts")]
    notes = {note["kind"]: note["ns"] for note in noted()}
    assert notes["prestart"] == notes["createRuntime"] == notes["poststart"] == ours
    assert notes["createContainer"] == notes["startContainer"] == theirs


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_failing_hook_before_the_start_fails_the_command_and_leaves_nothing(
    machine: Machine, bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    place = bundle.rootfs / "bad" if kind == "startContainer" else tmp_path / "bad"
    path = script(place, "echo on-stdout; echo on-stderr >&2; exit 23")
    hook(bundle, kind, "/bad" if kind == "startContainer" else path)
    refused = machine("run", "--bundle", bundle.write(), machine.name())
    assert refused.code == 1
    assert f"error running {kind} hook #0: exit status 23" in refused.err, refused
    assert "on-stdout" in refused.err and "on-stderr" in refused.err


def test_a_failing_poststart_hook_kills_the_container(machine: Machine, bundle: Bundle, box: str, tmp_path: Path, eventually: Ask) -> None:
    hook(bundle, "poststart", script(tmp_path / "bad", "exit 3"))
    machine.ok("create", "--bundle", bundle.write(), box)
    pid = machine.state(box)["pid"]
    refused = machine("start", box)
    assert refused.code == 1 and "error running poststart hook #0: exit status 3" in refused.err
    eventually(lambda: machine.state(box)["status"] == "stopped")
    assert not os.path.exists(f"/proc/{pid}/exe")


def test_a_failing_poststop_hook_is_a_warning_and_the_others_run(machine: Machine, bundle: Bundle, box: str, tmp_path: Path) -> None:
    hook(bundle, "poststop", script(tmp_path / "bad", "exit 4"))
    hook(bundle, "poststop", script(tmp_path / "good", f"touch {tmp_path}/ran"))
    machine.ok("create", "--bundle", bundle.write(), box)
    done = machine("delete", "--force", box)
    assert done.code == 0 and "level=warning" in done.err and "hook #0: exit status 4" in done.err
    assert (tmp_path / "ran").exists()
    assert machine("state", box).code == 1


@pytest.mark.parametrize("kind", ["prestart", "createContainer", "startContainer"])
def test_a_hook_past_its_time_is_killed(machine: Machine, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    place = bundle.rootfs / "slow" if kind == "startContainer" else tmp_path / "slow"
    path = script(place, "exec sleep 30")
    hook(bundle, kind, "/slow" if kind == "startContainer" else path, timeout=1, env=["PATH=/bin:/usr/bin"])
    begin = time.monotonic()
    refused = machine("run", "--bundle", bundle.write(), machine.name())
    assert refused.code == 1 and 1 <= time.monotonic() - begin < 10, refused
    assert f"error running {kind} hook #0" in refused.err
    if kind == "prestart":
        assert "hook ran past specified timeout of 1.0s" in refused.err


def test_the_second_hook_does_not_run_when_the_first_failed(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    hook(bundle, "createRuntime", script(tmp_path / "bad", "exit 1"))
    hook(bundle, "createRuntime", script(tmp_path / "second", f"touch {tmp_path}/ran"))
    assert machine("run", "--bundle", bundle.write(), machine.name()).code == 1
    assert not (tmp_path / "ran").exists()


def test_a_hook_that_is_not_there_is_named(machine: Machine, bundle: Bundle) -> None:
    hook(bundle, "createRuntime", "/no/such/hook")
    refused = machine("run", "--bundle", bundle.write(), machine.name())
    assert refused.code == 1 and "fork/exec /no/such/hook: no such file or directory" in refused.err
