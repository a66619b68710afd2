"""What the engine's configuration changes, seen through the docker CLI: the API over TCP, who may use the socket, devices by CDI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.image import NAME
from support.peers import needs
from support.stage import Stage

PORT, OPEN = 23760, 23750


def certificates(folder: Path) -> None:
    """A CA, a server's certificate for 127.0.0.1, a client's, and one of another CA."""
    needs("openssl")

    def openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)

    for ca in ("ca", "stranger"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={ca}",
                "-keyout", folder / f"{ca}-key.pem", "-out", folder / f"{ca}.pem")
    (folder / "server.ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
    (folder / "client.ext").write_text("extendedKeyUsage=clientAuth\n")
    for name, ca, kind in (("server", "ca", "server"), ("client", "ca", "client"), ("guest", "stranger", "client")):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
                "-keyout", folder / f"{name}-key.pem", "-out", folder / f"{name}.csr")
        openssl("x509", "-req", "-days", "2", "-in", folder / f"{name}.csr", "-CA", folder / f"{ca}.pem", "-CAkey",
                folder / f"{ca}-key.pem", "-CAcreateserial", "-extfile", folder / f"{kind}.ext", "-out", folder / f"{name}.pem")


def start(stage: Stage, folder: Path, text: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(text)
    daemon = stage.start(
        Path(sys.executable).with_name("boxship"), "daemon", "--config", folder / "config.toml", "--root", folder / "root",
        "--state", folder, log=folder / "log")
    local = ["docker", "--host", f"unix://{folder}/docker.sock"]
    stage.eventually(lambda: stage.run(*local, "version", check=False).returncode == 0, timeout=40, why="the engine answering")
    return daemon


@pytest.fixture(scope="module")
def folder(stage: Stage, archive: Path) -> Iterator[Path]:
    needs("docker")
    folder = stage.directory / "tls"
    folder.mkdir()
    certificates(folder)
    (folder / "cdi").mkdir()
    (folder / "cdi" / "vendor.json").write_text(json.dumps({
        "cdiVersion": "0.6.0", "kind": "vendor.example/gadget", "devices": [{"name": "null", "containerEdits": {
            "env": ["GADGET=yes"], "deviceNodes": [{"path": "/dev/gadget", "hostPath": "/dev/null"}]}}]}))
    daemon = start(stage, folder, f"""
[docker]
group = "nogroup"
tcp = "127.0.0.1:{PORT}"
tls_ca = "{folder}/ca.pem"
tls_cert = "{folder}/server.pem"
tls_key = "{folder}/server-key.pem"
[engine]
cdi_directories = ["{folder}/cdi"]
""")
    stage.run("docker", "--host", f"unix://{folder}/docker.sock", "load", "--input", archive)
    yield folder
    stage.stop(daemon)
    assert "Traceback" not in (folder / "log").read_text()


def remote(folder: Path, name: str = "client") -> list[str]:
    return ["docker", "--host", f"tcp://127.0.0.1:{PORT}", "--tlsverify", "--tlscacert", f"{folder}/ca.pem",
            "--tlscert", f"{folder}/{name}.pem", "--tlskey", f"{folder}/{name}-key.pem"]


def test_over_tls_input_ends_and_the_output_still_comes(stage: Stage, folder: Path) -> None:
    text = "b\na\n" * 50_000
    done = stage.run(*remote(folder), "run", "--rm", "--interactive", "--network=none", NAME, "sort", text=text)
    assert done.stdout == "a\n" * 50_000 + "b\n" * 50_000


def test_a_stranger_and_one_without_a_certificate_stay_outside(stage: Stage, folder: Path) -> None:
    assert stage.run(*remote(folder, "guest"), "version", check=False).returncode == 1
    bare = stage.run("docker", "--host", f"tcp://127.0.0.1:{PORT}", "--tlsverify", "--tlscacert", folder / "ca.pem", "version",
                     check=False)
    assert bare.returncode == 1
    assert stage.run("docker", "--host", f"tcp://127.0.0.1:{PORT}", "version", check=False).returncode == 1
    stage.run(*remote(folder), "version")


def test_a_context_leads_to_it(stage: Stage, folder: Path) -> None:
    endpoint = f"host=tcp://127.0.0.1:{PORT},ca={folder}/ca.pem,cert={folder}/client.pem,key={folder}/client-key.pem"
    docker = ["docker", "--config", folder / "contexts"]
    stage.run(*docker, "context", "create", "far", "--docker", endpoint)
    assert stage.out(*docker, "--context", "far", "run", "--rm", "--network=none", NAME, "echo", "here") == "here"


def test_our_own_command_speaks_tls_and_follows_contexts(stage: Stage, folder: Path) -> None:
    boxship = str(Path(sys.executable).with_name("boxship"))
    own = folder / "own"
    own.mkdir()
    for theirs, name in (("ca", "ca"), ("client", "cert"), ("client-key", "key")):
        shutil.copy(folder / f"{theirs}.pem", own / f"{name}.pem")
    text = "b\na\n" * 50_000
    run = ["run", "--rm", "--interactive", "--network=none", NAME, "sort"]
    address = {"DOCKER_HOST": f"tcp://127.0.0.1:{PORT}", "DOCKER_CERT_PATH": str(own)}
    done = stage.run(boxship, "--tlsverify", *run, text=text, env=address)
    assert done.stdout == "a\n" * 50_000 + "b\n" * 50_000
    refused = stage.run(boxship, "version", check=False, env=address)
    assert refused.returncode == 1  # without TLS
    (own / "ca.pem").write_text((folder / "guest.pem").read_text())
    refused = stage.run(boxship, "--tlsverify", "version", check=False, env=address)
    assert refused.returncode == 1
    assert "certificate" in refused.stderr.lower()
    (own / "ca.pem").unlink()
    assert "ca.pem: no such file" in stage.run(boxship, "--tlsverify", "version", check=False, env=address).stderr
    # Of a context, as docker wrote it down.
    endpoint = f"host=tcp://127.0.0.1:{PORT},ca={folder}/ca.pem,cert={folder}/client.pem,key={folder}/client-key.pem"
    config = folder / "contexts-of-both"
    stage.run("docker", "--config", config, "context", "create", "near", "--docker", endpoint)
    settings = {"DOCKER_CONFIG": str(config)}
    assert stage.run(boxship, "--context", "near", "run", "--rm", "--network=none", NAME, "echo", "here", env=settings).stdout == "here\n"
    stage.run("docker", "--config", config, "context", "use", "near")
    assert stage.run(boxship, "version", "--format", "{{.Server.Version}}", env=settings).stdout
    assert 'context "gone": context not found' in stage.run(boxship, "ps", check=False, env={**settings, "DOCKER_CONTEXT": "gone"}).stderr


def test_the_socket_belongs_to_the_group(folder: Path) -> None:
    info = os.stat(folder / "docker.sock")
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (0, 65534, 0o660)


def test_a_device_of_a_vendor_is_given_by_name(stage: Stage, folder: Path) -> None:
    docker = pytest.importorskip("docker", reason="docker-py is missing: pip install docker")
    client = docker.DockerClient(base_url=f"unix://{folder}/docker.sock")  # the docker CLI knows CDI since 25 only

    def run(*command: str, **request: object) -> bytes:
        asked = docker.types.DeviceRequest(**request)
        return client.containers.run(NAME, list(command), remove=True, network_mode="none", device_requests=[asked])  # type: ignore[no-any-return]

    found = run("sh", "-c", "echo $GADGET; echo x > /dev/gadget", driver="cdi", device_ids=["vendor.example/gadget=null"])
    assert found == b"yes\n"
    with pytest.raises(docker.errors.APIError, match=r"unresolvable CDI devices vendor\.example/gadget=other"):
        run("true", driver="cdi", device_ids=["vendor.example/gadget=other"])
    with pytest.raises(docker.errors.APIError, match=r'could not select device driver "" with capabilities: \[\[gpu\]\]'):
        run("true", count=-1, capabilities=[["gpu"]])
    assert client.info()["DiscoveredDevices"] == [{"Source": "cdi", "ID": "vendor.example/gadget=null"}]
    client.close()


def test_without_certificates_it_is_open_only_when_that_is_said(stage: Stage) -> None:
    boxship = Path(sys.executable).with_name("boxship")
    folder = stage.directory / "open"
    folder.mkdir()
    (folder / "config.toml").write_text(f'[docker]\ntcp = "127.0.0.1:{OPEN}"\n')
    refused = stage.run(boxship, "daemon", "--config", folder / "config.toml", "--root", folder / "root", "--state", folder, check=False)
    assert refused.returncode == 1
    assert "docker.tcp is set without docker.tls_ca" in refused.stderr
    daemon = start(stage, folder, f'[docker]\ntcp = "127.0.0.1:{OPEN}"\ninsecure = true\n')
    assert stage.run("docker", "--host", f"tcp://127.0.0.1:{OPEN}", "version").returncode == 0
    stage.stop(daemon)
    assert "whoever reaches it is root on this machine" in (folder / "log").read_text()
