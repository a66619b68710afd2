"""Tests of this folder run in a guest (`support.guest`), and their reports come from there.

On the host no test function of this folder is called: the first one boots the guest of its lane, which is then asked for one
report after the other. In the guest the same files are ordinary tests. A test without the mark `lane` runs in each lane.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.boxrun import Boxrun
from support.guest import LANES, SELINUX, Guest, Unavailable
from support.machine import Bundle

HERE = Path(__file__).parent
ORDER = Path("/opt/boxship/wanted.json")
IN_GUEST = ORDER.exists() and HERE.is_relative_to("/opt/boxship")
ANSWERS = "/dev/ttyS1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lane(name): runs in this guest only: plain, systemd or selinux")


@pytest.fixture(autouse=True)
def lane(request: pytest.FixtureRequest) -> str:
    """The guest that the test runs in."""
    return str(request.param)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of busybox with a cgroup namespace, as v2 wants it."""
    made = Bundle(tmp_path / "bundle")
    made.spec = made.spec | {"linux": made.linux | {"namespaces": [*made.linux["namespaces"], {"type": "cgroup"}]}}  # type: ignore[misc]
    return made


@pytest.fixture
def boxrun() -> Iterator[Boxrun]:
    """The runtime under test; after the test nothing of its containers may be left."""
    runtime = Boxrun()
    yield runtime
    left = runtime.close()
    assert not left, left


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name for mark in metafunc.definition.iter_markers("lane") for name in mark.args] or list(LANES)
    metafunc.parametrize("lane", names, indirect=True)


def lane_of(item: pytest.Item) -> str:
    """The lane of a test of this folder."""
    return str(item.callspec.params["lane"])  # type: ignore[attr-defined]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    if IN_GUEST:
        order = json.loads(ORDER.read_text())
        items[:] = [item for item in items if item.nodeid in set(order["tests"])]
        return
    # One lane after the other, so that each guest boots once.
    ours.sort(key=lambda item: [*LANES, SELINUX].index(lane_of(item)))
    places = [i for i, item in enumerate(items) if item.path.is_relative_to(HERE)]
    for place, item in zip(places, ours, strict=True):
        item.add_marker(pytest.mark.timeout(900))  # making the image, and a boot, count for the first
        items[place] = item


if IN_GUEST:
    if json.loads(ORDER.read_text())["runtime"]:
        os.environ["BOXSHIP_GUEST_RUNTIME"] = json.loads(ORDER.read_text())["runtime"]
    _answers = open(ANSWERS, "w", buffering=1)

    def _answer(config: pytest.Config, report: pytest.CollectReport | pytest.TestReport) -> None:
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        _answers.write(json.dumps(data) + "\n")

    def pytest_runtest_logreport(report: pytest.TestReport) -> None:
        _answer(_config[0], report)

    def pytest_collectreport(report: pytest.CollectReport) -> None:
        if report.failed:
            _answer(_config[0], report)

    _config: list[pytest.Config] = []

    def pytest_sessionstart(session: pytest.Session) -> None:
        _config.append(session.config)

else:

    class Lane:
        """The guest of a lane, and its reports by test."""

        def __init__(self, name: str, wanted: list[str]) -> None:
            self.unavailable = ""
            self.guest: Guest | None = None
            try:
                self.guest = Guest(name, wanted)
            except Unavailable as reason:
                self.unavailable = str(reason)
                return
            self.stream = self.guest.reports()
            self.known: dict[str, list[dict[str, object]]] = {}
            self.broken = ""

        def reports(self, nodeid: str) -> Iterator[dict[str, object]]:
            """The reports of one test, up to that of its teardown."""
            while True:
                known = self.known.setdefault(nodeid, [])
                while known:
                    report = known.pop(0)
                    yield report
                    if report["when"] == "teardown":
                        return
                report = next(self.stream, None)  # type: ignore[arg-type]
                if report is None:
                    return
                if report.get("$report_type") == "CollectReport":
                    self.broken = str(report["longrepr"])
                else:
                    self.known.setdefault(str(report["nodeid"]), []).append(report)

    _lanes: dict[str, Lane] = {}

    def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
        """In the place of setup, call and teardown here."""
        if not item.path.is_relative_to(HERE):
            return None
        name = lane_of(item)
        ihook = item.ihook
        ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if name not in _lanes:
            for other in _lanes.values():
                if other.guest:
                    other.guest.close()
            wanted = [i.nodeid for i in item.session.items if i.path.is_relative_to(HERE) and lane_of(i) == name]
            _lanes[name] = Lane(name, wanted)
        for report in _reports(item, _lanes[name]):
            ihook.pytest_runtest_logreport(report=report)
        ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports(item: pytest.Item, lane: Lane) -> Iterator[pytest.TestReport]:
        if lane.unavailable:
            where = (str(item.path), item.location[1] or 0, f"Skipped: {lane.unavailable}")
            yield _made(item, "setup", "skipped", where)
            yield _made(item, "teardown", "passed", None)
            return
        whole = False
        for data in lane.reports(item.nodeid):
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            if isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # where and why it was skipped: JSON knows no tuples
            whole = report.when == "teardown"
            yield report
        if not whole:
            assert lane.guest is not None
            text = lane.broken or f"the guest ended before this test did; its console:\n{lane.guest.last_words()}"
            yield _made(item, "call", "failed", text)
            yield _made(item, "teardown", "passed", None)

    def _made(item: pytest.Item, when: str, outcome: str, text: object) -> pytest.TestReport:
        return pytest.TestReport(item.nodeid, item.location, {}, outcome, text, when)  # type: ignore[arg-type]

    def pytest_sessionfinish() -> None:
        for lane in _lanes.values():
            if lane.guest:
                lane.guest.close()
