"""Real container engines, with a base image and a package index that need no registry."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tests.testkit.servers import free_port
from tests.testkit.waiting import eventually

PYTHON = "3.13"
DEFAULT_BASE = f"python:{PYTHON}-slim"
OWN_BASE = f"localhost/credit-risk-test-base:{PYTHON}"
SUITE = "trixie"
"""The Debian release whose python3 is `PYTHON`."""
KEY = "a-key-of-the-image-test"
START_LIMIT = 180.0


@dataclass(frozen=True)
class Container:
    """A running container that publishes port 3000."""

    engine: Engine
    name: str
    port: int

    def call(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """One request: status, and the decoded JSON or the text."""
        headers = {"Content-Type": "application/json", **({"X-API-Key": key} if key else {})}
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers)
        try:
            with urlopen(request, timeout=30) as response:
                return response.status, _decoded(response.read())
        except HTTPError as error:
            with error:
                return error.code, _decoded(error.read())

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return self.engine.run("exec", self.name, *command, check=False)

    def await_status(self, path: str, status: int) -> None:
        """Wait until a path answers with a status.

        Raises
        ------
        RuntimeError
            It did not; the message holds the container's log.
        """

        def answered() -> bool:
            with suppress(OSError, HTTPException):
                return self.call(path)[0] == status
            return False

        try:
            eventually(answered, START_LIMIT)
        except TimeoutError:
            log = self.engine.run("logs", self.name, check=False)
            raise RuntimeError(f"{path} never answered {status}:\n{log.stdout}{log.stderr}"[-4000:]) from None


@dataclass(frozen=True)
class Engine:
    """docker or podman, with settings of its own in `env`."""

    name: str
    env: Mapping[str, str]

    def run(self, *arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine."""
        done = subprocess.run(
            [self.name, *arguments], env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, f"{self.name} {arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def works(self) -> bool:
        """Whether it is installed and can be used."""
        with suppress(OSError):
            return self.run("ps", check=False).returncode == 0
        return False

    def has_default_base(self) -> bool:
        """Whether a registry, or this machine, has the base image that the container file names."""
        with suppress(subprocess.TimeoutExpired):
            return self.run("pull", "--quiet", DEFAULT_BASE, check=False).returncode == 0
        return False

    @contextmanager
    def container(self, image: str, *flags: str) -> Iterator[Container]:
        """Run an image until the block ends."""
        port = free_port()
        name = f"credit-risk-test-{port}"
        published = ("-p", f"127.0.0.1:{port}:3000", "-e", f"CREDIT_RISK_API_KEYS={KEY}")
        try:
            self.run("run", "--detach", "--name", name, *published, *flags, image)
            yield Container(self, name, port)
        finally:
            self.run("rm", "--force", "--volumes", name, check=False)


def engine_for(builder: str, folder: Path) -> Engine:
    """Return what runs the images of a builder: docker for its own, podman for those of podman and buildah."""
    if builder == "docker":
        return Engine("docker", dict(os.environ))
    return Engine("podman", {**os.environ, **_container_settings(folder)})


def _container_settings(folder: Path) -> dict[str, str]:
    """Let podman and buildah keep their images below `folder`, and ask for no more than this process has."""
    folder.mkdir(exist_ok=True)
    storage, containers = folder / "storage.conf", folder / "containers.conf"
    storage.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/running"\n'
    )
    limits = [
        f"nofile={_at_most(resource.RLIMIT_NOFILE, 20_000)}",
        f"nproc={_at_most(resource.RLIMIT_NPROC, 30_000)}",
    ]
    # crun does not start where both versions of cgroups are mounted.
    runtime = '[engine]\nruntime = "runc"\n' if shutil.which("runc") else ""
    containers.write_text(f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n{runtime}")
    return {
        "CONTAINERS_STORAGE_CONF": str(storage),
        "CONTAINERS_CONF": str(containers),
        "BUILDAH_ISOLATION": "chroot",  # builds inside a container too
    }


def _at_most(kind: int, number: int) -> str:
    hard = resource.getrlimit(kind)[1]
    limit = number if hard == resource.RLIM_INFINITY else min(hard, number)
    return f"{limit}:{limit}"


def make_base(archive: Path) -> None:
    """Make the file system of a base image from Debian's packages: `python` and pip, as the official image has."""
    subprocess.run(
        [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            "--include=python3-venv",
            # /usr/local becomes an environment: it has `python`, as the official image, and pip may install.
            '--customize-hook=chroot "$1" python3 -m venv /usr/local',
            SUITE,
            str(archive),
        ],
        check=True,
    )


@contextmanager
def package_index(lock: Path, folder: Path) -> Iterator[Path]:
    """Serve the packages of a lock on the loopback interface; yields a pip.conf that names no other index.

    This machine's own pip downloads them, so that the build needs none of its settings.
    """
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    which = ["--python-version", PYTHON, "--only-binary", ":all:"]
    subprocess.run([*pip, *which, "--requirement", str(lock), "--dest", str(wheels)], check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(wheels)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        conf = folder / "pip.conf"
        conf.write_text(f"[global]\nno-index = true\nfind-links = http://127.0.0.1:{server.server_port}/\n")
        yield conf
    finally:
        server.shutdown()
        server.server_close()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
