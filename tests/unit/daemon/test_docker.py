"""What the table [engine] says reaches the engine, and what it cannot mean is named."""

import pytest

from boxship.daemon.docker import settings
from boxship.kit.errors import InvalidArgument


def test_settings_of_the_engine():
    made = settings({"namespace": "n", "default_runtime": "x", "runtimes": {"x": "io.containerd.x.v1", "y": ["io.containerd.runc.v2", "crun"]}}, "/a")
    assert (made.namespace, made.default_runtime, made.address) == ("n", "x", "/a")
    assert made.runtimes["x"] == ("io.containerd.x.v1", "")
    assert made.runtimes["y"] == ("io.containerd.runc.v2", "crun")
    assert "runc" in made.runtimes


@pytest.mark.parametrize(("table", "name"), [
    ({"colour": 1}, r"engine\.colour"), ({"init": 1}, r"engine\.init"), ({"runtimes": {"x": []}}, r"engine\.runtimes\.x"),
    ({"runtimes": 1}, r"engine\.runtimes"),
])
def test_what_is_wrong_is_named(table, name):
    with pytest.raises(InvalidArgument, match=name):
        settings(table, "")
