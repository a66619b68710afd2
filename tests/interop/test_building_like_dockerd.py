"""The same Dockerfiles built by boxship and by dockerd's classic builder: the files, configurations and layers are the same."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.image import NAME
from support.peers import needs
from support.stage import Stage

PLACES = {".dockerenv", "dev", "dev/console", "dev/pts", "dev/shm", "etc", "etc/hosts", "etc/hostname", "etc/mtab", "etc/resolv.conf",
          "proc", "sys"}
"""What an engine puts into any container to mount on."""
FILES = {
    "copying": f"""FROM {NAME}
WORKDIR /srv/app
COPY app .
COPY app/sub/*.sh /usr/bin/
COPY top ./renamed
COPY ["x y.txt", "/with space/"]
COPY dir /dir
COPY app/link /followed
ADD arc.tar.gz /arc
COPY arc.tar.gz /arc.tar.gz
""",
    "configuration": f"""FROM {NAME}
MAINTAINER me <me@example.org>
ARG V=1
ENV A=$V B="two words" C=${{V:-x}}
ENV OLD style value
LABEL a=1 "b c"="d e"
EXPOSE 80 90/udp
VOLUME ["/data","/d2"]
VOLUME /d3 /d4
WORKDIR /w
WORKDIR rel
USER nobody:nogroup
STOPSIGNAL 9
HEALTHCHECK --interval=1m --retries=2 CMD ["true"]
ONBUILD RUN true
SHELL ["/bin/sh","-xc"]
CMD echo hi
ENTRYPOINT ["/bin/sh","-c"]
""",
    "running": f"""FROM {NAME}
RUN rm -rf /var && mkdir -p /o/p && echo x > /o/p/q && chmod 2750 /o/p && ln -s q /o/p/l && touch /tmp/t && rm /etc/group
RUN rm -rf /o/p && mkdir -p /o/p && touch /o/p/new
RUN ["/bin/sh","-c","echo exec > /e"]
USER nobody
RUN echo u > /tmp/u
""",
    "stages": f"""FROM {NAME} AS b
RUN mkdir /out && echo 1 > /out/a && chmod 600 /out/a
FROM scratch
COPY --from=b /out /out
COPY --from=0 /out/a /
COPY --from=b --chown=3:4 /out/a /owned
COPY --from={NAME} /bin/busybox /bin/sh
""",
}


@pytest.fixture(scope="module")
def engines(stage: Stage, archive: Path) -> Iterator[list[str]]:
    """Addresses: ours, dockerd's."""
    needs("docker", "dockerd")
    ours, other = stage.directory / "ours", stage.directory / "other"
    ours.mkdir()
    other.mkdir()
    started = [
        stage.start(Path(sys.executable).with_name("boxship"), "daemon", "--root", ours / "root", "--state", ours,
                    log=ours / "log"),
        stage.start("dockerd", "--data-root", other / "root", "--exec-root", other / "exec", "--pidfile", other / "pid", "-H",
                    f"unix://{other}/docker.sock", "--iptables=false", "--ip6tables=false", "--bridge=none", log=other / "log"),
    ]
    addresses = [f"unix://{folder}/docker.sock" for folder in (ours, other)]
    for address in addresses:
        stage.eventually(lambda address=address: stage.run("docker", "-H", address, "version", check=False).returncode == 0,
                         timeout=60, why=f"{address} answering")
        stage.out("docker", "-H", address, "load", "-i", archive)
    yield addresses
    for process in started:
        stage.stop(process)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    for name in ("app/a.txt", "app/sub/b.sh", "app/sub/deep/c", "top", "x y.txt", "dir/f1"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "app/sub/b.sh").chmod(0o755)
    (folder / "dir").chmod(0o700)
    (folder / "app/link").symlink_to("a.txt")
    with tarfile.open(folder / "arc.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("in/file")
        entry.size, entry.uid = 2, 7
        archive.addfile(entry, io.BytesIO(b"hi"))
    return folder


def tree(stage: Stage, address: str) -> dict[str, Any]:
    """The image's files: kind, mode, owner, link and content by name."""
    container = stage.out("docker", "-H", address, "create", "same:1", "none")
    target = stage.directory / "export.tar"
    stage.out("docker", "-H", address, "export", "-o", target, container)
    stage.out("docker", "-H", address, "rm", container)
    found = {}
    with tarfile.open(target) as archive:
        for member in archive.getmembers():
            name = member.name.rstrip("/")
            if name not in PLACES:
                file = archive.extractfile(member) if member.isreg() else None
                found[name] = (member.type, member.mode & 0o7777, member.uid, member.gid, member.linkname,
                               file.read() if file is not None else b"")
    return found


def image(stage: Stage, address: str) -> tuple[dict[str, Any], int, str]:
    """(configuration, number of layers, author)."""
    shown = json.loads(stage.out("docker", "-H", address, "image", "inspect", "same:1"))[0]
    config = {key: value for key, value in shown["Config"].items() if value and key not in ("Hostname", "Image")}
    # BuildKit, whose language it is, begins FROM scratch in "/", the classic builder nowhere, which comes to the same.
    if config.get("WorkingDir") == "/":
        del config["WorkingDir"]
    return config, len(shown["RootFS"]["Layers"]), shown["Author"]


@pytest.mark.parametrize("name", FILES)
def test_the_same_image_as_dockerds(stage: Stage, engines: list[str], context: Path, name: str) -> None:
    (context / "Dockerfile").write_text(FILES[name])
    found = []
    for address in engines:
        stage.out("docker", "-H", address, "build", "--network=none", "-t", "same:1", context, env={"DOCKER_BUILDKIT": "0"})
        found.append((image(stage, address), tree(stage, address)))
    (ours, our_files), (theirs, their_files) = found
    assert ours == theirs
    assert our_files.keys() == their_files.keys()
    assert {key for key in our_files if our_files[key] != their_files[key]} == set()
