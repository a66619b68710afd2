"""The boxship command as a person runs it: another process, as root or as an ordinary user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import boxship

ENTRY = "import sys; from boxship.daemon.entry import boxship; sys.exit(boxship())"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def open_to_all(path: str) -> bool:
    """Whether every user may reach and execute a file."""
    real = os.path.realpath(path)
    folders = [str(parent) for parent in Path(real).parents]
    return os.path.exists(real) and all(os.stat(name).st_mode & 0o001 for name in [real, *folders])


def public_interpreter() -> str | None:
    """A Python that ordinary users can run too: the one that runs the tests may lie in root's home."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        if open_to_all(candidate):
            new = subprocess.run([candidate, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode == 0
            if new:
                return os.path.realpath(candidate)
    return None


@contextmanager
def public_copy() -> Iterator[str]:
    """A copy of the package where every user can read it; the folder to put on PYTHONPATH."""
    folder = mkdtemp(prefix="boxship-test-")
    try:
        os.chmod(folder, 0o755)
        shutil.copytree(os.path.dirname(boxship.__file__), f"{folder}/boxship", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def public_environment() -> Iterator[str | None]:
    """A virtual environment with all of boxship that every user can use, its folder; None when no interpreter fits the packages."""
    interpreter = public_interpreter()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = os.path.realpath(os.path.join(sys.prefix, "lib", version, "site-packages"))
    fits = interpreter is not None and interpreter.endswith((version, "python3", "python")) and subprocess.run(
        [interpreter, "-c", f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"]).returncode == 0
    if interpreter is None or not fits or not open_to_all(os.path.dirname(packages)):
        yield None
        return
    with public_copy() as package:
        folder = f"{package}/environment"
        os.makedirs(f"{folder}/lib/{version}/site-packages")
        os.mkdir(f"{folder}/bin")
        Path(folder, "pyvenv.cfg").write_text(f"home = {os.path.dirname(interpreter)}\ninclude-system-site-packages = false\n")
        Path(folder, "lib", version, "site-packages", "boxship.pth").write_text(f"{package}\n{packages}\n")
        for name in ("python", "python3"):
            os.symlink(interpreter, f"{folder}/bin/{name}")
        for name in ("boxrun", "containerd-shim-boxship-v1"):
            shutil.copy(Path(sys.executable).with_name(name), f"{folder}/bin/{name}")
        for name in ("boxship", "boxshipd"):
            script = Path(folder, "bin", name)
            script.write_text(f"#!{folder}/bin/python3\nimport sys\nfrom boxship.daemon.entry import {name}\nsys.exit({name}())\n")
            script.chmod(0o755)
        yield folder


class Command:
    """Runs boxship as one user.

    Attributes:
        uid, gid: whose; home: of that user, an empty folder.
        run_flags: go into every `run` of the image `host`.
        environ: more variables of the environment.
    """

    def __init__(self, interpreter: str, package: str, uid: int, gid: int, home: str, *run_flags: str, **environ: str) -> None:
        self.run_flags = run_flags
        self.environ = environ
        self.interpreter = interpreter
        self.package = package
        self.uid = uid
        self.gid = gid
        self.home = home

    @property
    def words(self) -> list[str]:
        return [self.interpreter, "-c", ENTRY]

    @property
    def settings(self) -> dict[str, object]:
        """Keyword arguments of Popen."""
        environ = {"PATH": PATH, "HOME": self.home, "PYTHONPATH": self.package, "PYTHONDONTWRITEBYTECODE": "1",
                   **self.environ}
        return {"env": environ, "user": self.uid, "group": self.gid, "extra_groups": [], "cwd": self.home}

    def line(self, *arguments: str) -> list[str]:
        """The whole command line."""
        if arguments[0] == "run" and "host" in arguments:
            arguments = ("run", *self.run_flags, *arguments[1:])
        return [*self.words, *arguments]

    def __call__(self, *arguments: str, text: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run to the end; `text` is standard input."""
        return subprocess.run(
            self.line(*arguments), input=text, capture_output=True, text=True, timeout=timeout, **self.settings  # type: ignore[call-overload]
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin to run."""
        return subprocess.Popen(
            self.line(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            **self.settings,  # type: ignore[call-overload]
        )

    def shell(self, script: str, *flags: str) -> str:
        """What a shell script prints in a container of the image `host`; fails the test when it fails."""
        done = self("run", *flags, "host", "--", "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        return done.stdout
