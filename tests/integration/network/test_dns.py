"""The name server in a container's namespace: names, what is passed on, by UDP and TCP."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxship.kit.errors import BoxshipError
from boxship.linux import netns
from boxship.network.dns.client import Dns, Member, Resolver, Server
from boxship.network.proxy.client import Proxy
from support import network
from support.network import AAAA, PTR, TXT, A, ask, end, inside, question, tcp_server, udp_server

pytestmark = pytest.mark.root


class Stage:
    """A host's namespace, in which the calling thread is, two containers', and a helper."""

    def __init__(self, folder: Path) -> None:
        self.state = str(folder / "state")
        self.containers = [network.make_namespace(folder / f"c{each}") for each in range(2)]
        self.proxy = Proxy(self.state)
        self.dns = Dns(self.proxy)
        self.dns.network("n1", "front")
        self.dns.join(Member("n1", "e1", ["web", "0123456789ab", "www"], ["10.0.0.2", "fd00::2"]))
        self.dns.join(Member("n1", "e2", ["db", "www"], ["10.0.0.3"]))

    def attach(self, *servers: Server, which: int = 0, ndots: bool = False, networks: tuple[str, ...] = ("n1",)) -> None:
        links = {each: {"database": "db"} if each == "n1" else {} for each in networks}
        self.dns.attach(Resolver(f"s{which}", self.containers[which], links, servers, ndots))

    def ask(self, name: str, kind: int, *, tcp: bool = False, edns: int = 0, which: int = 0) -> network.Reply:
        with inside(self.containers[which]):
            return ask(name, kind, tcp=tcp, edns=edns)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    host = network.make_namespace(tmp_path / "host")
    with inside(host):
        made = Stage(tmp_path)
        try:
            yield made
        finally:
            made.proxy.stop()
            for each in made.containers:
                netns.remove(each)
    netns.remove(host)


def refuses(namespace: str) -> None:
    """Nobody serves there, and who asks is told so: soon, because the kernel takes its time to forget."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with inside(namespace):
            try:
                ask("web", A, timeout_s=0.3)
            except ConnectionRefusedError:
                return
            except TimeoutError:
                pass
    pytest.fail("neither answered nor refused")


def nowhere(packet: bytes) -> bytes:
    """What an upstream server says of names that do not exist."""
    return packet[:2] + b"\x81\x83" + packet[4:]


@pytest.mark.parametrize("tcp", [False, True])
def test_names_of_containers(stage: Stage, tcp: bool) -> None:
    stage.attach()
    assert stage.ask("web", A, tcp=tcp).data == ["10.0.0.2"]
    assert stage.ask("WEB", AAAA, tcp=tcp).data == ["fd00::2"]
    assert stage.ask("0123456789ab", A, tcp=tcp).data == ["10.0.0.2"]
    assert stage.ask("db.front", A, tcp=tcp).data == ["10.0.0.3"]
    assert stage.ask("database", A, tcp=tcp).data == ["10.0.0.3"]
    assert sorted(stage.ask("www", A, tcp=tcp).data) == ["10.0.0.2", "10.0.0.3"]
    nodata = stage.ask("db", AAAA, tcp=tcp)
    assert (nodata.code, nodata.data) == (0, [])
    assert stage.ask("2.0.0.10.in-addr.arpa", PTR, tcp=tcp).data == ["web.front"]
    assert stage.ask("web", A, tcp=tcp).ttl_s == 600
    for kind in (15, 64, 65):
        assert (stage.ask("web", kind, tcp=tcp).code, stage.ask("web", kind, tcp=tcp).data) == (0, [])
    # On internal networks nobody else can be asked.
    assert stage.ask("example.com", A, tcp=tcp).code == 2


@pytest.mark.parametrize("command", ["getent ahosts", "busybox nslookup"])
def test_resolvers_of_others(stage: Stage, tmp_path: Path, command: str) -> None:
    """glibc's and busybox's, which ask for both families at once; glibc asks again by TCP when an answer is cut."""
    server = udp_server("127.0.0.53", 53, nowhere)
    stage.attach(Server("127.0.0.53", in_host=True))
    for each in range(60):
        stage.dns.join(Member("n1", f"many{each}", ["many"], [f"10.1.0.{each + 1}"]))
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.11\noptions ndots:0\n")

    def look_up(name: str) -> subprocess.CompletedProcess[str]:
        script = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && {command} {name}"
        return subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=60)

    with inside(stage.containers[0]):
        web, db, front, many, none = (look_up(name) for name in ("web", "db", "db.front", "many", "nobody.example"))
    assert "10.0.0.2" in web.stdout
    assert "fd00::2" in web.stdout
    assert "10.0.0.3" in db.stdout
    assert "10.0.0.3" in front.stdout
    assert none.returncode != 0
    found = {word for word in many.stdout.split() if word.startswith("10.1.0.")}
    assert len(found) == 60 if command.startswith("getent") else found
    end(server)


def test_several_addresses_come_in_any_order(stage: Stage) -> None:
    stage.attach()
    firsts = {stage.ask("www", A).data[0] for _ in range(60)}
    assert firsts == {"10.0.0.2", "10.0.0.3"}


def test_names_change_while_it_is_served(stage: Stage) -> None:
    stage.attach()
    stage.attach(which=1, networks=())
    assert stage.ask("web", A, which=1).code == 2
    stage.attach(which=1)
    assert stage.ask("web", A, which=1).data == ["10.0.0.2"]
    stage.dns.join(Member("n1", "e1", ["renamed"], ["10.0.0.9"]))
    assert stage.ask("web", A).code == 2
    assert stage.ask("renamed", A).data == ["10.0.0.9"]
    stage.dns.leave("e1")
    assert stage.ask("renamed", A).code == 2
    stage.dns.detach("s1")
    refuses(stage.containers[1])
    with pytest.raises(BoxshipError, match="no-such-namespace"):
        stage.dns.attach(Resolver("s9", "/no-such-namespace"))


def test_many_addresses_come_whole_by_tcp(stage: Stage) -> None:
    stage.attach()
    for each in range(60):
        stage.dns.join(Member("n1", f"many{each}", ["many"], [f"10.1.0.{each + 1}"]))
    short = stage.ask("many", A)
    assert short.truncated
    assert len(short.packet) <= 512
    assert len(stage.ask("many", A, tcp=True).data) == 60
    assert len(stage.ask("many", A, edns=4096).data) == 60


def test_others_are_asked_where_they_are(stage: Stage) -> None:
    """One server in the container's own namespace, one that only the host reaches; what comes back is passed on as it is."""
    with inside(stage.containers[0]):
        in_container = udp_server("127.0.0.2", 53, lambda packet: nowhere(packet) + b"from the container")
    in_host = udp_server("127.0.0.53", 53, lambda packet: nowhere(packet) + b"from the host")
    stage.attach(Server("127.0.0.2"))
    answer = stage.ask("example.com", TXT)
    assert (answer.id, answer.code) == (4711, 3)
    assert answer.packet.endswith(b"from the container")
    stage.attach(Server("127.0.0.53", in_host=True))
    assert stage.ask("example.com", TXT).packet.endswith(b"from the host")
    # The same address, but the container's own.
    stage.attach(Server("127.0.0.53"))
    assert stage.ask("example.com", TXT).code == 2
    # A name that is known is never passed on.
    assert stage.ask("db", AAAA).code == 0
    end(in_container)
    end(in_host)


def test_the_next_server_is_asked_when_one_is_closed_or_refuses(stage: Stage) -> None:
    servers = [
        udp_server("127.0.0.52", 53, lambda packet: packet[:2] + b"\x81\x85" + packet[4:]),
        udp_server("127.0.0.53", 53, nowhere),
    ]
    every = [Server(f"127.0.0.{each}", in_host=True) for each in (51, 52, 53)]
    stage.attach(*every)
    assert stage.ask("example.com", A).code == 3
    # The last word of who refuses is better than none.
    stage.attach(*every[:2])
    assert stage.ask("example.com", A).code == 5
    for each in servers:
        end(each)


def test_the_next_server_is_asked_when_one_is_silent(stage: Stage) -> None:
    silent, good = udp_server("127.0.0.52", 53, lambda packet: None), udp_server("127.0.0.53", 53, nowhere)
    stage.attach(Server("127.0.0.52", in_host=True), Server("127.0.0.53", in_host=True))
    assert stage.ask("example.com", A).code == 3
    end(silent)
    end(good)


def test_answers_by_tcp_are_passed_on_whole(stage: Stage) -> None:
    def serve(connection: network.socket.socket) -> None:
        size = int.from_bytes(connection.recv(2), "big")
        packet = connection.recv(size)
        answer = nowhere(packet) + bytes(40_000)
        connection.sendall(len(answer).to_bytes(2, "big") + answer)

    server = tcp_server("127.0.0.53", 53, serve)
    stage.attach(Server("127.0.0.53", in_host=True))
    answer = stage.ask("example.com", TXT, tcp=True)
    assert (answer.code, len(answer.packet)) == (3, len(question("example.com", TXT)) + 40_000)
    end(server)


def test_names_without_a_dot_stay_here_when_the_user_chose_ndots(stage: Stage) -> None:
    server = udp_server("127.0.0.53", 53, nowhere)
    stage.attach(Server("127.0.0.53", in_host=True))
    assert stage.ask("short", A).code == 3
    stage.attach(Server("127.0.0.53", in_host=True), ndots=True)
    assert stage.ask("short", A).code == 0
    assert stage.ask("not.short", A).code == 3
    end(server)


def test_the_container_may_have_port_53_itself(stage: Stage) -> None:
    """On all its addresses: a name server in a container is a usual thing. Also where it tracks connections and translates them."""
    stage.attach()
    with inside(stage.containers[0]):
        own = udp_server("0.0.0.0", 53, nowhere)
        stream = network.socket.create_server(("0.0.0.0", 53))
        rules = """
            table ip own {
                chain t { type nat hook output priority -100; }
                chain i {
                    type filter hook input priority 0; policy drop
                    ct state established,related accept
                    iif "lo" accept
                }
                chain o {
                    type filter hook output priority 0; policy drop
                    ct state established,related accept
                    ct state new th dport 53 accept
                }
            }"""
        for tracked in (False, True):
            assert stage.ask("web", A).data == ["10.0.0.2"]
            assert stage.ask("web", A, tcp=True).data == ["10.0.0.2"]
            with network.socket.socket(network.socket.AF_INET, network.socket.SOCK_DGRAM) as client:
                client.settimeout(20)
                client.connect(("127.0.0.1", 53))
                client.send(question("web", A))
                assert network.Reply(client.recv(600)).code == 3
            if not tracked:
                subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
        end(own)
        stream.close()


def test_the_next_daemon_says_what_there_is(stage: Stage) -> None:
    stage.attach()
    stage.attach(which=1)
    stage.proxy.close()
    assert stage.ask("web", A).data == ["10.0.0.2"]
    proxy = Proxy(stage.state)
    dns = Dns(proxy)
    dns.sync({"n1": "front"}, [Member("n1", "e7", ["new"], ["10.0.0.7"])], [Resolver("s0", stage.containers[0], {"n1": {}})])
    assert stage.ask("new", A).data == ["10.0.0.7"]
    assert stage.ask("web", A).code == 2
    refuses(stage.containers[1])
    proxy.stop()


def test_a_thousand_questions_from_both_containers_at_once(stage: Stage) -> None:
    server = udp_server("127.0.0.53", 53, nowhere)
    for which in range(2):
        stage.attach(Server("127.0.0.53", in_host=True), which=which)
    failed: list[object] = []

    def many(which: int) -> None:
        with inside(stage.containers[which]):
            for each in range(250):
                if ask("web", A).data != ["10.0.0.2"] or ask(f"x{each}.example", A).code != 3:
                    failed.append(each)

    threads = [threading.Thread(target=many, args=(which,)) for which in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
    pid = stage.proxy.call({"do": "hello"})["pid"]
    assert len(os.listdir(f"/proc/{pid}/fd")) < 30
    end(server)
