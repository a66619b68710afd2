"""The image `python`: the machine's own interpreter with its standard library, and the shared libraries they need.

Runs in: the daemon, in a worker thread.
Spec: the interpreter finds its library from where it lies (Python's Modules/getpath.py): PREFIX/bin/pythonX.Y and
PREFIX/lib/pythonX.Y. So whatever its place on the machine is, it goes to /usr/local.

Two layers: what every program needs (dynamic linker, C library, names of users, certificates), and Python itself.
Not in it: a shell, packages of the machine's, tests and Tk of the standard library.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from boxship.images.builtin.elf import Linker, read
from boxship.images.builtin.tree import Tree
from boxship.kit.errors import InvalidArgument, NotFound, Unsupported
from boxship.oci import text

_LEFT_OUT = frozenset(("test", "tests", "tkinter", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages"))
_LEFT_OUT_FILES = ("turtle.py", "_tkinter.")
_BASE = ("libc.so.", "libm.so.", "libdl.so.", "libpthread.so.", "librt.so.", "libutil.so.", "ld-", "/lib", "/usr/lib")
_ASK = (
    "import json,sys,sysconfig as s;"
    "print(json.dumps(['python%d.%d'%sys.version_info[:2],sys.version.split()[0],s.get_path('stdlib'),s.get_path('platstdlib'),"
    "sys.implementation.cache_tag,sys.platlibdir]))"
)
_CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_TERMINALS = ("dumb", "linux", "screen", "screen-256color", "tmux", "tmux-256color", "vt100", "xterm", "xterm-256color")


@dataclass(frozen=True)
class Interpreter:
    """The machine's Python, as it answers about itself."""

    path: str
    version: str
    name: str
    stdlib: str
    platlib: str
    tag: str
    platlibdir: str


def interpreter(path: str) -> Interpreter:
    """Ask the program at `path`. Raises Unsupported when it is no Python 3."""
    try:
        answer = subprocess.run([path, "-I", "-S", "-c", _ASK], capture_output=True, check=True, timeout=60).stdout
        told = text.loads(answer, path)
    except (OSError, subprocess.SubprocessError, InvalidArgument) as error:
        raise Unsupported(f"{path} does not answer as a Python interpreter does: {error}") from None
    if not isinstance(told, list) or len(told) != 6 or not all(isinstance(part, str) for part in told):
        raise Unsupported(f"{path} does not answer as a Python interpreter does")
    name, version, stdlib, platlib, tag, platlibdir = (str(part) for part in told)
    return Interpreter(path, version, name, stdlib, platlib, tag, platlibdir)


def build(python: Interpreter) -> tuple[Tree, Tree]:
    """(base layer, Python's layer). Raises NotFound, Unsupported, OSError."""
    base, layer = _base(), Tree()
    home = f"usr/local/lib/{python.name}"
    layer.file(f"usr/local/bin/{python.name}", python.path)
    layer.link("usr/local/bin/python3", python.name)
    layer.link("usr/local/bin/python", python.name)
    extensions = _library(layer, home, python.stdlib, python)
    if os.path.realpath(python.platlib) != os.path.realpath(python.stdlib):
        extensions += _library(layer, f"usr/local/{python.platlibdir}/{python.name}", python.platlib, python)
    layer.folder(f"{home}/site-packages")

    linker = Linker()
    needed = linker.libraries([python.path])
    for extension in extensions:
        try:
            needed.update(linker.libraries([extension]))
        except NotFound:
            continue  # a module whose library the machine has lost does not work there either
    libc = next((path for name, path in needed.items() if name.startswith("libc.")), "")
    if not libc:
        raise Unsupported(f"{python.path} is not linked with a C library that is known here")
    folder = os.path.dirname(os.path.realpath(libc))
    for name, path in sorted(needed.items()):
        if name.startswith("/"):
            # The links of the top folder are the machine's own, so this is where they lead in the image too.
            base.file(f"{os.path.realpath(os.path.dirname(name))}/{os.path.basename(name)}", path)
        elif name.startswith(_BASE):
            base.file(f"{folder}/{name}", path)
        else:
            layer.file(f"{folder}/{name}", path)
    return base, layer


def config(python: Interpreter) -> dict[str, object]:
    """What a container of the image is started with."""
    env = ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", f"PYTHON_VERSION={python.version}"]
    if any(map(os.path.exists, _CERTIFICATES)):
        env.append("SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt")
    return {"Env": env, "Cmd": ["python3"], "WorkingDir": "/"}


def _base() -> Tree:
    tree = Tree()
    for path, mode in (("dev", 0o755), ("proc", 0o755), ("sys", 0o755), ("run", 0o755), ("tmp", 0o1777), ("root", 0o700),
                       ("home", 0o755), ("var/tmp", 0o1777), ("etc", 0o755), ("usr/bin", 0o755), ("usr/lib", 0o755)):
        tree.folder(path, mode)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        # The linker's path is part of every program: /lib64 must lead where it leads on the machine.
        if os.path.islink(f"/{name}"):
            to = os.readlink(f"/{name}")
            tree.folder(os.path.normpath(f"/{to}"))
            tree.link(name, to)
        elif name == "bin":
            tree.link("bin", "usr/bin")
    tree.data("etc/passwd", b"root:x:0:0:root:/root:/usr/local/bin/python3\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n")
    tree.data("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    tree.data("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n")
    for name in ("services", "protocols"):
        if os.path.isfile(f"/etc/{name}"):
            tree.file(f"etc/{name}", f"/etc/{name}")
    for path in _CERTIFICATES:
        if os.path.isfile(path):
            tree.file("etc/ssl/certs/ca-certificates.crt", path)
            break
    for name in _TERMINALS:
        for folder in ("/lib/terminfo", "/usr/share/terminfo", "/etc/terminfo"):
            path = f"{folder}/{name[0]}/{name}"
            if os.path.isfile(path):
                tree.file(f"usr/share/terminfo/{name[0]}/{name}", path)
                break
    return tree


def _library(tree: Tree, target: str, source: str, python: Interpreter) -> list[str]:
    """Copy a folder of the standard library; returns its extension modules."""
    extensions: list[str] = []
    todo = [(source, target)]
    while todo:
        source, target = todo.pop()
        tree.folder(target)
        with os.scandir(source) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for child in children:
            name = child.name
            if name in _LEFT_OUT or name.startswith(_LEFT_OUT_FILES) or (name.startswith("config-") and child.is_dir()):
                continue
            if child.is_dir():
                todo.append((child.path, f"{target}/{name}"))
            elif name.endswith(".pyc") and not name.endswith(f".{python.tag}.pyc"):
                continue  # of another version, or of an optimisation that nobody asked for
            elif child.is_file():
                tree.file(f"{target}/{name}", child.path)
                if ".so" in name and _is_elf(child.path):
                    extensions.append(child.path)
    return extensions


def _is_elf(path: str) -> bool:
    try:
        read(path)
    except InvalidArgument:
        return False
    return True
