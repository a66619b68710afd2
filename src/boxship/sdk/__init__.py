"""`import boxship`: containers from Python, sync and (`boxship.aio`) async; the daemon starts by itself as for the command.

Runs in: the caller's program.
Not here: the daemon, which this speaks REST to; boxship.runtime is the OCI runtime as a library, without any daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from boxship.kit.errors import (
    AlreadyExists,
    BoxshipError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from boxship.sdk.errors import CommandFailed, StartFailed
from boxship.sdk.models import ExecResult, Image, Network, State, Volume
from boxship.sdk.sync import Client, Container, Containers, Images, Networks, Volumes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Unpack

    from boxship.sdk.options import Options

__all__ = [
    "AlreadyExists", "BoxshipError", "Client", "CommandFailed", "Container", "ExecResult", "FailedPrecondition", "Image",
    "InvalidArgument", "Network", "NotFound", "PermissionDenied", "StartFailed", "State", "Unauthenticated", "Unavailable",
    "Unsupported", "Volume", "check_output", "containers", "create", "images", "networks", "run", "volumes",
]

_default = Client()
images: Images = _default.images
volumes: Volumes = _default.volumes
networks: Networks = _default.networks
containers: Containers = _default.containers


def run(image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> Container:
    """`Client().run`: make and start a container of the usual engine."""
    return _default.run(image, command, **options)


def create(image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> Container:
    """`Client().create`."""
    return _default.create(image, command, **options)


def check_output(image: str, command: str | Iterable[str] | None = None, **options: Unpack[Options]) -> str:
    """`Client().check_output`: what a command prints in a container that is gone afterwards."""
    return _default.check_output(image, command, **options)
