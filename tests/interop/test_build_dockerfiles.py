"""Dockerfiles in the shape of well-known projects', built here and by a real dockerd: the same files, the same configuration.

The peer is the BuildKit inside Debian's dockerd 20.10, driven by its own command. The base is an image of Debian's busybox; the
Dockerfiles are written for it, in the way that those of the projects named are written.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.daemon import Daemon, daemon
from support.image import NAME
from support.peers import needs
from support.stage import Stage

DEBIAN_DOCKER = "/usr/bin/docker"
"""The last of Docker's commands that speaks BuildKit's protocol without a plug-in."""

# What an engine itself puts into a container that is only created.
_OF_ENGINES = frozenset((".dockerenv", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab"))
_FIELDS = ("User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal", "Healthcheck",
           "OnBuild", "Shell")


class Case(NamedTuple):
    """A Dockerfile with its context."""

    text: str
    flags: tuple[str, ...] = ()
    before: str = ""
    """A Dockerfile whose image, `before`, it begins with."""


CASES = {
    # redis, memcached: a user of their own, one long step with comments in it, a volume, an entry point
    "server": Case(f"""
FROM {NAME}
RUN echo 'redis:x:999:' >> /etc/group && echo 'redis:x:999:999::/:/bin/false' >> /etc/passwd
ENV GOSU_VERSION 1.17
ENV REDIS_VERSION=7.2.4 \\
    REDIS_SHA=8d104c26a154b29fd67d6568b4f375212212ad41e0c2caa3d66480e78dbd3b59
RUN set -eux; \\
	savedSomething="$(echo a b)"; \\
	\\
# a comment of the build's
	mkdir -p /usr/src/redis /usr/local/bin; \\
	echo "$REDIS_VERSION $REDIS_SHA $GOSU_VERSION $savedSomething" > /usr/local/bin/redis-server; \\
	busybox chmod 755 /usr/local/bin/redis-server; \\
	rm -r /usr/src/redis
RUN mkdir /data && busybox chown redis:redis /data
VOLUME /data
WORKDIR /data
COPY docker-entrypoint.sh /usr/local/bin/
ENTRYPOINT ["docker-entrypoint.sh"]
EXPOSE 6379
CMD ["redis-server"]
"""),
    # nginx, httpd: links for logs, a signal, JSON with spaces
    "web": Case(f"""
FROM {NAME}
LABEL maintainer="Web Maintainers <docker@web.example>" org.opencontainers.image.title='a "web" server'
ENV PKG_RELEASE   1~bookworm
RUN set -x \\
    && mkdir -p /var/log/web /etc/web/conf.d \\
    && busybox ln -sf /dev/stdout /var/log/web/access.log \\
    && busybox ln -sf /dev/stderr /var/log/web/error.log
COPY conf/*.conf /etc/web/conf.d/
COPY static /usr/share/web/html
EXPOSE 80 443/tcp 8000-8002/udp
STOPSIGNAL SIGQUIT
CMD ["web", "-g", "daemon off;"]
"""),
    # postgres, mariadb: ENV that uses ENV, permissions, sed on a file of the image
    "database": Case(f"""
FROM {NAME}
ENV LANG en_US.utf8
RUN mkdir /docker-entrypoint-initdb.d
ENV MAJOR 16
ENV VERSION ${{MAJOR}}.2-1.pgdg120+2
ENV PATH $PATH:/usr/lib/postgresql/$MAJOR/bin
RUN mkdir -p /usr/share/db /var/run/db && echo "#listen_addresses = 'localhost'" > /usr/share/db/conf.sample \\
 && sed -i "s!^#?(listen_addresses)\\s*=\\s*\\S+.*!\\1 = '*'!" /usr/share/db/conf.sample && busybox chmod 3777 /var/run/db
ENV PGDATA /var/lib/db/data
RUN mkdir -p "$PGDATA" && busybox chown -R 999:999 "$PGDATA" && busybox chmod 1777 "$PGDATA"
VOLUME ["/var/lib/db/data", "/backup"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=1m --retries=5 CMD pg_isready -U "$USER" || exit 1
STOPSIGNAL SIGINT
CMD db --listen "*"
"""),
    # Python services: requirements first, then the code, by a user without rights
    "python": Case(f"""
# syntax-less on purpose
ARG PYTHON_VERSION=3.12
FROM {NAME} AS base
ARG PYTHON_VERSION
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \\
    PIP_NO_CACHE_DIR=off VERSION="$PYTHON_VERSION"

FROM base AS builder
WORKDIR /build
COPY requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \\
    mkdir -p /install/lib && sort requirements.txt > /install/lib/installed && echo cached > /root/.cache/pip/x

FROM base
WORKDIR /app
COPY --from=builder /install /usr/local
COPY --chown=65534:65534 app/ ./app/
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt wc -l < /tmp/requirements.txt > /app/count
USER nobody
EXPOSE 8000
ENTRYPOINT ["python", "-m"]
CMD ["app", "--port=8000"]
""", ("--build-arg", "PYTHON_VERSION=3.13")),
    # Node applications: three stages, one of them not used
    "node": Case(f"""
FROM {NAME} AS deps
WORKDIR /app
COPY package.json package-lock.json* ./
RUN mkdir node_modules && cp package.json node_modules/.lock

FROM {NAME} AS lint
RUN exit 1

FROM deps AS build
COPY . .
RUN mkdir -p dist && cat static/index.html package.json > dist/bundle.js && rm -r conf

FROM {NAME} AS runner
ENV NODE_ENV=production
WORKDIR /app
RUN echo 'nodejs:x:1001:' >> /etc/group && echo 'next:x:1002:1001::/:/bin/false' >> /etc/passwd
COPY --from=deps --chown=next:nodejs /app/node_modules ./node_modules
COPY --from=build /app/dist ./dist
USER next
CMD ["node", "dist/bundle.js"]
"""),
    # Go programs: built for the platform of the builder, put into nothing
    "go": Case(f"""
FROM --platform=$BUILDPLATFORM {NAME} AS build
ARG TARGETOS TARGETARCH
ARG LDFLAGS="-s -w"
WORKDIR /src
COPY go.mod ./
RUN mkdir -p /out/etc && echo "GOOS=$TARGETOS GOARCH=$TARGETARCH $LDFLAGS $(cat go.mod)" > /out/app && busybox chmod 0755 /out/app
RUN echo 'nobody:x:65534:65534::/:' > /out/etc/passwd

FROM scratch
LABEL org.opencontainers.image.source=https://git.example/app
COPY --from=build /out/etc/passwd /etc/passwd
COPY --from=build /out/app /app
USER 65534:65534
EXPOSE 8080/tcp
VOLUME ["/tmp"]
ENTRYPOINT ["/app"]
"""),
    # Jenkins, SonarQube: arguments for users and directories
    "arguments": Case(f"""
FROM {NAME}
ARG user=jenkins
ARG group=jenkins
ARG uid=1000
ARG gid=1000
ARG http_port=8080
ARG JENKINS_HOME=/var/jenkins_home
ENV JENKINS_HOME $JENKINS_HOME
ENV JENKINS_SLAVE_AGENT_PORT=${{agent_port:-50000}}
RUN mkdir -p $JENKINS_HOME && busybox chown ${{uid}}:${{gid}} $JENKINS_HOME \\
  && echo "${{group}}:x:${{gid}}:" >> /etc/group && echo "${{user}}:x:${{uid}}:${{gid}}::$JENKINS_HOME:/bin/sh" >> /etc/passwd
VOLUME $JENKINS_HOME
EXPOSE ${{http_port}} ${{JENKINS_SLAVE_AGENT_PORT}}
ENV COPY_REFERENCE_FILE_LOG $JENKINS_HOME/copy_reference_file.log
COPY docker-entrypoint.sh /usr/local/bin/jenkins.sh
USER ${{user}}
WORKDIR ${{JENKINS_HOME}}/work
RUN id -un > who
LABEL "what is"="it's ${{user}}" uid=${{uid}}
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/jenkins.sh"]
""", ("--build-arg", "uid=1234", "--build-arg", "http_port=9090")),
    # images for other images
    "onbuild": Case("""
FROM before
ENV B=2
CMD ["run"]
""", before=f"""
FROM {NAME}
RUN mkdir -p /usr/src/app
WORKDIR /usr/src/app
ONBUILD ARG ENVIRONMENT=production
ONBUILD ENV ENVIRONMENT $ENVIRONMENT
ONBUILD COPY requirements.txt /usr/src/app/
ONBUILD RUN echo "$ENVIRONMENT" > built && cat requirements.txt >> built
ONBUILD COPY app /usr/src/app
"""),
    # WordPress, phpMyAdmin: archives that are unpacked, and what replaces what
    "archives": Case(f"""
FROM {NAME}
WORKDIR /var/www
ADD wordpress.tar.gz /usr/src/
ADD wordpress.tar.gz package.json /opt/both/
COPY wordpress.tar.gz /usr/src/as-it-is.tar.gz
COPY --chown=33:33 static/ html/
COPY app/main.py html/index.html
RUN rm html/style.css && busybox ln -s index.html html/start.html
COPY conf html/conf
"""),
    # Traefik, Grafana: bases out of arguments, the shell, a path that grows
    "bases": Case(f"""
ARG BASE={NAME}
ARG TOOLS=${{BASE}}
FROM ${{TOOLS}} as Tools
SHELL ["/bin/sh", "-euxc"]
RUN echo "tools" > /tool

FROM ${{BASE}}
ARG GF_UID="472"
ARG GF_GID="0"
ENV PATH="/usr/share/grafana/bin:$PATH" \\
    GF_PATHS_CONFIG="/etc/grafana/grafana.ini" \\
    GF_PATHS_DATA="/var/lib/grafana"
WORKDIR $GF_PATHS_DATA
WORKDIR dashboards/../home
COPY --from=tools /tool /usr/share/grafana/bin/
SHELL ["/bin/sh", "-c"]
RUN pwd > "$GF_PATHS_DATA/pwd" && busybox chown -R "$GF_UID:$GF_GID" "$GF_PATHS_DATA"
EXPOSE 3000
USER "$GF_UID"
ENTRYPOINT [ "/run.sh" ]
"""),
    # files written for both kinds of system
    "escape": Case(f"""# escape=`

FROM {NAME}
ENV HOME_OF="C:\\Users" `
    MORE='a\\b'
RUN echo one `
 && echo two > /two
LABEL path="C:\\dir\\" a=b`$c
CMD ["a\\\\b"]
"""),
    # modes and owners, names with spaces, whole trees
    "copies": Case(f"""
FROM {NAME} AS one
RUN mkdir -p /a/b/c && echo 1 > /a/b/c/f && busybox ln -s c/f /a/b/l && busybox chown -h 5:6 /a/b/l && busybox chmod 4755 /a/b/c/f
FROM {NAME}
COPY --from=one /a /copied
COPY --from=one /a/b/l /file
COPY --from=one /a/b/c/f /a/b/l /dir/
COPY ["with space/a file", "package.json", "/to here/"]
COPY stat[i]c/*.??? /some/
COPY . /all
RUN rm -r /copied/b/c && mkdir -p /copied/b/c && busybox chmod 700 /copied/b/c && echo 2 > /copied/b/c/g
COPY --from=one /a/b/c /copied/b/c
USER 7:8
WORKDIR /made/by
"""),
}


def fill(context: Path) -> None:
    """The context that all of them share."""
    files = {
        "docker-entrypoint.sh": "#!/bin/sh\nset -e\nexec \"$@\"\n", "conf/default.conf": "server {}\n", "conf/tls.conf": "tls on;\n",
        "conf/notes.md": "no\n", "static/index.html": "<h1>it works</h1>\n", "static/style.css": "h1 {}\n", "static/img/logo.svg": "<svg/>\n",
        "requirements.txt": "flask\naiohttp\n", "app/main.py": "print(1)\n", "app/__init__.py": "", "app/pkg/mod.py": "x = 1\n",
        "package.json": "{}\n", "go.mod": "module x\n", "with space/a file": "spaced\n", "ignored.log": "no\n", ".git/config": "no\n",
        ".dockerignore": "**/*.log\n.git\nconf/*.md\n*.tmp\n!keep.tmp\n", "x.tmp": "no\n", "keep.tmp": "yes\n",
    }
    for name, text in files.items():
        path = context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if name.endswith(".sh") else 0o644)
    (context / "static/img").chmod(0o750)
    os.symlink("main.py", context / "app/link.py")
    with tarfile.open(context / "wordpress.tar.gz", "w:gz") as archive:
        for name, mode, text in (("wordpress/index.php", 0o640, "<?php\n"), ("wordpress/wp-content/x", 0o600, "x\n")):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid, member.gid = len(text), mode, 33, 34
            archive.addfile(member, io.BytesIO(text.encode()))


class Engines:
    """Ours and the peer, with the base image in both."""

    def __init__(self, ours: Daemon, stage: Stage, host: str, folder: Path) -> None:
        self._environ = {**os.environ, "BOXSHIP_HOST": f"unix://{ours.state}/docker.sock"}
        self._stage = stage
        self._env = {"DOCKER_HOST": host, "HOME": str(folder), "DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain"}

    def box(self, *words: str | Path) -> str:
        """Our command."""
        code = "import sys, os; from boxship.cli.main import main; sys.exit(main(sys.argv[1:], os.environ))"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=100, env=self._environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def docker(self, *words: str | Path) -> str:
        """The peer's command."""
        return self._stage.out(DEBIAN_DOCKER, *words, env=self._env)


@pytest.fixture(scope="module")
def engines(stage: Stage, archive: Path) -> Iterator[Engines]:
    needs("dockerd", "containerd", "runc")
    version = subprocess.run([DEBIAN_DOCKER, "--version"], capture_output=True, text=True).stdout if shutil.which(DEBIAN_DOCKER) else ""
    if "version 20." not in version:
        pytest.skip(f"{DEBIAN_DOCKER} is not Docker 20.10, which needs no plug-in for BuildKit: apt-get install docker.io")
    folder = stage.directory / "b"
    folder.mkdir()
    (folder / "daemon.json").write_text("{}")
    socket = folder / "d.sock"
    peer = stage.start(
        "/usr/sbin/dockerd", "--config-file", folder / "daemon.json", "--host", f"unix://{socket}", "--data-root", folder / "data",
        "--exec-root", folder / "exec", "--pidfile", folder / "pid", "--bridge", "none", "--iptables=false", "--ip-forward=false",
        log=folder / "log")
    with daemon() as ours:
        ours.start()
        made = Engines(ours, stage, f"unix://{socket}", folder)
        stage.eventually(
            lambda: stage.run(DEBIAN_DOCKER, "version", check=False, env={"DOCKER_HOST": f"unix://{socket}"}).returncode == 0,
            timeout=40, why="dockerd answering")
        made.docker("load", "--input", archive)
        made.box("load", "--quiet", "--input", archive)
        yield made
        stage.stop(peer)


def tree(archive: Path) -> dict[str, tuple[object, ...]]:
    """What there is, without times."""
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            name = member.name.removeprefix("./").rstrip("/")
            if not name or name == "." or name in _OF_ENGINES or name.startswith(("dev/", "proc/", "sys/")):
                continue
            data = opened.extractfile(member) if member.isreg() else None
            found[name] = (
                member.type, oct(member.mode & 0o7777), member.uid, member.gid, member.linkname,
                hashlib.sha256(data.read()).hexdigest()[:16] if data is not None else "")
    # A directory that an engine makes for its own files is no one's.
    for name in ("dev", "proc", "sys", "etc"):
        if name in found and found[name][0] == tarfile.DIRTYPE and not any(other.startswith(f"{name}/") for other in found):
            del found[name]
    return found


def config(shown: str) -> dict[str, Any]:
    """What inspect says of the configuration; nothing and empty are alike."""
    found = json.loads(shown)[0]["Config"]
    return {name: found[name] for name in _FIELDS if found.get(name)}


@pytest.mark.parametrize("name", CASES)
def test_the_same_files_and_the_same_configuration(engines: Engines, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    context = tmp_path / "context"
    fill(context)
    images = (("before", case.before), (f"case-{name}", case.text)) if case.before else ((f"case-{name}", case.text),)
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    for image, text in images:
        (context / "Dockerfile").write_text(text.lstrip("\n"))
        flags = case.flags if image != "before" else ()
        engines.docker("build", "--quiet", "--network", "none", "--tag", image, *flags, context)
        engines.box("build", "--quiet", "--network", "none", "--tag", image, "--output", f"type=tar,dest={ours}", *flags, context)
    container = engines.docker("create", "--network", "none", f"case-{name}", "x")
    engines.docker("export", "--output", theirs, container)
    engines.docker("rm", container)
    assert tree(ours) == tree(theirs)
    wanted = config(engines.docker("image", "inspect", f"case-{name}"))
    assert config(engines.box("image", "inspect", f"case-{name}")) == wanted
