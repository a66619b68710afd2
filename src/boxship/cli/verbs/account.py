"""Credentials of registries: login, logout, and what pull and push send along.

Runs in: the boxship command.
Spec: docker login and logout; ~/.docker/config.json (auths, credsStore, credHelpers); the protocol of credential helpers; Docker
Engine API, POST /auth.
"""

from __future__ import annotations

import os

from boxship.cli.command import Command
from boxship.kit.errors import BoxshipError
from boxship.oci import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from boxship.cli.command import Call

_HUB = "https://index.docker.io/v1/"


def config_path(environ: Mapping[str, str]) -> str:
    """docker's client configuration."""
    folder = environ.get("DOCKER_CONFIG") or os.path.join(environ.get("HOME") or "/root", ".docker")
    return os.path.join(folder, "config.json")


def load(environ: Mapping[str, str]) -> dict[str, Any]:
    """The configuration; empty when there is none. Raises InvalidArgument for one that is not JSON."""
    where = config_path(environ)
    try:
        with open(where, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = text.loads(data, where) if data.strip() else {}
    return found if isinstance(found, dict) else {}


def _store(environ: Mapping[str, str], config: dict[str, Any]) -> None:
    where = config_path(environ)
    os.makedirs(os.path.dirname(where), 0o700, exist_ok=True)
    # What is a link elsewhere stays one.
    where = os.path.realpath(where)
    temporary = f"{where}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.dumps(config, indent="\t").encode())
    finally:
        os.close(fd)
    os.rename(temporary, where)


def key_of(registry: str) -> str:
    """The registry's name in the configuration."""
    return _HUB if registry in ("docker.io", "index.docker.io", "") else registry


def _helper(config: dict[str, Any], key: str) -> str:
    helpers = config.get("credHelpers") or {}
    return str(helpers.get(key) or helpers.get(_bare(key)) or config.get("credsStore") or "")


def _ask_helper(helper: str, action: str, given: str) -> str | None:
    import subprocess

    try:
        done = subprocess.run([f"docker-credential-{helper}", action], input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BoxshipError(
            f'error getting credentials - err: exec: "docker-credential-{helper}": executable file not found in $PATH'
        ) from None
    if done.returncode:
        if "credentials not found" in done.stdout:
            return None
        raise BoxshipError(f"error getting credentials - err: exit status {done.returncode}, out: `{done.stdout.strip()}`")
    return done.stdout


def _bare(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


def credentials(environ: Mapping[str, str], registry: str) -> dict[str, str]:
    """What is known of the caller at the registry, as the engine takes it; empty for nobody. Raises BoxshipError."""
    import binascii

    config, key = load(environ), key_of(registry)
    helper = _helper(config, key)
    if helper:
        answer = _ask_helper(helper, "get", key)
        if answer is None:
            return {}
        found = text.loads(answer, f"docker-credential-{helper}")
        assert isinstance(found, dict)
        if found.get("Username") == "<token>":
            return {"identitytoken": found["Secret"], "serveraddress": key}
        return {"username": found.get("Username", ""), "password": found.get("Secret", ""), "serveraddress": key}
    auths = config.get("auths") or {}
    entry = auths.get(key) or next((value for name, value in auths.items() if _bare(name) == _bare(key)), None)
    if not entry:
        return {}
    result = {"serveraddress": key}
    if entry.get("identitytoken"):
        result["identitytoken"] = entry["identitytoken"]
    if entry.get("auth"):
        try:
            user, _, password = binascii.a2b_base64(entry["auth"]).decode().rstrip("\0").partition(":")
        except ValueError:
            raise BoxshipError(f"{config_path(environ)}: invalid auth configuration file") from None
        result |= {"username": user, "password": password}
    return result


def registry_auth(call: Call, registry: str) -> dict[str, str]:
    """The header for pull and push; empty for nobody."""
    found = credentials(call.environ, registry)
    return {"X-Registry-Auth": encoded(found)} if found else {}


def encoded(auth: Mapping[str, object]) -> str:
    """URL-safe base64 of the JSON."""
    import binascii

    return binascii.b2a_base64(text.dumps(auth).encode(), newline=False).decode().replace("+", "-").replace("/", "_")


def _login(call: Call) -> int:
    from boxship.cli.show.table import write

    registry = call.words[0] if call.words else ""
    if registry.startswith(("http://", "https://")):
        registry = registry.partition("://")[2]
    registry = registry.rstrip("/") or "docker.io"
    user, password = call.text("username"), call.text("password")
    if call.on("password-stdin"):
        if not user:
            raise BoxshipError("the --password-stdin option requires --username to be set")
        if password:
            raise BoxshipError("conflicting options: cannot specify both --password and --password-stdin")
        password = _read_all(0).rstrip("\n").rstrip("\r")
    elif password:
        write("WARNING! Using --password via the CLI is insecure. Use --password-stdin.\n", 2)
    if not user or not password:
        known = credentials(call.environ, registry)
        if not os.isatty(0) and not (known.get("username") and known.get("password")):
            raise BoxshipError("Error: Cannot perform an interactive login from a non TTY device")
        if known.get("password") and not user:
            user, password = known["username"], known["password"]
        else:
            user = user or _ask("Username: ")
            password = password or _ask("Password: ", secret=True)
    key = key_of(registry)
    auth = {"username": user, "password": password, "serveraddress": key}
    answer = call.engine.send("POST", "/auth", auth).json() or {}
    config = load(call.environ)
    helper = _helper(config, key)
    token = answer.get("IdentityToken") or ""
    if helper:
        _ask_helper(
            helper, "store", text.dumps({"ServerURL": key, "Username": "<token>" if token else user, "Secret": token or password})
        )
        config.setdefault("auths", {})[key] = {}
    else:
        import binascii

        entry = {"auth": binascii.b2a_base64(f"{user}:{'' if token else password}".encode(), newline=False).decode()}
        if token:
            entry["identitytoken"] = token
        config.setdefault("auths", {})[key] = entry
        write(
            f"\nWARNING! Your credentials are stored unencrypted in '{config_path(call.environ)}'.\n"
            "A credential helper (credsStore in that file) keeps them elsewhere.\n\n",
            2,
        )
    _store(call.environ, config)
    write(f"{answer.get('Status') or 'Login Succeeded'}\n")
    return 0


def _read_all(fd: int) -> str:
    data = b""
    while piece := os.read(fd, 65536):
        data += piece
    return data.decode("utf-8", "surrogateescape")


def _ask(prompt: str, *, secret: bool = False) -> str:
    if secret:
        import getpass

        return getpass.getpass(prompt)
    return input(prompt)


def _logout(call: Call) -> int:
    from boxship.cli.show.table import write

    registry = call.words[0].removeprefix("https://").removeprefix("http://").rstrip("/") if call.words else ""
    key = key_of(registry)
    config = load(call.environ)
    auths = config.get("auths") or {}
    held = [name for name in auths if name == key or _bare(name) == _bare(key)]
    helper = _helper(config, key)
    if not held and not helper:
        write(f"Not logged in to {registry or 'https://index.docker.io/v1/'}\n")
        return 0
    write(f"Removing login credentials for {registry or 'https://index.docker.io/v1/'}\n")
    if helper:
        _ask_helper(helper, "erase", key)
    for name in held:
        del auths[name]
    _store(call.environ, config)
    return 0


COMMANDS = {
    "login": Command(
        " [OPTIONS] [SERVER]",
        "Authenticate to a registry",
        _login,
        """
p,password string | Password or Personal Access Token (PAT)
password-stdin | Take the password from standard input
u,username string | Username
""",
        most=1,
    ),
    "logout": Command(" [SERVER]", "Log out from a registry", _logout, most=1),
}
