"""The boxship command: which subcommand, and how errors and exit codes reach the caller.

Runs in: the process that the user started.
Not here: what the subcommands do; each is imported when it is called for, so that none pays for another.
"""

from __future__ import annotations

import os

from boxship import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERBS = {
    "attach": ("start", "Attach local standard input, output, and error streams to a running container"),
    "build": ("build", "Build an image from a Dockerfile"),
    "commit": ("files", "Create a new image from a container's changes"),
    "completion": ("completion", "Print what bash, fish or zsh need to complete boxship's words"),
    "cp": ("files", "Copy files and folders between a container and the local file system"),
    "create": ("start", "Create a new container"),
    "diff": ("files", "Show changes to files and directories of a container's file system"),
    "events": ("events", "Show events of the engine as they happen"),
    "exec": ("start", "Execute a command in a running container"),
    "export": ("files", "Export a container's file system as a tar archive"),
    "history": ("images", "Show the history of an image"),
    "images": ("images", "List images"),
    "import": ("archives", "Make an image from a tarball of a file system"),
    "info": ("system", "Show what the engine says of itself and its machine"),
    "inspect": ("inspect", "Return low-level information on objects"),
    "kill": ("lifecycle", "Kill one or more running containers"),
    "load": ("archives", "Load images from a tar archive or STDIN"),
    "login": ("account", "Authenticate to a registry"),
    "logout": ("account", "Log out from a registry"),
    "logs": ("logs", "Show the logs of one or more containers"),
    "pause": ("lifecycle", "Pause all processes within one or more containers"),
    "port": ("lifecycle", "List port mappings of a container"),
    "ps": ("ps", "List containers"),
    "pull": ("transfer", "Download an image from a registry"),
    "push": ("transfer", "Upload an image to a registry"),
    "rename": ("lifecycle", "Rename a container"),
    "restart": ("lifecycle", "Restart one or more containers"),
    "rm": ("lifecycle", "Remove one or more containers"),
    "rmi": ("images", "Remove one or more images"),
    "run": ("start", "Create and run a new container from an image"),
    "save": ("archives", "Save one or more images to a tar archive"),
    "start": ("start", "Start one or more stopped containers"),
    "stats": ("stats", "Show a live stream of containers' use of resources"),
    "stop": ("lifecycle", "Stop one or more running containers"),
    "tag": ("images", "Give an image another name"),
    "top": ("stats", "Show the running processes of a container"),
    "unpause": ("lifecycle", "Unpause all processes within one or more containers"),
    "update": ("lifecycle", "Update the configuration of one or more containers"),
    "version": ("system", "Show the versions of the command and the engine"),
    "wait": ("lifecycle", "Block until containers stop, then print their exit codes"),
}
"""Subcommand → (module of boxship.cli.verbs, what it does)."""

_OF_CONTAINER = (
    "attach",
    "commit",
    "cp",
    "create",
    "diff",
    "exec",
    "export",
    "kill",
    "logs",
    "pause",
    "port",
    "rename",
    "restart",
    "rm",
    "run",
    "start",
    "stats",
    "stop",
    "top",
    "unpause",
    "update",
    "wait",
)
GROUPS = {
    "builder": ("Manage builds", {"build": "build", "prune": "builder prune"}),
    "container": (
        "Manage containers",
        {
            **{name: name for name in _OF_CONTAINER},
            "ls": "ps",
            "list": "ps",
            "ps": "ps",
            "remove": "rm",
            "inspect": "container inspect",
            "prune": "container prune",
        },
    ),
    "image": (
        "Manage images",
        {
            **{name: name for name in ("build", "history", "import", "load", "pull", "push", "save", "tag")},
            "ls": "images",
            "list": "images",
            "rm": "rmi",
            "remove": "rmi",
            "inspect": "image inspect",
            "prune": "image prune",
        },
    ),
    "network": (
        "Manage networks",
        {
            **{name: f"network {name}" for name in ("connect", "create", "disconnect", "inspect", "ls", "prune", "rm")},
            "list": "network ls",
            "remove": "network rm",
        },
    ),
    "volume": (
        "Manage volumes",
        {
            **{name: f"volume {name}" for name in ("create", "inspect", "ls", "prune", "rm")},
            "list": "volume ls",
            "remove": "volume rm",
        },
    ),
    "system": ("Manage the engine", {
        "check": "system check", "df": "system df", "events": "events", "info": "info", "prune": "system prune"}),
}
"""Group → (what it is, its words → the subcommand that they stand for)."""

MORE = {
    "builder prune": ("build", "Remove build cache"),
    "__complete": ("completion", "Answer a shell's question"),
    "container inspect": ("inspect", "Display detailed information on one or more containers"),
    "container prune": ("prune", "Remove all stopped containers"),
    "image inspect": ("inspect", "Display detailed information on one or more images"),
    "image prune": ("prune", "Remove unused images"),
    "network connect": ("networks", "Connect a container to a network"),
    "network create": ("networks", "Create a network"),
    "network disconnect": ("networks", "Disconnect a container from a network"),
    "network inspect": ("inspect", "Display detailed information on one or more networks"),
    "network ls": ("networks", "List networks"),
    "network prune": ("prune", "Remove all unused networks"),
    "network rm": ("networks", "Remove one or more networks"),
    "volume create": ("volumes", "Create a volume"),
    "volume inspect": ("inspect", "Display detailed information on one or more volumes"),
    "volume ls": ("volumes", "List volumes"),
    "volume prune": ("prune", "Remove unused local volumes"),
    "volume rm": ("volumes", "Remove one or more volumes"),
    "system check": ("system", "Check that metadata, content and snapshots agree"),
    "system df": ("system", "Show how much disk space is used"),
    "system prune": ("prune", "Remove unused data"),
}
_ALIASES = {"remove": "rm", "list": "ls"}


def say(text: str) -> None:
    """Tell the user, on standard error."""
    complain(f"boxship: {text}")


def complain(text: str) -> None:
    """A text of its own, on standard error."""
    try:
        os.write(2, f"{text}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        pass  # a closed or full standard error must not change the exit code


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Carry out a command line (without the program's name); returns the exit code."""
    arguments = list(arguments)
    environ = dict(environ)
    while arguments and arguments[0].startswith("-"):
        first = arguments[0]
        name, equals, value = first.partition("=")
        if first in ("--version", "-v"):
            os.write(1, f"boxship version {__version__}\n".encode())
            return 0
        if first in ("--help",):
            break
        if name in ("-H", "--host", "-c", "--context"):
            if not equals and len(arguments) < 2:
                complain(f"flag needs an argument: {name}")
                return 125
            given = value if equals else arguments[1]
            if name in ("-c", "--context"):
                environ["DOCKER_CONTEXT"] = given
                environ.pop("DOCKER_HOST", None)  # what is said here counts more
                environ.pop("BOXSHIP_HOST", None)
            else:
                environ["BOXSHIP_HOST"] = given
            del arguments[: 1 if equals else 2]
            continue
        if first in ("-D", "--debug", "--tls", "--tlsverify"):
            if first != "-D" and first != "--debug":
                environ["DOCKER_TLS" if first == "--tls" else "DOCKER_TLS_VERIFY"] = "1"
            del arguments[0]
            continue
        kind = f"unknown flag: {name}" if first.startswith("--") else f"unknown shorthand flag: '{first[1]}' in {first}"
        complain(f"{kind}\n\nUsage:  boxship [OPTIONS] COMMAND [ARG...]\n\nRun 'boxship --help' for more information")
        return 125
    word = arguments[0] if arguments else "--help"
    if word in ("--help", "help"):
        return _help(arguments[1:], environ)
    if word == "doctor":
        return _guarded(word, lambda: _doctor(arguments[1:]))
    if word in GROUPS:
        return _group(word, arguments[1:], environ)
    if word == "__complete":
        # What is completed has flags too: none of them is this command's.
        return _verb(word, word, ["--", *arguments[1:]], environ)
    if word in VERBS:
        return _verb(word, word, arguments[1:], environ)
    complain(f"boxship: unknown command: boxship {word}\n\nRun 'boxship --help' for more information")
    return 1


def _help(words: Sequence[str], environ: Mapping[str, str]) -> int:
    if words:
        return main([*words, "--help"], environ)
    rows = [(name, about) for name, (_, about) in VERBS.items()]
    groups = [(name, about) for name, (about, _) in GROUPS.items()]
    own = [
        ("daemon", "Run the daemon in the foreground"),
        ("doctor", "Say what this machine offers for containers, what it lacks, and what that costs"),
    ]
    text = "Usage:  boxship [OPTIONS] COMMAND\n\nContainers in Python.\n"
    for title, lines in (("Commands", sorted(rows + own)), ("Management Commands", groups)):
        text += f"\n{title}:\n" + "".join(f"  {name:<11} {about}\n" for name, about in lines)
    text += (
        "\nGlobal Options:\n  -c, --context string\n                      The engine of a context of docker's\n"
        "  -H, --host string   The engine's address: unix://PATH or tcp://HOST:PORT\n"
        "      --tls           Use TLS for tcp://, with the certificates of DOCKER_CERT_PATH or ~/.docker\n"
        "      --tlsverify     Use TLS and verify the engine\n"
        "  -v, --version       Print the version\n\nRun 'boxship COMMAND --help' for more information on a command.\n"
    )
    os.write(1, text.encode())
    return 0


def _group(group: str, words: Sequence[str], environ: Mapping[str, str]) -> int:
    about, members = GROUPS[group]
    if not words or words[0] in ("--help", "-h", "help"):
        lines = "".join(
            f"  {name:<11} {(VERBS.get(target) or MORE[target])[1]}\n"
            for name, target in sorted(members.items())
            if name not in _ALIASES and (group, name) != ("container", "ps")
        )
        os.write(
            1,
            (
                f"Usage:  boxship {group} COMMAND\n\n{about}\n\nCommands:\n{lines}\n"
                f"Run 'boxship {group} COMMAND --help' for more information on a command.\n"
            ).encode(),
        )
        return 0
    target = members.get(words[0])
    if target is None:
        more = " COMMAND" if group == "volume" else ""  # as docker says it
        complain(
            f"boxship: unknown command: boxship {group} {words[0]}\n\nUsage:  boxship {group}{more}\n\n"
            f"Run 'boxship {group} --help' for more information"
        )
        return 1
    return _verb(f"{group} {_ALIASES.get(words[0], words[0])}", target, words[1:], environ)


def _verb(written: str, target: str, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    module = (VERBS.get(target) or MORE[target])[0]

    def act() -> int:
        from boxship.cli.command import Command, carry_out

        # A plain import by name: importlib is a package that costs more.
        verbs = getattr(__import__(f"boxship.cli.verbs.{module}").cli.verbs, module)
        command: Command = verbs.COMMANDS[target]
        return carry_out(written, command, arguments, environ)

    return _guarded(written, act)


def _guarded(name: str, act: object) -> int:
    from boxship.cli.command import Exit, UsageFailure
    from boxship.kit.errors import BoxshipError

    assert callable(act)
    try:
        code: int = act()
        return code
    except UsageFailure as error:
        complain(error.text)
        return error.code
    except Exit as error:
        if error.text:
            complain(error.text)
        return error.code
    except BoxshipError as error:
        complain(str(error))
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        complain(f"{(error.strerror or str(error)).lower()}{where}")
    return 1


def _doctor(arguments: Sequence[str]) -> int:
    from boxship.cli.doctor import doctor
    from boxship.cli.flags import UsageError

    try:
        return doctor(arguments, say)
    except UsageError as error:
        say(f"{error}\n\nRun 'boxship doctor --help' for more information")
        return 1
