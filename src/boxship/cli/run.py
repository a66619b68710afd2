"""`boxship run`: docker's words for starting a process in a container, on the runtime directly.

Runs in: the boxship command. The container's process is a child of it, and its terminal and signals are the caller's.
Spec: docker run's reference for flags and exit codes.
Not here: what each image is made of (`boxship.cli.image`), the container itself (`boxship.runtime`).
"""

from __future__ import annotations

import os

from boxship.kit.errors import AlreadyExists, BoxshipError, InvalidArgument, NotFound, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from boxship.cli.flags import Parsed
    from boxship.cli.idmap import Maps
    from boxship.cli.scratch import Scratch
    from boxship.runtime.context import Context

OWN_FAILURE, NOT_EXECUTABLE, NOT_THERE = 125, 126, 127
"""docker's exit codes: boxship itself failed, the command cannot be run, the command is not there."""

FLAGS = frozenset((
    "cpus", "env", "env-file", "help", "hostname", "interactive", "memory", "name", "network", "net", "pids-limit", "read-only",
    "rm", "security-opt", "sig-proxy", "tty", "user", "volume", "workdir",
))
"""The flags of `boxship run` that are carried out here. The others need the daemon."""


def run(parsed: Parsed, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """The command: returns its exit code. `say` gets what goes to standard error. Raises BoxshipError."""
    if parsed.switch("tty") and parsed.switch("interactive") and not os.isatty(0):
        say("the input device is not a TTY")
        return 1
    # Whatever the caller's umask, the root that is built is readable for the container's users.
    os.umask(0o022)
    return Run(parsed, environ, say).perform()


class Run:
    """One run, step by step: who and where, the image, the flags, the container, and away with it all."""

    def __init__(self, parsed: Parsed, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
        self.parsed = parsed
        self.environ = dict(environ)
        self.say = say
        self.cwd = os.getcwd()
        self.rootless = os.geteuid() != 0
        name = parsed.text("name")
        self.id = name if name is not None else os.urandom(6).hex()
        self.hostname = parsed.text("hostname") or self.id[:64]
        networks = parsed.list("network") + parsed.list("net")
        network = networks[-1] if networks else None
        if network not in (None, "none", "host"):
            raise InvalidArgument(f"network {network} not found", 'there are "none" and "host"')
        self.network = network
        self.maps: Maps | None = None
        self.scratch: Scratch | None = None

    def perform(self) -> int:
        """Do it. Raises BoxshipError."""
        from boxship.cli import image, scratch
        from boxship.runtime import state

        words = self.parsed.words
        kind, path = image.kind_of(words[0], self.cwd)
        command = words[2:] if words[1:2] == ["--"] else words[1:]
        state.check_id(self.id)
        context = self._context()
        places = scratch.bases(self.environ, os.geteuid())
        scratch.sweep(places, lambda run_id: _still_there(context, run_id), self._delete_as_root)
        self._choose_maps(kind)
        try:
            return self._once(context, kind, path, command, places)
        except BoxshipError:
            # Many policies have a say in whether root may make user namespaces, so only a failure is worth asking: a test
            # takes as long as all of the image's making.
            from boxship.linux.probe import bare_user_namespace

            if self.rootless or self.maps is None or bare_user_namespace():
                raise
        self.maps = None
        return self._once(context, kind, path, command, places)

    def _once(self, context: Context, kind: str, path: str, command: list[str], places: Sequence[str]) -> int:
        from boxship.cli import scratch

        try:
            self.scratch = scratch.make(places, self.id)
        except FileExistsError:
            raise AlreadyExists(f'the container name "{self.id}" is already in use') from None
        try:
            config = self._image(kind, path)
            self._apply(kind, path, config, command)
            return self._start(context, kind, path, config)
        finally:
            self.scratch.remove(self._delete_as_root)

    def _context(self) -> Context:
        from boxship.cli.foreground import Foreground
        from boxship.runtime.context import Context

        stdin = 0 if self.parsed.switch("interactive") else os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        root = ""
        if self.rootless and not self.environ.get("XDG_RUNTIME_DIR"):
            from boxship.cli.scratch import prepare

            base = f"/tmp/boxship-{os.geteuid()}"
            prepare(base)
            root = f"{base}/boxrun"

        def log(level: str, message: str) -> None:
            if level in ("warning", "error") or "BOXSHIP_DEBUG" in self.environ:
                self.say(f"{level}: {message}")

        return Context(root, parent=Foreground((stdin, 1, 2)), log=log, environ=self.environ, cwd=self.cwd)

    def _choose_maps(self, kind: str) -> None:
        from boxship.cli import idmap

        if self.rootless:
            self.maps = idmap.caller(self.environ, os.geteuid(), os.getegid())
        elif kind != "bundle":
            self.maps = idmap.identity()

    def _image(self, kind: str, path: str) -> dict[str, Any]:
        from boxship.cli import image
        from boxship.cli.layers import Kernel, kernel_version, mount_points

        assert self.scratch is not None
        if kind == image.BUNDLE:
            return image.bundle(path, self.maps)
        own_network = self.network != "host"
        version = kernel_version(os.uname().release)
        kernel = Kernel(userns=self.maps is not None, version=version, busy=mount_points())
        if kind == image.HOST:
            return image.host(self.scratch, kernel, self.maps, self.hostname, own_network=own_network)
        return image.directory(path, self.scratch, kernel, self.maps, self.hostname, own_network=own_network)

    def _apply(self, kind: str, path: str, config: dict[str, Any], command: list[str]) -> None:
        from boxship.cli import image, values
        from boxship.cli import spec as specs

        parsed, process = self.parsed, config["process"]
        self._network_and_name(kind, config)
        if command:
            process["args"] = command
        if not process.get("args"):
            raise InvalidArgument("no command specified")
        self._user(image.reader(kind, path, config), kind, config)
        words = [word for name in parsed.list("env-file") for word in values.environment_file(name, self.environ)]
        specs.set_environment(config, words + values.environment(parsed.list("env"), self.environ))
        self._terminal(kind, config)
        workdir = parsed.text("workdir")
        if workdir is not None:
            if not workdir.startswith("/"):
                raise InvalidArgument(f"the working directory '{workdir}' is invalid, it needs to be an absolute path")
            process["cwd"] = os.path.normpath(workdir).replace("//", "/")
        config.setdefault("mounts", []).extend(values.volume(text, self.cwd) for text in parsed.list("volume"))
        if parsed.switch("read-only"):
            self._read_only(config)
        memory, cpus, pids = parsed.text("memory"), parsed.text("cpus"), parsed.number("pids-limit")
        specs.limit(
            config, memory=values.size(memory) if memory else None, swap=_swap_is_counted(),
            cpu=values.cpus(cpus) if cpus else None, pids=pids or -1 if pids is not None else None,
        )
        self._security(kind, config)
        if kind != image.BUNDLE and not self.rootless:
            config["linux"]["cgroupsPath"] = f"/boxship-{self.id}"

    def _security(self, kind: str, config: dict[str, Any]) -> None:
        from boxship.cli import spec as specs

        filtered = kind != "bundle"
        for option in self.parsed.list("security-opt"):
            if option in ("no-new-privileges", "no-new-privileges:true", "no-new-privileges=true"):
                config["process"]["noNewPrivileges"] = True
            elif option == "seccomp=unconfined":
                filtered = False
                config.setdefault("linux", {}).pop("seccomp", None)
            else:
                raise InvalidArgument(f'invalid --security-opt: "{option}"', "there are no-new-privileges and seccomp=unconfined")
        if filtered and not specs.confine(config):
            self.say("warning: no seccomp profile for this machine: the container may use every system call that its user may")

    def _network_and_name(self, kind: str, config: dict[str, Any]) -> None:
        from boxship.cli import spec as specs

        if kind == "bundle":
            if self.network == "host":
                specs.share_network(config)
            elif self.network == "none":
                specs.own_network(config)
            if self.parsed.text("hostname") is not None:
                config["hostname"] = self.hostname

    def _user(self, read: Callable[[str], str], kind: str, config: dict[str, Any]) -> None:
        from boxship.cli import spec as specs
        from boxship.oci import users

        wanted = self.parsed.text("user")
        if wanted is None and kind == "bundle":
            return
        user = users.find(wanted or "", read)
        if self.maps is not None and not self.maps.holds(user.uid, user.gid):
            raise InvalidArgument(
                f"user {wanted} is not mapped in the container's user namespace",
                "install uidmap, and give the caller a range in /etc/subuid and /etc/subgid" if self.maps.single() else "",
            )
        if self.maps is not None:
            user.groups = [group for group in user.groups if self.maps.holds(user.uid, group)]
        specs.set_user(config, user)
        specs.set_default_environment(config, [f"HOME={user.home}"])

    def _terminal(self, kind: str, config: dict[str, Any]) -> None:
        from boxship.cli import spec as specs

        process = config["process"]
        if kind == "bundle" and not self.parsed.given & {"tty", "interactive"}:
            # The bundle's own wish, unless there is nothing to connect a terminal to.
            process["terminal"] = bool(process.get("terminal")) and os.isatty(0)
        else:
            process["terminal"] = self.parsed.switch("tty")
        if process["terminal"]:
            specs.set_default_environment(config, ["TERM=xterm"])
            if os.isatty(1):
                size = os.get_terminal_size(1)
                process["consoleSize"] = {"height": size.lines, "width": size.columns}

    def _read_only(self, config: dict[str, Any]) -> None:
        config.setdefault("root", {})["readonly"] = True
        for mount in config.get("mounts", []):
            if mount.get("type") == "overlay" or mount.get("destination") == "/usr/local/etc":
                mount["options"] = [*mount.get("options", []), "ro"]

    def _start(self, context: Context, kind: str, path: str, config: dict[str, Any]) -> int:
        from boxship.runtime.lifecycle import run as start
        from boxship.runtime.options import CreateOptions

        assert self.scratch is not None
        # A run that was killed may have left its record; its container is gone, as the sweep found.
        try:
            return start(context, self.id, path if kind == "bundle" else self.scratch.path, CreateOptions(), spec=config)
        except Unsupported as error:
            if "seccomp" in str(error):
                raise Unsupported(str(error), "or without protection: --security-opt seccomp=unconfined") from None
            raise
        except BoxshipError as error:
            code = command_error(str(error))
            if code == OWN_FAILURE:
                raise
            self.say(str(error))
            return code

    def _delete_as_root(self, path: str) -> None:
        from boxship.cli import idmap, scratch

        maps = self.maps or idmap.caller(self.environ, os.geteuid(), os.getegid())
        idmap.as_container_root(maps, lambda: scratch.remove_tree(path))


def command_error(text: str) -> int:
    """docker's exit code for a container that did not start: by the runtime's words, as docker itself does."""
    lower = text.lower()
    if "executable file not found" in lower or ("exec" in lower and "no such file or directory" in lower):
        return NOT_THERE
    if "exec" in lower and any(word in lower for word in ("permission denied", "is a directory", "exec format error")):
        return NOT_EXECUTABLE
    return OWN_FAILURE


def _still_there(context: Context, run_id: str) -> bool:
    """Whether the container of a killed run still lives; when not, what the runtime knows of it is deleted."""
    from boxship.runtime import lifecycle, state

    try:
        with state.open_container(context, run_id) as container:
            if container.alive():
                return True
    except NotFound:
        return False
    lifecycle.delete(context, run_id, force=True)
    return False


def _swap_is_counted() -> bool:
    """Whether a limit on swap can be set here: the kernel may be built or started without."""
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        with open("/proc/self/cgroup") as file:
            own = next((line.rstrip("\n")[3:] for line in file if line.startswith("0::")), "/")
        return os.path.exists(f"/sys/fs/cgroup{own}/memory.swap.max")
    return os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
