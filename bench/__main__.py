"""boxrun, runc and crun side by side: prints the tables of docs/performance.md.

Runs in: root, a mount namespace of its own. Every figure is the median of `--rounds` rounds in which the runtimes take
turns, so that what else the machine does meets them alike.

    python -m bench [--rounds 30] [--runtime NAME=PATH …]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Work = Callable[[str, str], None]

TRUE_C = "int main(void) { return 0; }\n"
# perf_counter is CLOCK_MONOTONIC. Written without stdio, which would take longer than all the rest.
NOW_C = """
#include <time.h>
#include <unistd.h>
int main(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	unsigned long long value = now.tv_sec * 1000000000ull + now.tv_nsec;
	char text[32], *at = text + sizeof text;
	*--at = 10;
	do *--at = '0' + value % 10; while (value /= 10);
	return write(1, at, text + sizeof text - at) < 0;
}
"""
SLEEP_C = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
PEAK_C = """#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	struct rusage usage;
	pid_t pid = fork();
	if (pid == 0) {
		execv(argv[1], argv + 1);
		_exit(127);
	}
	if (wait4(pid, NULL, 0, &usage) != pid)
		return 1;
	printf("%ld\\n", usage.ru_maxrss);
	return 0;
}
"""
CLONE_NEWNS = 0x20000


def private_mounts() -> None:
    """A mount namespace of our own, in which crun starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    listed = Path("/sys/fs/cgroup/unified/cgroup.controllers")
    if listed.exists() and listed.read_text().strip():
        # crun refuses a hybrid machine whose v2 hierarchy has controllers; it goes by this list.
        subprocess.run(["mount", "--bind", "/dev/null", str(listed)], check=True)


def compile_into(source: str, target: Path) -> None:
    """A static program."""
    subprocess.run(["gcc", "-O2", "-static", "-x", "c", "-", "-o", str(target)], input=source.encode(), check=True)


def make_bundle(folder: Path, program: str) -> Path:
    """A bundle with the default configuration of `runc spec`, but for the terminal, that runs `program`."""
    rootfs = folder / "rootfs"
    for name in ("proc", "dev", "sys", "tmp"):
        (rootfs / name).mkdir(parents=True)
    compile_into(TRUE_C, rootfs / "true")
    compile_into(SLEEP_C, rootfs / "sleep")
    from boxship.oci import defaults

    config = defaults.default_spec()
    config["ociVersion"] = "1.0.2"  # Debian's crun knows none newer
    process = config["process"]
    assert isinstance(process, dict)
    process["terminal"] = False
    process["args"] = [program]
    process["capabilities"].pop("ambient", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def call(runtime: str, *args: str, cwd: Path) -> None:
    """One command of a runtime; its output goes nowhere (a pipe would be held by the container). Raises CalledProcessError."""
    null = subprocess.DEVNULL
    subprocess.run([runtime, *args], cwd=cwd, stdin=null, stdout=null, stderr=null, check=True)


class Bench:
    """The works to measure, over one pair of bundles."""

    def __init__(self, folder: Path, runtimes: dict[str, str], rounds: int) -> None:
        self.runtimes = runtimes
        self.rounds = rounds
        self.true = make_bundle(folder / "true", "/true")
        self.sleep = make_bundle(folder / "sleep", "/sleep")
        self.serial = 0

    def name(self) -> str:
        """A container id that was not used yet."""
        self.serial += 1
        return f"bench-{os.getpid()}-{self.serial}"

    def turns(self, work: Callable[[str], float], rounds: int | None = None) -> dict[str, list[float]]:
        """Milliseconds of `work`, which returns seconds, by runtime; one round each goes before and does not count."""
        times: dict[str, list[float]] = {name: [] for name in self.runtimes}
        for i in range((rounds or self.rounds) + 1):
            for name, path in self.runtimes.items():
                took = work(path) * 1000
                if i:
                    times[name].append(took)
        return times

    def run(self, runtime: str) -> float:
        """`run` of /true."""
        name = self.name()
        start = time.perf_counter()
        call(runtime, "run", name, cwd=self.true)
        return time.perf_counter() - start

    def create_start_delete(self, runtime: str) -> float:
        """The three commands, without the time that the container itself takes to end."""
        name = self.name()
        start = time.perf_counter()
        call(runtime, "create", name, cwd=self.true)
        call(runtime, "start", name, cwd=self.true)
        took = time.perf_counter() - start
        while self.status(runtime, name) != "stopped":
            time.sleep(0.001)
        start = time.perf_counter()
        call(runtime, "delete", name, cwd=self.true)
        return took + time.perf_counter() - start

    def status(self, runtime: str, name: str) -> str:
        """As `state` tells it."""
        output = subprocess.run([runtime, "state", name], stdout=subprocess.PIPE, check=True).stdout
        return str(json.loads(output)["status"])

    def many(self, runtime: str, at_once: int, count: int = 100) -> float:
        """`count` runs by `at_once` clients."""
        names = [self.name() for _ in range(count)]
        start = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda name: call(runtime, "run", name, cwd=self.true), names))
        return time.perf_counter() - start

    def executions(self) -> dict[str, list[float]]:
        """`exec` of /true in a running container."""
        names = {path: self.name() for path in self.runtimes.values()}
        for path, name in names.items():
            call(path, "run", "-d", name, cwd=self.sleep)
        try:
            def work(runtime: str) -> float:
                start = time.perf_counter()
                call(runtime, "exec", names[runtime], "/true", cwd=self.sleep)
                return time.perf_counter() - start

            return self.turns(work)
        finally:
            for path, name in names.items():
                call(path, "delete", "-f", name, cwd=self.sleep)

    def memory(self) -> dict[str, float]:
        """MiB of the process that the caller started at its largest. A small C program starts it: a child of this
        interpreter would be charged with the interpreter's own size.
        """
        tool = self.true / "peak"
        compile_into(PEAK_C, tool)
        peaks = {}
        for name, path in self.runtimes.items():
            command = [str(tool), path, "run", self.name()]
            done = subprocess.run(command, cwd=self.true, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
            peaks[name] = int(done.stdout.split()[-1]) / 1024
        return peaks

    def library(self) -> tuple[list[float], list[float]]:
        """Milliseconds from the call of `boxship.runtime.lifecycle.run` in this process to the program's first instruction, and
        to the call's return, the container deleted.
        """
        from boxship.runtime import lifecycle
        from boxship.runtime.context import Context
        from boxship.runtime.parent import Direct

        compile_into(NOW_C, self.true / "rootfs/now")
        spec = json.loads((self.true / "config.json").read_text())
        spec["process"]["args"] = ["/now"]
        heard, said = os.pipe()
        with tempfile.TemporaryDirectory(dir="/run") as root:
            context = Context(root, parent=Direct((0, said, 2)))
            begun, whole = [], []
            for i in range(self.rounds + 5):
                start = time.perf_counter_ns()
                lifecycle.run(context, self.name(), str(self.true), spec=spec)
                end = time.perf_counter_ns()
                if i >= 5:
                    begun.append((int(os.read(heard, 100)) - start) / 1e6)
                    whole.append((end - start) / 1e6)
                else:
                    os.read(heard, 100)
        os.close(heard)
        os.close(said)
        return begun, whole


def pss_of_idle_server() -> float:
    """MiB of the warm server and its waiting workers together (proportional set size)."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if b"boxship.runtime.warm" in Path(f"/proc/{pid}/cmdline").read_bytes():
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


def row(title: str, values: dict[str, float], unit: str) -> str:
    """A line of the table: each figure, and boxrun's ratio to the others."""
    ours = values["boxrun"]
    ratios = ", ".join(f"{ours / value:.2f} \N{MULTIPLICATION SIGN} {name}" for name, value in values.items() if name != "boxrun")
    return f"| {title} | " + " | ".join(f"{value:.1f} {unit}" for value in values.values()) + f" | {ratios} |"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="boxrun against runc and crun")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--runtime", action="append", default=[], metavar="NAME=PATH", help="a further runtime to compare with")
    options = parser.parse_args()
    runtimes = {"boxrun": str(Path(sys.executable).with_name("boxrun"))}
    for name in ("runc", "crun"):
        found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        if found:
            runtimes[name] = found
        else:
            print(f"{name} is not installed: apt-get install {name}", file=sys.stderr)
    runtimes.update(item.split("=", 1) for item in options.runtime)
    private_mounts()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        bench = Bench(Path(folder), runtimes, options.rounds)
        print(f"{time.strftime('%Y-%m-%d')}, Linux {os.uname().release}, {os.cpu_count()} processors, {options.rounds} rounds")
        print()
        print("| work | " + " | ".join(runtimes) + " | ratio |")
        print("| --- |" + " --- |" * (len(runtimes) + 1))

        def median(times: dict[str, list[float]]) -> dict[str, float]:
            return {name: statistics.median(values) for name, values in times.items()}

        print(row("`run` of a static true", median(bench.turns(bench.run)), "ms"))
        print(row("create, start, delete", median(bench.turns(bench.create_start_delete)), "ms"))
        print(row("exec", median(bench.executions()), "ms"))
        print(row("100 one after another", median(bench.turns(lambda path: bench.many(path, 1), 3)), "ms"))
        print(row("100, four at a time", median(bench.turns(lambda path: bench.many(path, 4), 3)), "ms"))
        print(row("peak memory of the called process", bench.memory(), "MiB"))
        print()
        begun, whole = bench.library()
        to_program, in_all = statistics.median(begun), statistics.median(whole)
        print(f"`lifecycle.run` in this process: {to_program:.1f} ms to the program, {in_all:.1f} ms in all")
        print(f"warm server and its waiting workers: {pss_of_idle_server():.1f} MiB (PSS)")


if __name__ == "__main__":
    main()
