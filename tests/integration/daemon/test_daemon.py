"""The daemon as a process: its lock, its sockets, its end, and what it tells those around it."""

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from support import image
from support.daemon import ENTRY, daemon
from support.registry import Registry

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def d():
    with daemon() as made:
        yield made


def test_it_starts_answers_and_ends_in_order(d):
    d.start()
    for name in ("containerd.sock", "containerd.sock.ttrpc"):
        assert stat.S_IMODE((d.state / name).stat().st_mode) == 0o660
    assert stat.S_IMODE(d.state.stat().st_mode) == 0o711
    assert "boxship" in d.ctr("version")
    assert d.stop() == 0
    assert not list(d.state.glob("*.sock*"))


def test_a_folder_has_one_daemon_and_a_killed_one_does_not_keep_it(d):
    d.start()
    second = subprocess.run([sys.executable, "-c", ENTRY, "--root", d.root, "--state", d.folder / "other"], capture_output=True, text=True)
    assert second.returncode == 1
    assert f"another daemon (pid {d.process.pid}) uses {d.root}" in second.stderr
    d.stop(signal.SIGKILL)
    d.start()
    assert "boxship" in d.ctr("version")


def test_streams_do_not_hold_up_the_end(d):
    d.start()
    events = subprocess.Popen(["ctr", "--address", d.socket, "events"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    begun = time.monotonic()
    assert d.stop() == 0
    assert time.monotonic() - begun < 2.5
    events.wait(5)


def test_what_is_wrong_is_said_and_the_exit_code_is_not_zero(d):
    run = [sys.executable, "-c", ENTRY]
    (d.folder / "bad.toml").write_text("[log]\ncolour = 1")
    for words, text in ((["--config", d.folder / "bad.toml"], "unknown key log.colour"), (["--nonsense"], "unknown flag: --nonsense"),
                        (["--root"], "flag needs an argument: --root"), (["--log-level", "loud", "--state", d.state], "loud")):
        done = subprocess.run([*run, *words], capture_output=True, text=True, timeout=20)
        assert done.returncode != 0
        assert text in done.stderr


def test_the_log_can_be_json_and_a_reload_is_told(d):
    notify = d.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notify))
        listener.settimeout(10)
        d.start(env={"NOTIFY_SOCKET": str(notify)}, config='[log]\nformat = "json"')
        assert listener.recv(200) == b"READY=1"
        (d.folder / "config.toml").write_text('[log]\nformat = "text"')
        d.process.send_signal(signal.SIGHUP)
        assert listener.recv(200).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert listener.recv(200) == b"READY=1"
        (d.folder / "config.toml").write_text("nonsense = 1")
        d.process.send_signal(signal.SIGHUP)
        assert listener.recv(200).startswith(b"RELOADING=1")
        assert listener.recv(200) == b"READY=1"
        assert d.stop() == 0
        assert listener.recv(200) == b"STOPPING=1"
    objects, _, rest = d.log.read_text().partition("time=")
    assert json.loads(objects.splitlines()[-1])["msg"] == "ready"
    assert 'msg="configuration read again"' in rest
    assert "unknown key nonsense" in rest


@pytest.mark.skipif(not shutil.which("docker"), reason="docker is missing: apt-get install docker.io")
def test_a_reload_changes_registries_and_the_schedule_of_collections(d):
    def reloaded(config, word):
        (d.folder / "config.toml").write_text(config)
        before = d.log.read_text().count(word)
        d.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 20
        while d.log.read_text().count(word) == before:
            assert time.monotonic() < end, d.log.read_text()
            time.sleep(0.02)

    def pull():
        return subprocess.run(["docker", "--host", f"unix://{d.state}/docker.sock", "pull", "--quiet", "mirrored.test/image:1"],
                              capture_output=True, text=True, timeout=60)

    async def work():
        async with Registry() as registry:
            registry.add_image("image", "1", layers=[image.layer()])
            await asyncio.to_thread(d.start, config='[gc]\nmutation_threshold = 0\nstartup_delay = "60m"\n[log]\nlevel = "debug"\n')
            assert (await asyncio.to_thread(pull)).returncode != 0
            mirror = f'[registry.mirrors]\n"mirrored.test" = ["http://{registry.address}"]\n'
            for wrong in ('[gc]\nschedule_delay = "soon"\n', "[images]\ndownloads = 0\n"):
                await asyncio.to_thread(reloaded, mirror + wrong, "was not read again")
            assert (await asyncio.to_thread(pull)).returncode != 0, "a part of a wrong configuration was taken"
            await asyncio.to_thread(reloaded, mirror + '[log]\nlevel = "debug"\n', "configuration read again")
            done = await asyncio.to_thread(pull)
            assert done.returncode == 0, done.stderr

    asyncio.run(work())
    assert d.stop() == 0


def test_sockets_of_systemd_are_used(d):
    d.state.mkdir()
    d.root.mkdir()
    script = (
        "import os, socket, sys\n"
        "for n, path in enumerate(sys.argv[1:3]):\n"
        "    s = socket.socket(socket.AF_UNIX); s.bind(path); s.listen(); os.dup2(s.fileno(), 10 + n)\n"
        "for n in (0, 1): os.dup2(10 + n, 3 + n, inheritable=True)\n"
        "os.environ.update(LISTEN_FDS='2', LISTEN_PID=str(os.getpid()))\n"
        "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[3:]])\n"
    )
    with open(d.log, "wb") as log:
        d.process = subprocess.Popen([sys.executable, "-c", script, d.socket, d.socket + ".ttrpc", ENTRY, "--root", d.root, "--state", d.state],
                                     stdout=log, stderr=log)
    assert "boxship" in d.ctr("version")  # waits in the socket's queue until the daemon is there
    assert d.stop() == 0
    assert Path(d.socket).exists()


def test_metrics_count_calls(d):
    address = str(d.folder / "m.sock")
    d.start("--metrics", address)
    d.ctr("version")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(b"GET /v1/metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    wanted = ('grpc_server_handled_total{grpc_method="Version",grpc_service="containerd.services.version.v1.Version",'
              'grpc_type="unary",grpc_code="OK"} 1')
    assert wanted in answer
    assert "process_resident_memory_bytes" in answer


def test_metrics_over_tcp(d):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    d.start("--metrics", f"127.0.0.1:{port}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert b"boxship_build_info" in opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read()


def test_it_leaves_when_idle(d):
    d.start("--idle-exit", "1.5")
    d.ctr("version")
    assert d.process.wait(15) == 0
    d.process = None


def test_an_event_can_be_published_by_a_program(d):
    d.start()
    events = subprocess.Popen(["ctr", "--address", d.socket, "events", 'topic~=|^/tasks/|'], stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    event = b"\n\x1bcontainerd.events.TaskStart\x12\x05\n\x03abc"
    publish = [sys.executable, "-c", ENTRY, "--address", d.socket, "publish", "--namespace", "foo"]
    assert subprocess.run([*publish, "--topic", "/images/x"], input=event).returncode == 0
    assert subprocess.run([*publish, "--topic", "/tasks/start"], input=event).returncode == 0
    line = events.stdout.readline()
    events.kill()
    events.wait()
    assert line.split(" UTC ")[1] == 'foo /tasks/start {"container_id":"abc"}\n'
    wrong = subprocess.run([*publish, "--topic", "nonsense"], input=event, capture_output=True)
    assert wrong.returncode == 1
    assert b"must start with '/'" in wrong.stderr
