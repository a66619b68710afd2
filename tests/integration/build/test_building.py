"""Dockerfiles carried out by a daemon: what the image holds, what the cache knows, what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, daemon
from support.docker_registry import Server
from support.image import NAME, write_archive

pytestmark = pytest.mark.root


class Builder:
    """A daemon and contexts for it."""

    def __init__(self, engine: Daemon, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.context = folder / "context"
        self.environ = {**os.environ, "BOXSHIP_HOST": f"unix://{engine.state}/docker.sock"}

    def box(self, *words: str | Path, code: int = 0, stdin: bytes = b"", **environ: str) -> str:
        """The command: what it prints on both streams."""
        done = subprocess.run(
            [sys.executable, "-c", "import sys, os; from boxship.cli.main import main; sys.exit(main(sys.argv[1:], os.environ))",
             *map(str, words)], capture_output=True, input=stdin, timeout=100, env={**self.environ, **environ})
        text = done.stdout.decode() + done.stderr.decode()
        assert done.returncode == code, text
        return text

    def file(self, name: str, text: str = "", mode: int = 0o644) -> Path:
        """A file of the context."""
        path = self.context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def build(self, dockerfile: str, *flags: str | Path, code: int = 0, **environ: str) -> str:
        """boxship build of the context with this Dockerfile."""
        self.file("Dockerfile", dockerfile)
        return self.box("build", *flags, self.context, code=code, **environ)

    def files(self, dockerfile: str, *flags: str | Path) -> dict[str, tarfile.TarInfo]:
        """The members of the image's files, by name."""
        target = self.folder / "out.tar"
        self.build(dockerfile, "-o", f"type=tar,dest={target}", *flags)
        with tarfile.open(target) as archive:
            return {member.name: member for member in archive.getmembers()}

    def config(self, name: str) -> dict[str, object]:
        """The image's configuration as inspect shows it."""
        found: dict[str, object] = json.loads(self.box("image", "inspect", name))[0]
        return found


@pytest.fixture(scope="module")
def engine() -> Iterator[Daemon]:
    with daemon() as made:
        made.start()
        archive = made.folder / "image.tar"
        write_archive(archive)
        Builder(made, made.folder).box("load", "-q", "-i", archive)
        yield made
        assert "Traceback" not in made.log.read_text()


@pytest.fixture
def builder(engine: Daemon, tmp_path: Path) -> Builder:
    made = Builder(engine, tmp_path)
    made.context.mkdir()
    return made


def test_a_file_of_many_instructions(builder: Builder) -> None:
    builder.file("a.txt", "hello\n")
    said = builder.build(f"""
FROM {NAME}
ARG WHO=me
ENV FOO=bar WHO_IS=${{WHO}}
WORKDIR /app
COPY a.txt ./data/
RUN echo "$FOO $WHO $PWD $(cat data/a.txt)" > /out && id -u >> /out
LABEL a=b
EXPOSE 80 53/udp
VOLUME /v
USER nobody
STOPSIGNAL SIGINT
HEALTHCHECK --interval=5s CMD true
SHELL ["/bin/sh", "-ec"]
CMD exec cat /out
""", "-t", "many:1", "--build-arg", "WHO=you", "--label", "c=d")
    assert "Successfully tagged many:1" in said
    shown = builder.config("many:1")
    config = shown["Config"]
    assert isinstance(config, dict)
    assert config["Env"] == ["PATH=/bin", "FOO=bar", "WHO_IS=you"]
    assert config["Cmd"] == ["/bin/sh", "-ec", "exec cat /out"]
    assert (config["WorkingDir"], config["User"], config["StopSignal"]) == ("/app", "nobody", "SIGINT")
    assert config["Labels"] == {"a": "b", "c": "d"}
    assert config["ExposedPorts"] == {"80/tcp": {}, "53/udp": {}}
    assert config["Volumes"] == {"/v": {}}
    assert config["Healthcheck"] == {"Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000}
    assert builder.box("run", "--rm", "--network=none", "many:1") == "bar you /app hello\n0\n"


def test_a_second_build_is_the_same_image_out_of_the_cache(builder: Builder) -> None:
    builder.file("src/a.txt", "one")
    dockerfile = f"FROM {NAME}\nRUN echo first > /first\nCOPY src /src\nRUN cat /src/a.txt > /last\n"
    builder.build(dockerfile, "--iidfile", builder.folder / "1")
    os.utime(builder.context / "src/a.txt", (1, 1))
    said = builder.build(dockerfile, "--iidfile", builder.folder / "2")
    assert said.count("Using cache") == 3 and "Running in" not in said
    assert (builder.folder / "1").read_text() == (builder.folder / "2").read_text()
    builder.file("src/a.txt", "two")
    said = builder.build(dockerfile)
    assert said.count("Using cache") == 1 and said.count("Running in") == 1
    builder.file("src/a.txt", "two", 0o755)
    assert builder.build(dockerfile).count("Using cache") == 1
    assert builder.build(dockerfile, "--no-cache").count("Using cache") == 0


def test_two_builds_are_identical_to_the_bit(builder: Builder) -> None:
    builder.file("a", "x")
    dockerfile = f"FROM {NAME}\nARG SOURCE_DATE_EPOCH\nWORKDIR /w\nCOPY a /w/\nRUN mkdir -p d/e && echo y > d/e/f && rm /etc/hostname\n"
    digests = set()
    for number in range(2):
        os.utime(builder.context / "a", (1_700_000_000 + number, 1_700_000_000 + number))
        name = f"same:{number}"
        builder.build(dockerfile, "--no-cache", "-t", name, SOURCE_DATE_EPOCH="1600000000")
        shown = builder.config(name)
        digests.add((shown["Id"], json.dumps(shown["RepoDigests"])[-80:].split("@")[-1]))
        assert shown["Created"] == "2020-09-13T12:26:40Z"
        time.sleep(1.1)
    assert len(digests) == 1


def test_a_step_leaves_nothing_behind_but_what_it_wrote(builder: Builder) -> None:
    target = builder.folder / "o.tar"
    builder.build(f"FROM {NAME}\nRUN --mount=type=cache,target=/c/d --mount=type=tmpfs,target=/t touch /c/d/x /t/y; echo 1 > /n\n",
                  "-t", "clean:1")
    builder.box("save", "-o", target, "clean:1")
    with tarfile.open(target) as saved:
        manifest = json.load(saved.extractfile("manifest.json"))[0]  # type: ignore[arg-type]
        layer = saved.extractfile(manifest["Layers"][-1])
        assert layer is not None
        with tarfile.open(fileobj=io.BytesIO(layer.read())) as archive:
            assert archive.getnames() == ["n"]


def test_stages_side_by_side_and_unused_ones_left_out(builder: Builder) -> None:
    started = time.monotonic()
    said = builder.build(f"""
FROM {NAME} AS one
RUN sleep 2; echo 1 > /1
FROM {NAME} AS two
RUN sleep 2; echo 2 > /2
FROM {NAME} AS never
RUN exit 9
FROM one
COPY --from=two --chown=7:8 /2 /there/
COPY --from={NAME} /bin/busybox /bb
RUN cat /1 /there/2; stat -c %u:%g /there/2
""", "--no-cache")
    took = time.monotonic() - started
    assert "1\n2\n7:8\n" in said and "exit 9" not in said
    assert took < 3.9 or os.getloadavg()[0] > 3, took


def test_copying(builder: Builder) -> None:
    for name in ("d/one.c", "d/two.h", "d/e/three.c", "d/.hidden", "top.c", "skip/no"):
        builder.file(name, name)
    (builder.context / "d/link").symlink_to("one.c")
    builder.file(".dockerignore", "skip\n")
    found = builder.files(f"""
FROM {NAME} AS base
FROM scratch
COPY d /plain
COPY top.c /renamed
COPY d/*.c /wild/
COPY --parents d/./e/three.c /parents/
COPY --exclude=*.h d /without/
COPY --chmod=u=rwx,go=r --chown=12:34 top.c /moded
COPY --link top.c /linked/
COPY d/link /followed
COPY . /all
COPY <<-EOF /heredoc
	one
	EOF
""")
    assert {name for name in found if name.startswith("plain")} == {
        "plain", "plain/one.c", "plain/two.h", "plain/e", "plain/e/three.c", "plain/.hidden", "plain/link"}
    assert found["renamed"].isfile() and found["plain/link"].linkname == "one.c" and found["followed"].isfile()
    assert {name for name in found if name.startswith("wild")} == {"wild", "wild/one.c"}
    assert "parents/e/three.c" in found and "without/two.h" not in found and "without/one.c" in found
    moded = found["moded"]
    assert (moded.mode, moded.uid, moded.gid) == (0o744, 12, 34)
    assert "linked/top.c" in found and found["heredoc"].size == 4
    assert "all/skip/no" not in found and "all/top.c" in found and "all/Dockerfile" in found


def test_archives_and_urls(builder: Builder) -> None:
    with tarfile.open(builder.context / "a.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("inside/file")
        entry.size, entry.uid = 2, 5
        archive.addfile(entry, io.BytesIO(b"ab"))
    builder.file("broken.gz", "not really")
    found = builder.files("FROM scratch\nADD a.tar.gz /unpacked/\nADD broken.gz /\nCOPY a.tar.gz /kept\n")
    assert found["unpacked/inside/file"].uid == 5
    assert found["broken.gz"].isfile() and found["kept"].isfile()
    said = builder.build("FROM scratch\nADD http://127.0.0.1:9/x /x\n", code=1)
    assert "failed to fetch http://127.0.0.1:9/x" in said


def test_what_base_images_trigger(builder: Builder) -> None:
    builder.file("f", "1")
    builder.build(f"FROM {NAME}\nONBUILD COPY f /f\nONBUILD RUN cat /f > /g\nENTRYPOINT [\"x\"]\nCMD [\"y\"]\n", "-t", "trigger:1")
    said = builder.build("FROM trigger:1\nENTRYPOINT [\"z\"]\nRUN cat /g\n", "-t", "triggered:1")
    assert "# Executing 2 build triggers" in said
    config = builder.config("triggered:1")["Config"]
    assert isinstance(config, dict)
    assert not config["OnBuild"] and config["Entrypoint"] == ["z"] and not config["Cmd"]


def test_mounts_of_a_step(builder: Builder) -> None:
    builder.file("in/data", "of the context\n")
    dockerfile = f"""
FROM {NAME} AS other
RUN echo of the stage > /s
FROM {NAME}
RUN --mount=type=bind,source=in,target=/in --mount=type=bind,from=other,source=/s,target=/s \\
    --mount=type=cache,id=c1,target=/cache cat /in/data /s; echo x >> /cache/n; wc -l < /cache/n; touch /in/z || true
RUN ls / && test ! -e /in && test ! -e /cache
"""
    said = builder.build(dockerfile, "--no-cache")
    assert "of the context\nof the stage\n" in said and "Read-only file system" in said and "\n1\n" in said
    assert "\n2\n" in builder.build(dockerfile, "--no-cache")


def test_a_secret_is_seen_by_its_step_alone(builder: Builder) -> None:
    value = "s3cret-" + hashlib.sha256(os.urandom(8)).hexdigest()
    (builder.folder / "secret").write_text(value + "\n")
    dockerfile = f"""
FROM {NAME}
RUN --mount=type=secret,id=tok,mode=0444 tr a-z A-Z < /run/secrets/tok > /upper && ! sh -c 'echo > /run/secrets/tok'
RUN --mount=type=secret,id=tok,env=TOK echo "$TOK" | tr a-z A-Z
RUN test -z "$TOK" && test ! -e /run/secrets
"""
    said = builder.build(dockerfile, "--secret", f"id=tok,src={builder.folder}/secret", "-t", "secret:1")
    assert said.count(value.upper()) == 1
    builder.box("history", "--no-trunc", "secret:1")
    found = subprocess.run(["grep", "-rl", "-a", value, str(builder.engine.folder)], capture_output=True, text=True)
    assert found.stdout == ""
    said = builder.build(dockerfile.replace("mode=0444", "required"), code=1)
    assert "secret tok: not found" in said and "--secret id=tok" in said


def test_errors_point_into_the_dockerfile(builder: Builder) -> None:
    said = builder.build(f"FROM {NAME}\nRUN true\nRUN echo on the way; exit 7\n", code=7)
    assert "on the way" in said and "> 3 | RUN echo on the way; exit 7" in said
    assert "returned a non-zero code: 7" in said
    said = builder.build(f"FROM {NAME}\nRUNN true\n", code=1)
    assert "Dockerfile:2:1: unknown instruction: RUNN" in said and "> 2 | RUNN true" in said and "did you mean RUN?" in said
    said = builder.build(f"FROM {NAME}\nCOPY nothing-like-that /x\n", code=1)
    assert "nothing-like-that" in said and "> 2 | COPY" in said


def test_a_dockerfile_can_make_its_checks_errors(builder: Builder) -> None:
    said = builder.build(f"# check=error=true;skip=StageNameCasing\nFROM {NAME} AS Base\nCMD a\n", code=1)
    assert "lint violation found for rules: JSONArgsRecommended" in said and "> 3 | CMD a" in said
    builder.build(f"# check=error=true;skip=StageNameCasing\nFROM {NAME} AS Base\nCMD [\"a\"]\n")


def test_limits_of_a_step(builder: Builder) -> None:
    said = builder.build(f"FROM {NAME}\nRUN sleep 60\n", "--timeout", "1", code=1)
    assert "longer than 1 seconds" in said
    said = builder.build(f"FROM {NAME}\nRUN b() {{ b | b & }}; b; sleep 1; echo survived\n", "--pids-limit", "30")
    assert "survived" in said or "can't fork" in said
    assert not list((builder.engine.state / "engine/stdio").iterdir())
    assert not list((builder.engine.state / "engine/build").iterdir())


def test_outputs_and_targets(builder: Builder) -> None:
    builder.file("f", "x")
    builder.build("FROM scratch AS a\nCOPY f /a\nFROM scratch\nCOPY f /b\n", "--target", "a", "-o", builder.folder / "dir")
    assert sorted(each.name for each in (builder.folder / "dir").iterdir()) == ["a"]
    named = builder.folder / "named"
    named.mkdir()
    (named / "n").write_text("n")
    found = builder.files("FROM scratch\nCOPY --from=extra n /n\nCOPY f /f\n", "--build-context", f"extra={named}")
    assert set(found) == {"n", "f"}


def test_the_cache_is_seen_and_pruned(builder: Builder) -> None:
    builder.build(f"FROM {NAME}\nRUN echo prune me > /x\n")
    said = builder.box("builder", "prune", "-f", "-a")
    assert "Deleted build cache objects" in said and "Total reclaimed space" in said
    assert builder.build(f"FROM {NAME}\nRUN echo prune me > /x\n").count("Using cache") == 0


def test_a_check_needs_no_engine(builder: Builder) -> None:
    builder.file("Dockerfile", f"FROM {NAME} as one\nMAINTAINER me\nWORKDIR rel\n")
    said = builder.box("build", "--check", builder.context, code=1, BOXSHIP_HOST="unix:///nowhere")
    assert "Dockerfile:2" in said and "MaintainerDeprecated" in said and "warnings found" in said
    builder.file("Dockerfile", f"FROM {NAME}\nRUN true\n")
    assert "no warnings" in builder.box("build", "--check", builder.context, BOXSHIP_HOST="unix:///nowhere")
    builder.file("Dockerfile", f"FROM {NAME}\nRUNN true\n")
    assert "did you mean RUN" in builder.box("build", "--check", builder.context, code=1, BOXSHIP_HOST="unix:///nowhere")


def test_a_stage_of_the_machine_itself(builder: Builder) -> None:
    builder.file("a.txt", "b\na\n")
    found = builder.files(
        "FROM host AS tools\nCOPY a.txt /src/\nRUN sort /src/a.txt > /sorted && touch /usr/bin/new && test -e /usr/bin/new\n"
        "FROM scratch\nCOPY --from=tools /sorted /\n")
    assert set(found) == {"sorted"} and found["sorted"].size == 4
    assert not Path("/usr/bin/new").exists()


def test_the_cache_goes_by_way_of_a_registry(builder: Builder) -> None:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is missing: apt-get install docker-registry")
    server = Server(builder.folder, port=True)
    try:
        builder.file("f", "over the registry\n")
        dockerfile = f"FROM {NAME}\nCOPY f /f\nRUN cat /f > /g\nRUN cat /f /g\n"
        name = f"{server.address}/cache:1"
        assert f"Exported the cache to {name}" in builder.build(dockerfile, "--cache-to", f"type=registry,ref={name}")
        builder.box("builder", "prune", "-af")
        said = builder.build(dockerfile, "--cache-from", name)
        assert "3 results taken" in said and said.count("Using cache") == 3
        said = builder.build(dockerfile, "--cache-from", f"{server.address}/none:1", "--cache-to", "type=local,dest=/x", code=1)
        assert "type=registry" in said
    finally:
        server.stop()


def test_a_step_that_writes_much_waits_for_its_reader(builder: Builder) -> None:
    said = builder.build(f"FROM {NAME}\nRUN yes 0123456789012345678901234567890123456789 | head -n 300000\n", "--no-cache")
    assert said.count("0123456789012345678901234567890123456789\n") == 300_000


def test_what_a_step_writes_over_the_machines_programs_is_in_the_layer(builder: Builder) -> None:
    found = builder.files(
        "FROM host\nRUN echo made > /usr/bin/new && rm /usr/bin/env && echo x > /usr/local/etc/x\n"
        "RUN test -e /usr/bin/new && ! test -e /usr/bin/env\n")
    assert {"usr/bin/new", "usr/local/etc/x"} <= set(found)
    assert Path("/usr/bin/env").exists() and not Path("/usr/local/etc/x").exists()
