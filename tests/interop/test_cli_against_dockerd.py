"""Our command and docker's own on one and the same dockerd: the same words give the same text and the same exit code.

What is compared is standard output, standard error and the code, with "docker" read as "boxship". Run with
BOXSHIP_CLI_ORACLE=docker, docker's command is compared with itself: what differs then is a fault of the test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.image import NAME
from support.peers import needs
from support.stage import Stage


@dataclass
class Pair:
    """Both commands against one engine."""

    stage: Stage
    address: str
    folder: Path
    ours: str
    theirs: str

    def env(self) -> dict[str, str]:
        return {"DOCKER_HOST": self.address, "HOME": str(self.folder), "DOCKER_CONFIG": str(self.folder / "config"), "TZ": "UTC"}

    def run(self, program: str, words: list[str], text: str = "") -> tuple[int, str, str]:
        done = self.stage.run(program, *words, check=False, env=self.env(), text=text)
        return done.returncode, done.stdout, done.stderr

    def docker(self, *words: str, text: str = "") -> str:
        """What docker prints; a failure fails the test."""
        code, out, err = self.run(self.theirs, list(words), text)
        assert code == 0, err
        return out.strip()

    def boxship(self, *words: str, text: str = "") -> str:
        """What boxship prints; a failure fails the test."""
        code, out, err = self.run(self.ours, list(words), text)
        assert code == 0, err
        return out.strip()

    def same(self, *words: str, text: str = "") -> tuple[int, str, str]:
        """Fails unless both say the same."""
        for attempt in range(3):
            theirs = self.run(self.theirs, list(words), text)
            ours = self.run(self.ours, list(words), text)
            if _read(theirs) == _read(ours) or attempt == 2:
                break  # "2 seconds ago" may have become "3 seconds ago" in between
        assert _read(ours) == _read(theirs)
        return ours


def _read(answer: tuple[int, str, str]) -> tuple[int, str, str]:
    code, out, err = answer
    # dockerd's own remark about its network.
    err = err.replace("WARNING: IPv4 forwarding is disabled. Networking will not work.\n", "")
    return code, _words(out), _words(err)


def _words(text: str) -> str:
    text = re.sub(r"(?m)^docker: ", "boxship: ", text)
    return re.sub(r"(?<=Usage:  )docker|(?<=['\t])docker(?= [a-z-])|(?<=command: )docker", "boxship", text)


@pytest.fixture(scope="module")
def pair(stage: Stage, archive: Path) -> Iterator[Pair]:
    needs("dockerd", "docker", "containerd", "runc")
    theirs = shutil.which("docker")
    assert theirs
    version = subprocess.run([theirs, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    if int(version.partition(".")[0]) < 28:
        pytest.skip(f"docker's command is of {version}: what is compared with is 28")
    folder = stage.directory / "cli"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "daemon.json").write_text("{}")
    socket = folder / "docker.sock"
    daemon = stage.start(
        "dockerd", "--config-file", folder / "daemon.json", "--host", f"unix://{socket}", "--data-root", folder / "data", "--exec-root",
        folder / "exec", "--pidfile", folder / "pid", "--bridge", "none", "--iptables=false", "--ip-forward=false", log=folder / "log")
    ours = os.environ.get("BOXSHIP_CLI_ORACLE") or str(Path(sys.executable).with_name("boxship"))
    pair = Pair(stage, f"unix://{socket}", folder, ours, theirs)
    try:
        stage.eventually(lambda: pair.run(theirs, ["version"])[0] == 0, timeout=40, why="dockerd answering")
        pair.docker("load", "--input", str(archive))
        pair.docker("tag", NAME, "busybox")
        pair.docker("create", "--network=none", "--name", "made", "--label", "a=b", "--env", "X=y", "busybox", "echo", "made")
        pair.docker("run", "-d", "--network=none", "--name", "up", "--label", "role=up", "busybox", "sleep", "1000")
        script = "echo out; echo err >&2; touch /new; exit 3"
        pair.run(theirs, ["run", "--network=none", "--name", "done", "busybox", "sh", "-c", script])
        for name in ("v10", "v9"):
            pair.docker("volume", "create", "--label", "of=test", name)
        # Nothing of it is made on the machine.
        pair.docker("network", "create", "--config-only", "--label", "of=test", "--subnet", "10.99.0.0/24", "configured")
        yield pair
        for name in pair.docker("ps", "-aq").split():
            pair.run(theirs, ["rm", "-f", name])
    finally:
        stage.stop(daemon)


LISTS = [
    "ps", "ps -a", "ps -aq", "ps -a --no-trunc", "ps -as", "ps -l", "ps -n 1", "ps -n 2 -q", "ps -a --format json", "ps -a --format {{.Names}}",
    "ps -a -f name=up", "ps -a --filter status=exited --filter label=a", "ps -aqf label=role=up", "ps --filter exited=3 -a",
    "container ls -a", "container list", "container ps", "images", "images -q", "images --no-trunc", "images --digests", "images busybox",
    "images -a --format json", "images -f reference=bus*", "images --format {{.Repository}}:{{.Tag}}", "image ls", "images -q --no-trunc",
    "history busybox", "history -q busybox", "history --no-trunc busybox", "history --human=false busybox", "history --format json busybox",
    "system df", "system df -v", "system df --format json", "diff done", "container diff made", "port up", "top up", "top up -o pid,comm",
    "logs done", "logs --tail 1 done", "logs -n 0 done", "logs --since 1h done", "logs --until 1h done", "inspect up", "inspect made busybox",
    "inspect -f {{.State.Status}} up made", "container inspect done", "image inspect busybox",
    "inspect -s made", "inspect --type image busybox", "inspect --type container busybox", "image inspect -f {{.Os}}/{{.Architecture}} busybox",
    "network ls", "network ls -q", "network list --no-trunc", "network ls --format json", "network ls -f name=host", "network ls -f label=of=test",
    "network inspect none configured", "network inspect -f {{.Name}}/{{.Driver}} host", "network ls --format {{.Name}}|{{.IPv4}}|{{.IPv6}}|{{.Internal}}|{{.Labels}}",
    "network ls --format {{.CreatedAt}}", "volume ls", "volume ls -q", "volume list --format json", "volume ls -f label=of=test", "volume ls -f name=v9",
    "volume inspect v9 v10", "volume inspect -f {{.Name}}{{.Labels}} v10", "volume ls --format {{.Name}}|{{.Mountpoint}}|{{.Scope}}|{{.Size}}",
    "volume create v9", "volume create --name v9", "network rm -f nope", "volume rm -f nope", "network prune -f --filter label=no", "volume prune -f --filter label=no",
    "stats --no-stream nope", "wait done", "wait done nope", "info --format {{.Driver}}", "version --format {{.Server.Version}}", "info -f {{.NCPU}}",
]


@pytest.mark.parametrize("words", LISTS)
def test_what_is_shown(pair: Pair, words: str) -> None:
    pair.same(*words.split())


@pytest.mark.parametrize("template", [
    "table {{.ID}}\\t{{.Names}}", "table {{.Names}}\t{{.Status}}", "{{json .}}", "{{.Labels}}", "{{upper .Names}}",
    "{{.Image}} {{.Command}} {{.CreatedAt}} {{.RunningFor}} {{.Ports}} {{.State}} {{.Size}} {{.Mounts}} {{.LocalVolumes}} {{.Networks}}",
    "{{if eq .State \"running\"}}up{{else}}down{{end}}", "{{.Foo}}", "{{", "{{nope}}", "{{println .ID}}", "{{printf \"%s-%s\" .ID .Names}}",
    "{{range $i, $e := split .Names \"\"}}{{$i}}{{$e}} {{end}}",
])
def test_templates_of_lists(pair: Pair, template: str) -> None:
    pair.same("ps", "-a", "--format", template)


@pytest.mark.parametrize("template", [
    "{{.Name}} {{.Id}}", "{{.State.Running}}", "{{json .HostConfig.NetworkMode}}", "{{.Config.Env}}", "{{.Config.Labels}}",
    "{{range .Config.Env}}{{println .}}{{end}}", "{{range $k, $v := .NetworkSettings.Networks}}{{$k}}{{end}}", "{{index .Config.Labels \"a\"}}",
    "{{.Config.Cmd}} {{len .Config.Cmd}}", "{{join .Config.Cmd \" \"}}", "{{.Foo}}", "{{.State.Foo}}", "{{.HostConfig.Binds}}",
    "{{.HostConfig.PortBindings}}", "{{with .State}}{{.Pid}} {{.ExitCode}}{{end}}", "{{.HostConfig.Memory}} {{.HostConfig.Init}}", "{{if .Config.Tty}}t{{end}}",
])
def test_templates_of_inspect(pair: Pair, template: str) -> None:
    pair.same("inspect", "--format", template, "made")


@pytest.mark.parametrize("words", [
    "ps --foo", "ps x", "rm", "ps -n x", "ps -f", "ps -f x", "logs", "run", "run --foo", "nosuch", "container nosuch", "inspect nope", "rm nope",
    "rm -f nope", "stop a b", "kill nope", "logs nope", "rename a", "rename nope b", "top nope", "update nope", "update --memory x up", "start nope",
    "wait", "exec", "exec up", "exec nope ls", "exec made ls", "attach made", "attach nope", "cp a b", "cp nope:/x .", "cp x", "cp up:/nope .",
    "cp up:/a made:/b", "tag nope a:b", "tag busybox A:b", "history nope", "rmi nope", "image rm nope nada", "save", "save nope",
    "load -i /nope", "export nope", "diff nope", "commit nope", "pause made", "unpause up", "port nope", "port up 80", "events --since x",
    "run --memory x busybox", "run -e =x busybox", "run -Zx busybox", "run -p a busybox", "run -p 1:2:3:4 busybox", "run --cpus x busybox",
    "run --restart x:y busybox", "run --restart always --rm busybox", "run --ulimit x busybox", "run --mount x busybox", "run --mount type=bind busybox",
    "run -v ab:b busybox", "run --name up busybox", "run -it busybox", "create --name up busybox", "run --network nope busybox", "run A", "pull A",
    "pull -a busybox:1", "run --pull x busybox", "run --pull never nope", "run -d -a stdout busybox", "exec -t -i up sh", "stop -t x up", "ps --no-trunc=x",
    "system nosuch", "image nosuch", "login", "run --add-host x busybox", "run --device : busybox", "run --env-file /nope busybox", "start -a made up",
    "container prune --filter x", "inspect --type nope up", "kill --signal NOPE up", "run --shm-size x busybox", "run --health-interval x busybox",
    "run --no-healthcheck --health-cmd x busybox", "ps -f foo=bar", "logs --since x up", "import /nope", "run --label",
    "network ls x", "network create", "network create a b", "network rm", "network rm nope nada", "network inspect nope", "network connect none", "network nosuch",
    "network connect nope up", "network connect none nope", "network connect host up", "network disconnect nope up", "network disconnect host up", "network create none",
    "network create --subnet x n", "network create --gateway 10.0.0.1 n", "network create --subnet 10.0.0.0/24 --gateway 10.1.0.1 n", "network prune --filter x",
    "network create --subnet 10.0.0.0/24 --subnet 10.0.0.0/16 n", "network create --driver nope n", "network rm host", "volume rm", "volume rm nope", "volume nosuch",
    "volume inspect nope", "volume create --name a b", "volume create --driver nope v", "volume ls -f x", "volume ls -f foo=bar", "volume create a/b",
    "network ls -f foo=bar", "volume prune x",
    "run --sysctl", "run -a nope busybox", "run --gpus", "wait nope", "pause nope", "restart nope", "create",
])
def test_mistakes(pair: Pair, words: str) -> None:
    code, _, err = pair.same(*words.split())
    assert (code != 0 and err) or words == "rm -f nope"


@pytest.mark.parametrize(("words", "text"), [
    ("run --rm --network=none busybox echo hi", ""), ("run --rm --network=none -i busybox cat", "typed"), ("run --rm --network=none busybox cat", "typed"),
    ("run --rm --network=none busybox sh -c 'echo o; echo e >&2; exit 9'", ""), ("run --rm --network=none busybox nosuch", ""),
    ("run --rm --network=none busybox /etc/passwd", ""), ("run --rm --network=none busybox /nope", ""), ("run --rm --network=none -a stdout busybox sh -c 'echo o; echo e >&2'", ""),
    ("run --rm --network=none -t busybox sh -c 'test -t 1 && echo tty; exit 4'", ""), ("run --rm --network=none --entrypoint echo busybox a b", ""),
    ("run --rm --network=none -w /nowhere -u 1000:1000 -h box busybox sh -c 'pwd; id -u; hostname'", ""), ("run --rm --network=none -e A=1 -e HOME=/x busybox sh -c 'echo $A $HOME'", ""),
    ("run --rm --network=none --read-only --tmpfs /t:size=1m busybox sh -c 'touch /x; touch /t/x && echo ok'", ""),
    ("run --rm --network=none --init busybox ps -o comm", ""), ("run --rm --network=none --ulimit nofile=100:200 busybox sh -c 'ulimit -n; ulimit -Hn'", ""),
    ("run --rm --network=none --pids-limit 50 -m 64m busybox true", ""), ("exec up sh -c 'echo o; echo e >&2; exit 5'", ""), ("exec -i up cat", "typed"), ("exec up cat", "typed"),
    ("exec -e A=b -w /etc -u nobody up sh -c 'echo $A; pwd; id -u'", ""), ("exec up /nope", ""), ("exec -d up true", ""), ("exec -t up sh -c 'test -t 1 && echo tty'", ""),
    ("start -a made", ""), ("start -a done", ""), ("run --rm --network=none --cap-drop ALL busybox sh -c 'grep CapEff /proc/self/status'", ""),
    ("run --rm --network=none --device /dev/null:/dev/x:r busybox ls /dev/x", ""), ("run --rm --network=none --mount type=tmpfs,dst=/m busybox sh -c 'mount | grep -c /m'", ""),
    ("run --rm --network=none -v /etc:/e:ro busybox sh -c 'touch /e/x'", ""), ("run --rm --network=none --volumes-from up busybox true", ""),
])
def test_processes(pair: Pair, words: str, text: str) -> None:
    import shlex

    pair.same(*shlex.split(words), text=text)


CREATED = [
    "--cap-add NET_ADMIN --cap-drop MKNOD", "--memory 100m --memory-reservation 50m --cpu-shares 5 --cpus 1.5 --cpuset-cpus 0 --pids-limit 9",
    "--restart on-failure:3", "--restart unless-stopped", "-v /tmp:/t -v /var/tmp:/v:ro --tmpfs /x:size=1m --mount type=bind,src=/etc,dst=/e,readonly",
    "-p 80 -p 127.0.0.1:8080:81/udp -p 90-92:90-92 --expose 7 --expose 9-10/udp", "-P --expose 99", "-l a=b -l c --label d=", "-e A=b -e C= -e HOME",
    "--hostname h --domainname d --user 1:2 -w /w --stop-signal TERM --stop-timeout 5", "-i -t", "-i", "-a stdout", "--entrypoint x", "--entrypoint=",
    "--health-cmd true --health-interval 5s --health-retries 3 --health-timeout 1m --health-start-period 2s", "--no-healthcheck",
    "--dns 1.1.1.1 --dns-search a.b --dns-option x --add-host a:1.2.3.4", "--ulimit nofile=10:20 --ulimit core=0", "--sysctl net.core.somaxconn=5",
    "--log-driver none", "--log-opt max-size=1m --log-opt max-file=2", "--privileged --init --read-only --oom-score-adj 5", "--security-opt no-new-privileges",
    "--security-opt seccomp=unconfined", "--device /dev/null --device /dev/zero:/dev/z:rw --device-cgroup-rule 'c 1:3 r'", "--group-add 5 --group-add 6",
    "--ipc private --pid host --uts host --cgroupns private --userns host", "--shm-size 1m --cgroup-parent /x", "--network host", "--network none",
    "--rm", "--volumes-from up", "--blkio-weight 100 --device-read-bps /dev/null:1mb --device-write-iops /dev/null:5", "--oom-kill-disable",
    "--mount type=volume,dst=/v,volume-nocopy --mount type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=1770", "-v vol:/v", "-v /anon", "--init=false",
    "--publish 127.0.0.1::5", "--memory 10m --memory-swap -1",
]


@pytest.mark.parametrize("flags", CREATED)
def test_flags_of_create_mean_the_same_to_the_engine(pair: Pair, flags: str) -> None:
    import shlex

    answers = []
    for program in (pair.theirs, pair.ours):
        code, out, err = pair.run(program, ["create", "--name", "flags", *shlex.split(flags), "busybox", "a", "-b"])
        if code == 0:
            found = json.loads(pair.docker("inspect", "flags"))[0]
            pair.docker("rm", "-v", "flags")
            anonymous = {m["Name"]: m["Destination"] for m in found["Mounts"] if len(m.get("Name", "")) == 64}
            kept = {key: found[key] for key in ("Config", "HostConfig", "Path", "Args")}
            kept["Config"]["Hostname"] = "" if found["Id"].startswith(kept["Config"]["Hostname"] or "-") else kept["Config"]["Hostname"]
            answers.append((code, json.dumps(kept, sort_keys=True), sorted(anonymous.values()), err))
        else:
            answers.append((code, _words(out), [], _words(err)))
    theirs, ours = answers
    assert json.loads(ours[1] or "null") == json.loads(theirs[1] or "null")
    assert ours == theirs


def test_a_life(pair: Pair) -> None:
    """What changes something is done by each of the commands, on a container of its own."""
    steps = ["create --network=none --name {} -t busybox sleep 1000", "start {}", "pause {}", "unpause {}", "restart -t 0 {}", "rename {} {}2", "update -m 32m --memory-swap 64m {}2",
             "stop -t 0 {}2", "start {}2", "kill -s KILL {}2", "wait {}2", "commit -m hi -c 'CMD x' {}2 made:{}", "rm {}2", "tag made:{} made:{}x", "rmi made:{}x", "image rm made:{}", "rm {}2"]
    import shlex

    for step in steps:
        answers = []
        for program, name in ((pair.theirs, "theirs"), (pair.ours, "their0")):
            code, out, err = pair.run(program, shlex.split(step.replace("{}", name)))
            answers.append((code, re.sub(r"[0-9a-f]{64}", "ID", _words(out)).replace(name, "NAME"), re.sub(r"[0-9a-f]{64}", "ID", _words(err)).replace(name, "NAME")))
        assert answers[1] == answers[0], step


def test_copies(pair: Pair, tmp_path: Path) -> None:
    for program in (pair.theirs, pair.ours):
        name = f"{pair.folder}/{Path(program).name}"
        source = Path(name)
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "file").write_text("content")
        (source / "link").symlink_to("sub/file")
        assert pair.run(program, ["cp", str(source), "up:/tmp"])[0] == 0
        assert pair.run(program, ["cp", f"{source}/sub/file", f"up:/tmp/{source.name}/renamed"])[0] == 0
        assert pair.run(program, ["cp", f"{source}/sub/.", f"up:/tmp/{source.name}-contents"])[0] == 0
        assert pair.docker("exec", "up", "sh", "-c", f"cd /tmp/{source.name} && cat sub/file renamed link && readlink link; cat ../{source.name}-contents/file") == \
            "contentcontentcontentsub/file\ncontent"
        assert pair.run(program, ["cp", f"up:/tmp/{source.name}", f"{name}-back"])[0] == 0
        assert Path(f"{name}-back/sub/file").read_text() == "content" and os.readlink(f"{name}-back/link") == "sub/file"
        assert pair.run(program, ["cp", f"up:/tmp/{source.name}/.", f"{name}-back2"])[0] == 0
        assert Path(f"{name}-back2/renamed").read_text() == "content"
        (Path(f"{name}-there")).mkdir()
        assert pair.run(program, ["cp", f"up:/tmp/{source.name}/renamed", f"{name}-there"])[0] == 0
        assert Path(f"{name}-there/renamed").read_text() == "content"
    out = pair.stage.run("sh", "-c", f"{pair.ours} cp up:/etc/passwd - | tar -xO", env=pair.env()).stdout
    assert out.startswith("root:")


def test_archives(pair: Pair) -> None:
    saved, exported = pair.folder / "saved.tar", pair.folder / "exported.tar"
    pair.boxship("save", "-o", str(saved), "busybox", NAME)
    assert "manifest.json" in tarfile.open(saved).getnames()
    assert "Loaded image: busybox:latest" in pair.boxship("load", "-i", str(saved))
    pair.boxship("export", "-o", str(exported), "up")
    assert any(name.endswith("bin/busybox") for name in tarfile.open(exported).getnames())
    assert pair.boxship("import", "-c", "CMD [\"x\"]", str(exported), "imported:1").startswith("sha256:")
    assert pair.docker("inspect", "-f", "{{.Config.Cmd}}", "imported:1") == "[x]"
    pair.boxship("rmi", "imported:1")


def test_a_terminal_is_one_inside_has_our_size_and_can_be_left(pair: Pair) -> None:
    code, screen = pair.stage.typing(pair.ours, "run", "--rm", "--network=none", "-it", "busybox", "sh", types="tty; echo $((6*7)); exit 5\n", until="/ #", env=pair.env())
    assert code == 5 and "/dev/pts/0" in screen and "42" in screen
    code, screen = pair.stage.typing(pair.ours, "run", "--network=none", "--name", "left", "-it", "busybox", "sh", types="\x10\x11", until="/ #", env=pair.env())
    assert (code, "read escape sequence" in screen) == (0, True)
    assert pair.docker("inspect", "-f", "{{.State.Running}}", "left") == "true"
    code, screen = pair.stage.typing(pair.ours, "exec", "-it", "left", "sh", types="exit 6\n", until="/ #", env=pair.env())
    assert code == 6
    pair.docker("rm", "-f", "left")


def test_signals_are_passed_on(pair: Pair) -> None:
    process = pair.stage.start("env", *[f"{key}={value}" for key, value in pair.env().items()], pair.ours, "run", "--rm", "--network=none", "--name", "trap", "busybox", "sh", "-c",
                               "trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done", log=pair.folder / "trap.log")
    pair.stage.eventually(lambda: "ready" in (pair.folder / "trap.log").read_text(), why="the container running")
    # What was started joins the stage, and the command is its child.
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGUSR1)
    assert process.wait(20) == 9


def test_statistics_and_events(pair: Pair) -> None:
    head, line = pair.boxship("stats", "--no-stream", "up").splitlines()
    assert (head.split("   ")[0] == "CONTAINER ID" and "up" in line and "MiB" in line) or "KiB" in line
    assert set(json.loads(pair.boxship("stats", "--no-stream", "--format", "json", "up"))) == set(json.loads(pair.docker("stats", "--no-stream", "--format", "json", "up")))
    pair.same("events", "--since", "1h", "--until", "0s", "--filter", "container=up")
    pair.same("events", "--since", "1h", "--until", "0s", "--filter", "container=up", "--format", "{{.Action}} {{.Actor.ID}} {{.Type}}")
    words = ["events", "--since", "1h", "--until", "0s", "--filter", "container=up", "--format", "json"]
    ours, theirs = ([json.loads(line) for line in pair.run(which, words)[1].splitlines()] for which in (pair.ours, pair.theirs))
    assert ours == theirs


def test_nobody_is_there(pair: Pair) -> None:
    nobody = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    for words, code in ((["ps"], 1), (["run", "busybox"], 125)):
        done = pair.stage.run(pair.ours, *words, check=False, env=nobody)
        theirs = pair.stage.run(pair.theirs, *words, check=False, env=nobody)
        assert done.returncode == theirs.returncode == code
        assert done.stderr == _words(theirs.stderr)
