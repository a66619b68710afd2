"""Builds by our engine, Debian's dockerd (classic) and buildah, the same Dockerfile and context: a table of docs/performance.md.

Runs in: root, with docker, dockerd and buildah on PATH (those that are missing are left out); daemons on folders of their own,
without networks: in a network namespace (`unshare -n -m`). Builders take turns in each round; each figure is the median.

    cold         a file of ten steps, no cache
    cached       the same again
    one file     after one source file changed
    10,000       a context of 10,000 files, cold, then cached

    python -m bench.build [--rounds 5] [--only cold,cached,file,many]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.image import NAME, write_archive

STEPS = f"""FROM {NAME}
ENV A=1
WORKDIR /app
RUN echo 1 > /one
RUN echo 2 > /two
RUN mkdir -p /data/a/b && echo 3 > /data/a/b/c
COPY src /app/src
RUN cat /app/src/* > /app/all
RUN wc -l < /app/all > /lines
RUN rm /one
CMD ["cat", "/app/all"]
"""
MANY = f"FROM {NAME}\nCOPY . /files\nRUN ls /files | wc -l > /count\n"


class Builder:
    """One builder: `build` with and without the cache."""

    def __init__(self, name: str, command: list[str], environ: dict[str, str], fresh: str) -> None:
        self.name = name
        self.command = command
        self.environ = {**os.environ, **environ}
        self.fresh = fresh
        self.daemon: subprocess.Popen[bytes] | None = None

    def build(self, context: Path, *, cached: bool) -> float:
        """Seconds."""
        words = [*self.command, *([] if cached else [self.fresh]), "-t", "bench:1", str(context)]
        began = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environ)
        return time.perf_counter() - began

    def close(self) -> None:
        """End its daemon."""
        if self.daemon is not None:
            self.daemon.terminate()
            self.daemon.wait(30)


def daemon(words: list[str], socket: Path, log: Path) -> subprocess.Popen[bytes]:
    """A daemon that answers."""
    with open(log, "wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
    for _ in range(1200):
        if socket.exists() and subprocess.run(
                ["docker", "-H", f"unix://{socket}", "version"], capture_output=True, check=False).returncode == 0:
            return process
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit(f"{words[0]} did not start: {log.read_text()[-2000:]}")


def builders(folder: Path, archive: Path) -> list[Builder]:
    """Those that are there, each with the image."""
    found = []
    docker = shutil.which("docker")
    plans: list[tuple[str, list[str]]] = []
    if docker:
        own = folder / "boxship"
        plans.append(("boxship", [
            str(Path(sys.executable).with_name("boxship")), "daemon", "--root", f"{own}/root", "--state", str(own),
            "--bridge", "none"]))
        if shutil.which("dockerd"):
            other = folder / "dockerd"
            plans.append(("dockerd", [
                "dockerd", "--data-root", f"{other}/root", "--exec-root", f"{other}/exec", "-p", f"{other}/pid", "-H",
                f"unix://{other}/docker.sock", "--iptables=false", "--ip6tables=false", "--bridge=none"]))
    for name, words in plans:
        (folder / name).mkdir()
        socket = folder / name / "docker.sock"
        process = daemon(words, socket, folder / f"{name}.log")
        words = ["docker", "-H", f"unix://{socket}", "build", "--network=none"]
        made = Builder(name, words, {"DOCKER_BUILDKIT": "0"}, "--no-cache")
        made.daemon = process
        subprocess.run(["docker", "-H", f"unix://{socket}", "load", "-q", "-i", str(archive)], check=True, capture_output=True)
        found.append(made)
    if shutil.which("buildah"):
        store = ["--root", f"{folder}/buildah", "--runroot", f"{folder}/run"]
        subprocess.run(["buildah", *store, "pull", f"docker-archive:{archive}"], check=True, capture_output=True)
        found.append(Builder(
            "buildah", ["buildah", *store, "bud", "--layers", "--network=none", "--isolation=oci"], {}, "--no-cache"))
    return found


def figures(made: list[Builder], rounds: int, prepare: Callable[[int], Path], *, cached: bool) -> dict[str, float]:
    """The median of each builder, taking turns."""
    times: dict[str, list[float]] = {each.name: [] for each in made}
    for number in range(rounds):
        context = prepare(number)
        for each in made if number % 2 else made[::-1]:
            times[each.name].append(each.build(context, cached=cached))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="cold,cached,file,many")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bb-", dir="/tmp"))
    made: list[Builder] = []
    try:
        archive = folder / "image.tar"
        write_archive(archive)
        made = builders(folder, archive)
        small, large = folder / "small", folder / "large"
        (small / "src").mkdir(parents=True)
        (small / "Dockerfile").write_text(STEPS)
        for number in range(20):
            (small / f"src/{number}.txt").write_text(f"{number}\n" * 100)
        rows: dict[str, dict[str, float]] = {}

        def changed(number: int) -> Path:
            (small / "src/7.txt").write_text(f"round {number} {time.time_ns()}\n")
            return small

        def same(_: int) -> Path:
            return small

        wanted = options.only.split(",")
        if "cold" in wanted:
            rows["cold, ten steps"] = figures(made, options.rounds, same, cached=False)
        if "cached" in wanted:
            figures(made, 1, same, cached=True)
            rows["cached"] = figures(made, options.rounds, same, cached=True)
        if "file" in wanted:
            rows["one file changed"] = figures(made, options.rounds, changed, cached=True)
        if "many" in wanted:
            large.mkdir()
            for number in range(10_000):
                place = large / f"{number % 100}"
                place.mkdir(exist_ok=True)
                (place / f"{number}.txt").write_text(f"file {number}\n" * 20)
            (large / "Dockerfile").write_text(MANY)
            rows["10,000 files, cold"] = figures(made, options.rounds, lambda _: large, cached=False)
            rows["10,000 files, cached"] = figures(made, options.rounds, lambda _: large, cached=True)
        names = [each.name for each in made]
        print("| ms | " + " | ".join(names) + " | of the fastest other |")
        print("| --- |" + " --- |" * (len(names) + 1))
        for title, row in rows.items():
            others = [value for name, value in row.items() if name != "boxship"]
            ratio = f"{row['boxship'] / min(others):.2f}" if others and "boxship" in row else ""
            print(f"| {title} | " + " | ".join(f"{row[name] * 1000:.0f}" for name in names) + f" | {ratio} |")
    finally:
        for each in made:
            each.close()
        with open("/proc/self/mounts", encoding="utf-8") as table:
            for line in reversed(table.readlines()):
                if (point := line.split()[1]).startswith(f"{folder}/"):
                    subprocess.run(["umount", "-l", point], check=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
