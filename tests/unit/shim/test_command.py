"""The shim's command line, and its answer to `start`."""

from __future__ import annotations

import json

import pytest

from boxship.api.any import pack
from boxship.api.oci_runtime.runtime import of_kill
from boxship.api.task import pb
from boxship.kit.errors import BoxshipError, FailedPrecondition, InvalidArgument, NotFound
from boxship.shim.bundle import Options, has_pid_namespace
from boxship.shim.command import Flags, bootstrap_params, reply
from boxship.shim.forks import pack_environ, unpack_environ
from boxship.shim.stdio import split_uri


def test_flags_of_all_versions() -> None:
    flags = Flags(["shim", "-namespace", "ns", "--address=/a", "-publish-binary", "", "-id", "one", "-debug", "start"])
    assert (flags.values["namespace"], flags.values["address"], flags.values["id"]) == ("ns", "/a", "one")
    assert flags.action == "start"
    assert "debug" in flags.switches


@pytest.mark.parametrize("unknown", [["-x"], ["-x", "1"], ["--x=1"], ["-x=start"]])
def test_an_unknown_flag_is_passed_over(unknown: list[str]) -> None:
    assert Flags(["shim", "-id", "a", *unknown, "-namespace", "b", "delete"]).action == "delete"


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="-id"):
        Flags(["shim", "start", "-id"])


def test_the_three_forms_of_the_answer() -> None:
    assert reply("unix:///a", False, "") == b"unix:///a"
    assert json.loads(reply("unix:///a", False, "2")) == {"version": 2, "address": "unix:///a", "protocol": "ttrpc"}
    assert json.loads(reply("unix:///a", False, "7"))["version"] == 3
    assert pb.bootstrap.BootstrapResult.FromString(reply("unix:///a", True, "2")).version == 3


def test_bootstrap_params_are_told_from_options() -> None:
    options = pack(pb.runc_options.Options(binary_name="crun"))
    params = pb.bootstrap.BootstrapParams(instance_id="a", namespace="n")
    params.extensions.add().value.CopyFrom(options)
    assert bootstrap_params(options.SerializeToString(), "a", "n") is None
    assert bootstrap_params(b"", "a", "n") is None
    assert bootstrap_params(b"\xff\xff", "a", "n") is None
    assert bootstrap_params(params.SerializeToString(), "a", "n") is not None
    assert bootstrap_params(params.SerializeToString(), "b", "n") is None, "for another container"


def test_options_go_through_the_bundle(tmp_path: object) -> None:
    options = Options.unpack(pack(pb.runc_options.Options(binary_name="crun", root="/r", systemd_cgroup=True, io_uid=7)))
    with open(f"{tmp_path}/options.json", "wb") as file:
        file.write(options.encode())
    again = Options.load(str(tmp_path))
    assert (again.binary, again.root_of("ns"), again.systemd_cgroup, again.io_uid) == ("crun", "/r/ns", True, 7)
    assert Options.load("/nonexistent").binary == "boxrun"
    assert Options.unpack(pack(pb.runtime_options.Options(config_path="x"))).binary == "boxrun"


@pytest.mark.parametrize(("namespaces", "private"), [
    ([], False), ([{"type": "pid"}], True), ([{"type": "pid", "path": "/proc/1/ns/pid"}], False), ([{"type": "mount"}], False),
])
def test_who_dies_with_the_first_process(namespaces: list[object], private: bool) -> None:
    assert has_pid_namespace({"linux": {"namespaces": namespaces}}) is private


def test_the_environment_survives_packing() -> None:
    environ = {"A": "1", "B": "x=y", "EMPTY": "", "ODD": "\udcff"}
    assert unpack_environ(pack_environ(environ)) == environ
    assert unpack_environ(b"") == {}


@pytest.mark.parametrize(("uri", "parts"), [
    ("", ("", "", "")), ("/a/b", ("", "/a/b", "")), ("fifo:///a", ("fifo", "/a", "")),
    ("binary:///bin/x?a=b&c=d", ("binary", "/bin/x", "a=b&c=d")),
])
def test_uris_of_streams(uri: str, parts: tuple[str, str, str]) -> None:
    assert split_uri(uri) == parts


@pytest.mark.parametrize(("said", "kind"), [
    ("os: process already finished", NotFound), ("container not running", NotFound), ("no such process", NotFound),
    ("container does not exist", NotFound), ("cannot kill it", FailedPrecondition), ("something else", BoxshipError),
])
def test_what_a_failed_kill_means(said: str, kind: type[BoxshipError]) -> None:
    assert type(of_kill(BoxshipError(said))) is kind
