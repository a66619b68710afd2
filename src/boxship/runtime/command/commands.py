"""What each command of boxrun does: from parsed flags to a call of the library, and its output.

Runs in: the runtime.
Spec: runc 1.5's output, byte for byte where callers parse it: `state`, `list`, `ps --format json`, `features`, `spec`.
"""

from __future__ import annotations

import os

from boxship.kit.errors import BoxshipError, InvalidArgument
from boxship.kit.files import read_all, write_all
from boxship.oci import text
from boxship.runtime import lifecycle
from boxship.runtime.options import CreateOptions, ExecOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from boxship.oci.config import Process
    from boxship.runtime.command.flags import Parsed
    from boxship.runtime.command.main import Invocation


def _path(call: Invocation, p: Parsed, key: str) -> str:
    """An option that is a path, as the caller means it; "" when it was not given."""
    return call.path(p.text(key)) if p.text(key) else ""


def _create_options(call: Invocation, p: Parsed) -> CreateOptions:
    return CreateOptions(
        _path(call, p, "pid-file"), _path(call, p, "console-socket"), p.number("preserve-fds"),
        pidfd_socket=_path(call, p, "pidfd-socket"),
        no_pivot=p.yes("no-pivot"), no_new_keyring=p.yes("no-new-keyring"),
    )


def _bundle(call: Invocation, p: Parsed) -> str:
    bundle = call.path(p.text("bundle") or ".")
    if not os.path.isdir(bundle):
        raise InvalidArgument(f"chdir {bundle}: no such file or directory")
    return bundle


def create(call: Invocation, p: Parsed) -> int:
    """`boxrun create`."""
    lifecycle.create(call.context, p.args[0], _bundle(call, p), _create_options(call, p)).close()
    return 0


def run(call: Invocation, p: Parsed) -> int:
    """`boxrun run`."""
    return lifecycle.run(
        call.context, p.args[0], _bundle(call, p), _create_options(call, p), detach=p.yes("detach"), keep=p.yes("keep")
    )


def start(call: Invocation, p: Parsed) -> int:
    """`boxrun start`."""
    lifecycle.start(call.context, p.args[0])
    return 0


def state(call: Invocation, p: Parsed) -> int:
    """`boxrun state`: no newline at the end, as runc prints it."""
    from boxship.runtime.state import open_container

    with open_container(call.context, p.args[0]) as container:
        call.print(text.dumps(container.describe(), indent=2))
    return 0


def list_(call: Invocation, p: Parsed) -> int:
    """`boxrun list`."""
    import pwd

    if call.root_given and not os.path.isdir(call.context.root):
        raise InvalidArgument(f"open {call.context.root}: no such file or directory")
    if p.text("format") not in ("table", "json"):
        raise InvalidArgument("invalid format option")
    rows = []
    for container in lifecycle.list_containers(call.context):
        with container:
            uid = os.fstat(container.fd).st_uid
            try:
                owner = pwd.getpwuid(uid).pw_name
            except KeyError:
                owner = f"#{uid}"
            rows.append(container.describe() | {"owner": owner})
    if p.yes("quiet"):
        call.print("".join(f"{row['id']}\n" for row in rows))
    elif p.text("format") == "json":
        call.print(text.dumps(rows or None) + "\n")
    else:
        header = [["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]]
        cells = header + [[str(row[k]) for k in ("id", "pid", "status", "bundle", "created", "owner")] for row in rows]
        call.print(_table(cells))
    return 0


def _table(rows: list[list[str]]) -> str:
    """Columns as Go's tabwriter makes them: at least 12 wide, three blanks between."""
    widths = [max(12, *(len(row[i]) + 3 for row in rows)) for i in range(len(rows[0]) - 1)]
    return "".join("".join(c.ljust(w) for c, w in zip(row, widths, strict=False)) + row[-1] + "\n" for row in rows)


def kill(call: Invocation, p: Parsed) -> int:
    """`boxrun kill`; --all makes a container that does not run a success, for old callers."""
    from boxship.linux.process import parse_signal
    from boxship.runtime.state import NotRunning

    try:
        lifecycle.kill(call.context, p.args[0], parse_signal(p.args[1] if len(p.args) > 1 else "SIGTERM"))
    except NotRunning:
        if not p.yes("all"):
            raise
    return 0


def delete(call: Invocation, p: Parsed) -> int:
    """`boxrun delete`."""
    lifecycle.delete(call.context, p.args[0], force=p.yes("force"))
    return 0


def pause(call: Invocation, p: Parsed) -> int:
    """`boxrun pause`."""
    lifecycle.pause(call.context, p.args[0])
    return 0


def resume(call: Invocation, p: Parsed) -> int:
    """`boxrun resume`."""
    lifecycle.resume(call.context, p.args[0])
    return 0


def ps(call: Invocation, p: Parsed) -> int:
    """`boxrun ps`: the container's lines of ps(1), or the pids as JSON."""
    pids = lifecycle.processes(call.context, p.args[0])
    if p.text("format") == "json":
        call.print(text.dumps(pids) + "\n")
        return 0
    if p.text("format") != "table":
        raise InvalidArgument("invalid format option")
    import subprocess

    result = subprocess.run(
        ["ps", *(p.args[1:] or ["-ef"])], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    output = result.stdout.decode(errors="surrogateescape")
    if result.returncode:
        raise BoxshipError(f"exit status {result.returncode}: {output}")
    lines = output.splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise BoxshipError("couldn't find PID field in ps output")
    column = titles.index("PID")
    wanted = {str(pid) for pid in pids}
    kept = [line for line in lines[1:] if wanted.intersection(line.split()[column : column + 1])]
    call.print("\n".join([lines[0], *kept]) + "\n")
    return 0


def exec_(call: Invocation, p: Parsed) -> int:
    """`boxrun exec`."""
    from boxship.runtime import exec as joining
    from boxship.runtime.state import open_container

    with open_container(call.context, p.args[0]) as container:
        process = _process(call, p, joining.process_of(container) if not p.text("process") else None)

    options = ExecOptions(
        cgroup=p.many("cgroup"), ignore_paused=p.yes("ignore-paused"), detach=p.yes("detach"),
        pid_file=_path(call, p, "pid-file"), console_socket=_path(call, p, "console-socket"),
        pidfd_socket=_path(call, p, "pidfd-socket"), preserve_fds=p.number("preserve-fds"),
    )
    return joining.execute(call.context, p.args[0], process, options)


def _process(call: Invocation, p: Parsed, process: Process | None) -> Process:
    from boxship.oci.config import Process
    from boxship.oci.validate import validate_process

    if process is None:
        path = call.path(p.text("process"))
        process = Process.decode(text.loads(read_all(path), path), "process")
    else:
        if len(p.args) < 2:
            raise InvalidArgument("exec args cannot be empty")
        process.args = p.args[1:]
        _override(p, process)
    validate_process(process)
    return process


def _override(p: Parsed, process: Process) -> None:
    if p.text("cwd"):
        process.cwd = p.text("cwd")
    if p.text("apparmor"):
        process.apparmor_profile = p.text("apparmor")
    if p.text("process-label"):
        process.selinux_label = p.text("process-label")
    if p.many("cap") and process.capabilities is not None:
        caps = process.capabilities
        added = p.many("cap")
        caps.bounding, caps.effective, caps.permitted = caps.bounding + added, caps.effective + added, caps.permitted + added
        # Ambient needs inheritable, which --cap leaves alone (CVE-2022-29162).
        if caps.inheritable:
            caps.ambient = caps.ambient + added
    process.env = process.env + p.many("env")
    process.terminal = p.yes("tty")
    if "no-new-privs" in p.given:
        process.no_new_privileges = p.yes("no-new-privs")
    if p.text("user"):
        uid, colon, gid = p.text("user").partition(":")
        if colon:
            process.user.gid = _id(gid, "gid")
        process.user.uid = _id(uid, "uid")
    for gid in p.many("additional-gids"):
        process.user.additional_gids = [*process.user.additional_gids, _id(gid, "additional gid")]


def _id(value: str, what: str) -> int:
    # Exactly a number: "1x", "" or " 1" must never become 0 (CVE-2026-30892), nor 2**32 wrap to it.
    if not (value.isascii() and value.isdigit()) or int(value) >= 1 << 32:
        raise InvalidArgument(f'bad {what}: strconv.Atoi: parsing "{value}": invalid syntax')
    return int(value)


def update(call: Invocation, p: Parsed) -> int:
    """`boxrun update`."""
    from boxship.runtime.command.update import resources_from_flags

    if p.text("resources"):
        source = p.text("resources")
        data = call.read_input() if source == "-" else read_all(call.path(source))
        change = text.loads(data, "resources")
        if not isinstance(change, dict):
            raise InvalidArgument("resources: expected an object")
    else:
        change = resources_from_flags({key: p.values[key] for key in p.given})
    lifecycle.update(call.context, p.args[0], change)
    return 0


def events(call: Invocation, p: Parsed) -> int:
    """`boxrun events`."""
    from boxship.runtime.events import follow, parse_duration

    return follow(call.context, p.args[0], call.print, interval_s=parse_duration(p.text("interval")), once=p.yes("stats"))


def features(call: Invocation, p: Parsed) -> int:
    """`boxrun features`."""
    from boxship.runtime.features import features as describe

    call.print(text.dumps(describe(), indent=4) + "\n")
    return 0


def spec(call: Invocation, p: Parsed) -> int:
    """`boxrun spec`: writes config.json, which must not be there yet."""
    from boxship.oci import defaults

    config = defaults.default_spec()
    if p.yes("rootless"):
        defaults.to_rootless(config)
    bundle = _bundle(call, p)
    path = os.path.join(bundle, "config.json")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise InvalidArgument("File config.json exists. Remove it first") from None
    try:
        write_all(fd, text.dumps(config, indent="\t").encode())
    finally:
        os.close(fd)
    return 0


def checkpoint(call: Invocation, p: Parsed) -> int:
    """`boxrun checkpoint`."""
    from boxship.runtime import checkpoint as saving

    saving.checkpoint(call.context, p.args[0], saving.options_of(call, p))
    return 0


def restore(call: Invocation, p: Parsed) -> int:
    """`boxrun restore`."""
    from boxship.runtime import restore as reviving
    from boxship.runtime.checkpoint import options_of

    create_options = CreateOptions(
        _path(call, p, "pid-file"), _path(call, p, "console-socket"), no_pivot=p.yes("no-pivot"),
    )
    return reviving.restore(
        call.context, p.args[0], _bundle(call, p), create_options, options_of(call, p), detach=p.yes("detach")
    )
