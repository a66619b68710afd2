"""The OCI's validation programs against several runtimes, as one Markdown table.

The programs are those of opencontainers/runtime-tools, built elsewhere; they are given a runtime by the variable RUNTIME and
print TAP. A program counts as passed when it exits with 0, prints no "not ok", and, for the programs that make no assertion
and only report errors, reports none.

    BOXSHIP_VALIDATION=~/runtime-tools python bench/conformance.py boxrun=.venv/bin/boxrun runc=/usr/sbin/runc crun=/usr/bin/crun

Runs in: a process of its own, as root. Each program runs in mount, process and IPC namespaces of its own with its own /run,
because linux_rootfs_propagation leaves mounts behind and a program that is killed leaves containers.
Not here: speed (bench/), and runc's own bats suite (docs/conformance.md says how that is run).
"""
from __future__ import annotations

import argparse
import concurrent.futures
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

# What the programs are started through: a shell that is process 1 of a new pid namespace (it reaps what containers leave, and
# everything dies with it) with a /run of its own, so that runtimes with resident helpers do not meet those of the machine.
# Where cgroups are v1, the controllers that nobody mounted are mounted for the program alone: crun refuses a v2 hierarchy
# that has controllers beside v1, and some programs need just those. The copy keeps the machine's /sys/fs/cgroup as it is.
_INSIDE = """
mount -t tmpfs -o mode=755 tmpfs /run || exit
if ! test -e /sys/fs/cgroup/cgroup.procs; then
    mkdir /run/cgroup && mount -t tmpfs -o mode=755 tmpfs /run/cgroup || exit
    for path in /sys/fs/cgroup/*; do
        if test -h $path; then cp -d $path /run/cgroup/; elif mountpoint -q $path; then
            mkdir /run/cgroup/${path##*/} && mount --bind $path /run/cgroup/${path##*/} || exit
        fi
    done
    added=
    for name in hugetlb net_cls net_prio; do
        grep -q "^$name[[:space:]].*[[:space:]]1$" /proc/cgroups && ! test -e /run/cgroup/$name || continue
        mkdir /run/cgroup/$name && mount -t cgroup -o $name cgroup /run/cgroup/$name || rmdir /run/cgroup/$name
        added="$added /sys/fs/cgroup/$name"
    done
    umount -R /sys/fs/cgroup && mount --move /run/cgroup /sys/fs/cgroup || exit
fi
"$0" "$@"
status=$?
# A hierarchy lives on after its mount while it has a child; and runtimes leave the parents of the programs' groups.
test -z "$added" || find $added -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null
find /sys/fs/cgroup/*/testdir /sys/fs/cgroup/*/cgrouptest -depth -type d -exec rmdir {} + 2>/dev/null
exit $status
"""

# Stands in for the runtime: puts its state below the program's own directory; and a runtime that refuses configurations
# newer than itself (crun 1.8.1) gets them with the version that it knows.
_WRAPPER = """#!/bin/sh
{rewrite}
exec {runtime} --root {state} "$@"
"""
_REWRITE = """
if [ "$1" = create ]; then
    bundle=.; previous=
    for word; do
        [ "$previous" = --bundle ] && bundle=$word
        previous=$word
    done
    sed -i 's/"ociVersion": *"[^"]*"/"ociVersion":"1.0.2"/' "$bundle/config.json"
fi
"""

# Programs that no runtime passes on the machine of the published table, and why. Shown as notes, never as an excuse: a
# program of this list that passes is counted.
KNOWN = {
    "delete": "expects `delete` of a created container to fail; runc and crun allow it",
    "delete_resources": "compares pointers since the spec made `pids.limit` one",
    "hooks": "expects prestart hooks at `start`; the spec moved them into `create`",
    "linux_cgroups_blkio": "`blkio.leaf_weight` left Linux in 5.0",
    "linux_cgroups_memory": "kernel memory limits left Linux",
    "linux_cgroups_network": "net_cls and net_prio are not mounted",
    "linux_cgroups_pids": "compares pointers since the spec made `pids.limit` one",
    "linux_cgroups_relative_blkio": "`blkio.leaf_weight` left Linux in 5.0",
    "linux_cgroups_relative_memory": "kernel memory limits left Linux",
    "linux_cgroups_relative_network": "net_cls and net_prio are not mounted",
    "linux_cgroups_relative_pids": "compares pointers since the spec made `pids.limit` one",
    "misc_props": "its root file system has no `/runtimetest`",
    "pidfile": "kills `true`, which has ended already",
    "prestart": "expects prestart hooks at `start`; the spec moved them into `create`",
    "process_capabilities": "needs every capability; the machine lacks CAP_SYS_RESOURCE",
    "process_capabilities_fail": "an unknown capability became a warning in the spec",
    "process_rlimits": "its checker is a Go program, and Go raises its own NOFILE limit",
}


class Outcome:
    """What one program said about one runtime."""

    __slots__ = ("failed", "note", "ok", "passed", "skipped")

    def __init__(self, stdout: str, stderr: str, code: int | None) -> None:
        lines = stdout.splitlines()
        good = [line for line in lines if re.match(r"ok \d", line)]
        self.skipped = sum("# skip" in line.lower() for line in good)
        self.ok = len(good) - self.skipped
        self.failed = sum(line.startswith("not ok") for line in lines)
        # Programs without assertions report through a YAML block: "  error: ..." or the same as a JSON key.
        complains = not good and not self.failed and re.search(r'^\s*"?error"?\s*:', stdout, re.M) is not None
        self.passed = code == 0 and not self.failed and not complains
        self.note = "time limit" if code is None else f"exit {code}" if code else "error" if complains else ""
        if not self.passed and not self.note and not self.failed:
            self.note = stderr.strip().rpartition("\n")[2][:60]

    def cell(self) -> str:
        """For the table: ok/not ok/skipped behind a mark."""
        counts = f"{self.ok}/{self.failed}/{self.skipped}"
        return f"{'✔' if self.passed else '✘'} {counts}" + (f" {self.note}" if self.note else "")


def main() -> int:
    """Run the programs named, or all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runtimes", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--tools", default=os.environ.get("BOXSHIP_VALIDATION"), metavar="DIR",
                        help="runtime-tools with validation/*/*.t and runtimetest built (default: $BOXSHIP_VALIDATION)")
    parser.add_argument("--only", action="append", default=[], metavar="PROGRAM")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for each program (default: 60)")
    parser.add_argument("--jobs", type=int, default=1, help="programs at a time (default: 1)")
    parser.add_argument("--logs", metavar="DIR", help="keep what each program prints, as DIR/NAME/PROGRAM.log")
    options = parser.parse_args()
    if not options.tools or not os.path.exists(os.path.join(options.tools, "runtimetest")):
        parser.error("name a directory of built validation programs by --tools or BOXSHIP_VALIDATION")
    programs = {os.path.basename(path)[:-2]: path for path in sorted(glob.glob(os.path.join(options.tools, "validation/*/*.t")))}
    if options.only:
        programs = {name: programs[name] for name in options.only}
    runtimes = dict(word.split("=", 1) for word in options.runtimes)
    results: dict[str, dict[str, Outcome]] = {}
    for name, path in runtimes.items():
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            jobs = {program: pool.submit(_run, options, name, path, program, file) for program, file in programs.items()}
            results[name] = {program: job.result() for program, job in jobs.items()}
        passed = sum(outcome.passed for outcome in results[name].values())
        print(f"{name}: {passed} of {len(programs)} passed", file=sys.stderr)
    _print_table(results, list(programs))
    return 0


def _run(options: argparse.Namespace, name: str, runtime: str, program: str, file: str) -> Outcome:
    """One program against one runtime, in namespaces and directories of its own."""
    scratch = tempfile.mkdtemp(prefix=f"validation-{program}-")
    try:
        wrapper = os.path.join(scratch, "runtime")
        old = subprocess.run([runtime, "--version"], capture_output=True, text=True).stdout.startswith("crun version 1.8.")
        with open(wrapper, "w", encoding="utf-8") as stream:
            stream.write(_WRAPPER.format(runtime=os.path.abspath(runtime), state=os.path.join(scratch, "state"),
                                         rewrite=_REWRITE if old else ""))
        os.chmod(wrapper, 0o755)
        os.mkdir(os.path.join(scratch, "tmp"))
        os.chmod(scratch, 0o755)  # user namespaces must be able to enter it
        environment = dict(os.environ, RUNTIME=wrapper, TMPDIR=os.path.join(scratch, "tmp"))
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child",
             "sh", "-c", _INSIDE, file],
            cwd=options.tools, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True)
        code: int | None
        try:
            stdout, stderr = process.communicate(timeout=options.limit)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            code = None
        if options.logs:
            os.makedirs(os.path.join(options.logs, name), exist_ok=True)
            with open(os.path.join(options.logs, name, f"{program}.log"), "w", encoding="utf-8") as stream:
                stream.write(f"{stdout}\n--- stderr\n{stderr}\n--- exit {code}\n")
        return Outcome(stdout, stderr, code)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _print_table(results: dict[str, dict[str, Outcome]], programs: list[str]) -> None:
    """Markdown: a row for each program, a column for each runtime, and totals above."""
    names = list(results)
    passable = [program for program in programs if any(results[name][program].passed for name in names)]
    print("| | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    print("| programs passed | " + " | ".join(str(sum(results[name][p].passed for p in programs)) for name in names) + " |")
    sums = []
    for name in names:
        outcomes = results[name].values()
        sums.append(f"{sum(o.ok for o in outcomes)} / {sum(o.failed for o in outcomes)} / {sum(o.skipped for o in outcomes)}")
    print("| assertions ok / not ok / skipped | " + " | ".join(sums) + " |")
    print(f"\n{len(passable)} of {len(programs)} programs are passed by at least one of them.\n")
    print("| program | " + " | ".join(names) + " | why it fails everywhere |")
    print("|---" * (len(names) + 2) + "|")
    for program in programs:
        why = "" if program in passable else KNOWN.get(program, "")
        print(f"| {program} | " + " | ".join(results[name][program].cell() for name in names) + f" | {why} |")


if __name__ == "__main__":
    sys.exit(main())
