"""Fixtures for tests that need containers; installed with the package (entry point pytest11).

Runs in: pytest. Imported in every run of pytest where boxship is installed, so it imports nothing before a fixture is used.

    boxship_client       the engine (boxship.Client), the same for the whole run
    boxship_run          starts containers, as boxship.run does; they are gone at the end of the test
    boxship_volume       a volume of the test's own
    boxship_network      a network of the test's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from boxship.sdk import Client, Container, Network, Volume


@pytest.fixture(scope="session")
def boxship_client() -> Client:
    """The usual engine: of BOXSHIP_HOST or DOCKER_HOST, or this user's daemon, which starts by itself."""
    from boxship.sdk import Client

    return Client()


@pytest.fixture
def _boxship_later() -> Iterator[list[Callable[[], None]]]:
    """What is done when the containers of a test are gone, in whichever order a test names the fixtures."""
    later: list[Callable[[], None]] = []
    yield later
    for each in reversed(later):
        each()


@pytest.fixture
def boxship_run(
    boxship_client: Client, request: pytest.FixtureRequest, _boxship_later: object
) -> Iterator[Callable[..., Container]]:
    """`boxship_run(image, command, **options)`: a running container, which has the test's name in the label `boxship.test`."""
    made: list[Container] = []

    def run(image: str, command: Any = None, **options: Any) -> Container:
        labels = {"boxship.test": request.node.nodeid, **dict(options.pop("labels", {}))}
        container = boxship_client.run(image, command, labels=labels, **options)
        made.append(container)
        return container

    yield run
    for container in reversed(made):
        container.close()


@pytest.fixture
def boxship_volume(boxship_client: Client, _boxship_later: list[Callable[[], None]]) -> Volume:
    """A volume that is removed at the end of the test."""
    volume = boxship_client.volumes.create(labels={"boxship.test": "1"})
    _boxship_later.append(lambda: boxship_client.volumes.remove(volume.name, force=True))
    return volume


@pytest.fixture
def boxship_network(boxship_client: Client, _boxship_later: list[Callable[[], None]]) -> Network:
    """A bridge that is removed at the end of the test."""
    import os

    network = boxship_client.networks.create(f"test-{os.urandom(4).hex()}", labels={"boxship.test": "1"})
    _boxship_later.append(lambda: boxship_client.networks.remove(network.id))
    return network
