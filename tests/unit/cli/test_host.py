"""The image `host` lets in what is listed and nothing else: the machine here is a made-up one."""

import os
from pathlib import Path

import pytest

from boxship.cli import host, image
from boxship.cli.layers import Kernel, Layers
from boxship.cli.scratch import Scratch
from boxship.images.builtin import machine as listed

SECRET = "canary-5e1f"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    root = tmp_path / "machine"
    for folder in ("usr/bin", "usr/lib", "usr/local/etc", "etc/ssl/certs", "etc/ssl/private", "etc/ssh", "etc/alternatives",
                   "etc/ld.so.conf.d", "etc/java-17-openjdk/management", "root/.ssh", "home/ann", "run", "var/lib", "opt/app", "srv"):
        (root / folder).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "lib").symlink_to("usr/lib")
    (root / "lib64").mkdir()
    for name in ("etc/shadow", "etc/gshadow", "etc/shadow-", "etc/ssh/ssh_host_ed25519_key", "etc/ssl/private/server.key", "etc/environment",
                 "etc/pip.conf", "etc/npmrc", "etc/krb5.keytab", "etc/profile", "etc/machine-id", "etc/fstab", "root/.netrc",
                 "root/.ssh/id_ed25519", "home/ann/notes", "run/docker.sock", "var/lib/db", "opt/app/config", "srv/site", "top-secret",
                 "etc/default-password", "etc/app-release-key"):
        (root / name).write_text(SECRET)
    (root / "etc/passwd").write_text(f"root:{SECRET}:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n")
    (root / "etc/group").write_text(f"root:{SECRET}:0:\n")
    (root / "etc/services").write_text("ssh 22/tcp\n")
    (root / "etc/services").chmod(0o644)
    (root / "etc/protocols").write_text(SECRET)
    (root / "etc/protocols").chmod(0o600)
    (root / "etc/localtime").symlink_to("/usr/share/zoneinfo/UTC")
    (root / "etc/os-release").symlink_to("../usr/lib/os-release")
    (root / "etc/ld.so.conf.d/libc.conf").write_text("/usr/local/lib\n")
    (root / "etc/java-17-openjdk/jvm.cfg").write_text("-server KNOWN\n")
    (root / "etc/java-17-openjdk/management/jmxremote.password").write_text(SECRET)
    (root / "etc/java-17-openjdk/management/jmxremote.password").chmod(0o600)
    os.mkfifo(root / "etc/networks")
    return root


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    (tmp_path / "base").mkdir()
    return Scratch(str(tmp_path / "base"), "t1")


def assemble(machine: Path, scratch: Scratch, **kernel: object) -> Layers:
    settings: dict[str, object] = {"userns": True, "version": (6, 1), "busy": ["/"], **kernel}
    layers = Layers(scratch, Kernel(**settings), ["nosuid", "nodev"])  # type: ignore[arg-type]
    template = machine.parent / "template"
    listed.build(str(template), str(machine))
    host.assemble(layers, str(template), str(machine))
    return layers


def test_no_secret_is_in_the_skeleton(machine: Path, scratch: Scratch) -> None:
    assemble(machine, scratch)
    for folder, _, names in [*os.walk(scratch.rootfs), *os.walk(machine.parent / "template")]:
        for name in names:
            path = os.path.join(folder, name)
            assert SECRET not in name
            if not os.path.islink(path):
                assert SECRET.encode() not in Path(path).read_bytes(), path


def test_only_programs_and_listed_folders_of_etc_are_layers(machine: Path, scratch: Scratch) -> None:
    layers = assemble(machine, scratch)
    lowers = {os.readlink(f"{scratch.path}/lower/{name}") for name in os.listdir(f"{scratch.path}/lower")}
    template = machine.parent / "template"
    assert lowers == {f"{machine}/usr", f"{machine}/lib64", f"{template}/etc", f"{template}/var"}
    assert [mount["destination"] for mount in layers.mounts] == ["/usr", "/lib64", "/usr/local/etc", "/etc", "/var"]


def test_links_into_usr_are_links_in_the_container(machine: Path, scratch: Scratch) -> None:
    assemble(machine, scratch)
    assert os.readlink(f"{scratch.rootfs}/bin") == "usr/bin"
    assert os.readlink(machine.parent / "template/etc/localtime") == "/usr/share/zoneinfo/UTC"
    assert os.readlink(machine.parent / "template/etc/os-release") == "../usr/lib/os-release"


def test_a_listed_file_that_others_may_not_read_stays_out(machine: Path, scratch: Scratch) -> None:
    assemble(machine, scratch)
    etc = machine.parent / "template/etc"
    assert (etc / "services").read_text() == "ssh 22/tcp\n"
    assert not (etc / "protocols").exists()
    assert (etc / "java-17-openjdk/jvm.cfg").exists()
    assert not (etc / "java-17-openjdk/management/jmxremote.password").exists()


def test_names_of_users_come_without_password_hashes(machine: Path, scratch: Scratch) -> None:
    assemble(machine, scratch)
    assert (machine.parent / "template/etc/passwd").read_text().splitlines()[0] == "root:x:0:0:root:/root:/bin/sh"
    assert (machine.parent / "template/etc/group").read_text() == "root:x:0:\n"


def test_the_private_folders_are_fresh(machine: Path, scratch: Scratch) -> None:
    assemble(machine, scratch)
    for name, mode in (("root", 0o700), ("home", 0o755), ("run", 0o755), ("tmp", 0o1777), ("opt", 0o755), ("srv", 0o755)):
        path = Path(scratch.rootfs, name)
        assert [child.name for child in path.iterdir()] == (["lock"] if name == "run" else [])
        assert path.stat().st_mode & 0o7777 == mode


def test_overlays_say_what_the_kernel_wants_of_them(machine: Path, scratch: Scratch) -> None:
    usr = assemble(machine, scratch).mounts[0]
    assert usr == {
        "destination": "/usr", "type": "overlay", "source": "overlay",
        "options": ["nosuid", "nodev", f"lowerdir={scratch.path}/lower/0", f"upperdir={scratch.path}/upper/0",
                    f"workdir={scratch.path}/work/0", "userxattr", "volatile"],
    }


def test_an_old_kernel_gets_a_read_only_bind_in_a_user_namespace(machine: Path, scratch: Scratch) -> None:
    usr, lib64, _ = assemble(machine, scratch, version=(5, 4)).mounts
    assert (usr["type"], lib64["type"]) == ("bind", "bind")
    assert {"ro", "rro", "nosuid"} <= set(usr["options"])
    assert Path(scratch.rootfs, "etc/services").exists()


def test_an_old_kernel_gets_no_new_options_of_overlay(machine: Path, scratch: Scratch) -> None:
    options = assemble(machine, scratch, version=(5, 4), userns=False).mounts[0]["options"]
    assert not {"userxattr", "volatile"} & set(options)


def test_a_folder_with_mounts_below_is_taken_apart_in_a_user_namespace(machine: Path, scratch: Scratch) -> None:
    (machine / "usr/lib/deep/er").mkdir(parents=True)
    (machine / "usr/lib/libc.so").write_text("")
    (machine / "usr/sbin").symlink_to("bin")
    layers = assemble(machine, scratch, busy=["/", f"{machine}/usr/lib/deep/er"])
    found = {mount["destination"]: mount["type"] for mount in layers.mounts}
    assert found.items() >= {
        "/usr/bin": "overlay", "/usr/local": "overlay", "/usr/lib/deep/er": "overlay", "/usr/lib/libc.so": "bind",
    }.items()
    assert "/usr" not in found
    assert os.readlink(f"{scratch.rootfs}/usr/sbin") == "bin"


def test_a_folder_with_mounts_below_has_an_overlay_for_each_as_root(machine: Path, scratch: Scratch) -> None:
    (machine / "usr/lib/disk").mkdir()
    layers = assemble(machine, scratch, userns=False, busy=["/", f"{machine}/usr/lib/disk"])
    assert [mount["destination"] for mount in layers.mounts[:2]] == ["/usr", "/usr/lib/disk"]


def test_generated_names_are_the_containers_own(machine: Path) -> None:
    files = image.hostname_files("box", own_network=True, machine=str(machine))
    assert b"127.0.1.1\tbox\n" in files["/etc/hosts"]
    assert files["/etc/hostname"] == b"box\n"
    assert b"nameserver" not in files["/etc/resolv.conf"]


def test_in_the_callers_network_the_callers_names_hold(machine: Path) -> None:
    (machine / "etc/hosts").write_text("192.0.2.1 server")
    (machine / "etc/resolv.conf").write_text("nameserver 192.0.2.2\n")
    files = image.hostname_files("box", own_network=False, machine=str(machine))
    assert files["/etc/hosts"] == b"192.0.2.1 server\n127.0.1.1\tbox\n"
    assert files["/etc/resolv.conf"] == b"nameserver 192.0.2.2\n"


def test_a_generated_file_lies_over_an_images_own(tmp_path: Path, scratch: Scratch) -> None:
    root = tmp_path / "image"
    (root / "etc").mkdir(parents=True)
    (root / "etc/hosts").write_text("the image's\n")
    (root / "bin").symlink_to("usr/bin")
    (root / "proc").mkdir()
    (root / "file").write_text("x")
    kernel = Kernel(userns=True, version=(6, 1), busy=["/"])
    config = image.directory(str(root), scratch, kernel, None, "box", own_network=True)
    assert [mount["destination"] for mount in config["mounts"]][:2] == ["/etc", "/proc"]
    assert Path(scratch.path, "upper/0/hosts").read_bytes().endswith(b"box\n")
    assert (root / "etc/hosts").read_text() == "the image's\n"
    assert Path(scratch.rootfs, "file").read_text() == "x"
