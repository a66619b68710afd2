"""The configuration says what it means, and what it does not know it refuses by name."""

import re
from pathlib import Path

import pytest

from boxship.daemon.config import OWN_RUNTIMES, load, parse, with_flags
from boxship.daemon.docker import settings
from boxship.kit.errors import InvalidArgument


def read(text, uid=0, environ=None):
    return parse(text, "x.toml", environ or {}, uid)


def test_defaults_of_root_and_of_others():
    root = read("")
    assert (root.root, root.state, root.containerd_socket) == ("/var/lib/boxship", "/run/boxship", "/run/boxship/containerd.sock")
    other = read("", 1000, {"HOME": "/home/a", "XDG_RUNTIME_DIR": "/run/user/1000"})
    assert (other.root, other.docker_socket) == ("/home/a/.local/share/boxship", "/run/user/1000/boxship/docker.sock")


def test_tables_and_parts():
    config = read('root = "/r"\n[containerd]\ngid = 7\n[log]\nformat = "json"\n[gc]\nschedule_delay_s = 1\n[runtimes]\nown = ["a.b"]')
    assert (config.root, config.containerd.gid, config.containerd.mode, config.log.format) == ("/r", 7, 0o660, "json")
    assert config.table("gc") == {"schedule_delay_s": 1}
    assert config.table("images") == {}
    assert config.runtimes.own == ("a.b",)
    assert read("").runtimes.own == OWN_RUNTIMES


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "unknown key x"), ("[log]\ncolour = 1", r"unknown key log\.colour"), ('root = "relative"', "absolute path"),
    ("root = 1", "absolute path"), ('[log]\nlevel = "loud"', "loud"), ("[log]\nlevel = 1", r"log\.level"), ("log = 1", "not a table"),
    ("[runtimes]\nown = 1", "list"), ("idle_exit_s = -1", "idle_exit_s"), ("gc = 1", "not a table"), ("[", "x.toml"),
    ('[containerd]\nmode = "660"', r"containerd\.mode"),
])
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        read(text)
    assert str(caught.value).startswith("x.toml: ")


def test_another_containerd_can_be_used():
    config = read('[containerd]\nremote = "unix:///run/containerd/containerd.sock"')
    assert config.containerd.remote == "unix:///run/containerd/containerd.sock"
    assert with_flags(read(""), {"containerd": "/c.sock"}).containerd.remote == "/c.sock"


def test_flags_win_over_the_file():
    config = with_flags(read('[log]\nlevel = "error"\nformat = "json"'), {"log-level": "debug", "state": "/s", "address": "unix:///a.sock"})
    assert (config.log.level, config.log.format, config.state, config.containerd_socket) == ("debug", "json", "/s", "/a.sock")
    for flags in ({"log-level": "loud"}, {"idle-exit": "soon"}):
        with pytest.raises(InvalidArgument):
            with_flags(config, flags)


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "none.toml"))
    assert load("", {"HOME": str(tmp_path)}, uid=1000).idle_exit_s == 0


def test_the_configuration_in_the_documentation_is_one():
    page = (Path(__file__).parents[3] / "docs" / "daemon.md").read_text()
    [text] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = read(text)
    assert config.containerd.mode == 0o660
    assert settings(config.table("engine"), "").runtimes["kata"] == ("io.containerd.kata.v2", "")
    named = set(re.findall(r"^\[(\w+)\]", text, re.MULTILINE))
    assert named >= {"containerd", "docker", "log", "metrics", "tracing", "runtimes"}
