"""The committed message code is what proto/ makes, and carries the standard's names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format

import boxship.api.containerd.pb as containerd
import boxship.api.task.pb as shim

ROOT = Path(__file__).parents[2]


def test_stubs_are_what_the_tool_makes():
    pytest.importorskip("grpc_tools")
    done = subprocess.run([sys.executable, ROOT / "tools" / "generate-stubs", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_proto_file_is_reexported():
    pool = descriptor_pool.Default()
    modules = [vars(package)[name] for package in (containerd, shim) for name in package.__all__ if name != "types"]
    reached = {module.DESCRIPTOR.name for module in modules}
    wanted = {str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto")}
    missing = {name for name in wanted - reached if not re.match(r"containerd/types/(task/)?\w+\.proto", name)}
    assert not missing
    for name in wanted:
        assert pool.FindFileByName(name).package


@pytest.mark.parametrize(("message", "name"), [
    (shim.events.TaskExit, "containerd.events.TaskExit"),
    (shim.runc_options.Options, "containerd.runc.v1.Options"),
    (shim.runtime_options.Options, "runtimeoptions.v1.Options"),
    (shim.metrics_v1.Metrics, "io.containerd.cgroups.v1.Metrics"),
    (shim.metrics_v2.Metrics, "io.containerd.cgroups.v2.Metrics"),
    (shim.task.CreateTaskRequest, "containerd.task.v3.CreateTaskRequest"),
    (shim.task_v2.CreateTaskRequest, "containerd.task.v2.CreateTaskRequest"),
    (containerd.containers.Container, "containerd.services.containers.v1.Container"),
    (containerd.image_events.ImageCreate, "containerd.services.images.v1.ImageCreate"),
    (containerd.types.Process, "containerd.v1.types.Process"),
])
def test_full_names_are_the_standards(message, name):
    assert message.DESCRIPTOR.full_name == name


def test_messages_of_the_two_task_services_have_one_encoding():
    request = shim.task.CreateTaskRequest(id="a", bundle="/b", stdout="/o", terminal=True)
    assert json_format.MessageToDict(shim.task_v2.CreateTaskRequest.FromString(request.SerializeToString())) == \
        json_format.MessageToDict(request)


def test_the_shims_messages_come_without_grpc():
    code = "import sys, boxship.api.task.pb; print(sorted(m for m in ('grpc', 'asyncio', 'aiohttp') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
