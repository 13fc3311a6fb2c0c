"""The image command: build the container image of a Bento with docker, podman or buildah."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import StoreError, first_line
from pipeline.packaging import bento as bentos
from pipeline.packaging.request import ImageRequest, PackageRequest
from pipeline.report import Report

_PROBES: dict[str, tuple[str, str]] = {
    "docker": ("docker", "version"),
    "podman": ("podman", "info"),
    "buildah": ("buildah", "info"),
}
"""What fails where a builder is installed and cannot work, such as docker without its daemon."""

_ENVIRONMENT = {
    "BUILDAH_FORMAT": "docker",  # podman's and buildah's own format has no HEALTHCHECK
    "DOCKER_BUILDKIT": "1",  # docker's old builder has no secrets
}


@dataclass(frozen=True)
class _Bento:
    tag: str
    folder: Path
    pinned: str | None


def run(request: ImageRequest) -> Report:
    """Build an image from a Bento's own container file, with the Bento as the build context.

    `bentoml containerize` would build the same, but BentoML 1.4.39 refuses a Bento that brings a container file
    ("outside of current working directory") unless TMPDIR is below the current folder.

    Raises
    ------
    StoreError
        There is no working builder or no such Bento, the Bento cannot be built, or the build fails.
    """
    builder = _usable_builder(request)
    bento = _bento(request)
    name = request.tag or bento.tag
    _build(builder, bento, name, request)
    size = _said([builder, "images", "--format", "{{.Size}}", name])
    data = {"image": name, "builder": builder, "size": size, "bento": bento.tag, "pinned": bento.pinned}
    return Report(_summary(data), data)


def _usable_builder(request: ImageRequest) -> str:
    wanted = [request.builder] if request.builder else list(_PROBES)
    failures = {}
    for name in wanted:
        try:
            _said(_PROBES[name])
        except StoreError as error:
            failures[name] = str(error)
        else:
            return name
    reasons = "; ".join(failures.values())
    raise StoreError(f"no container builder works here ({reasons}); install or start {_either(wanted)}")


def _either(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _said(command: Sequence[str]) -> str:
    """What a command prints.

    Raises
    ------
    StoreError
        It cannot be run or fails; the message is its own last line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise StoreError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise StoreError(f"{command[0]}: {last[0]}")
    return done.stdout.strip()


def _bento(request: ImageRequest) -> _Bento:
    """Find the Bento that was asked for, or build one."""
    tag = request.bento or bentos.run(PackageRequest(conf=request.conf, unpinned=request.unpinned)).data["tag"]
    import bentoml

    try:
        bento = bentoml.bentos.get(tag)
    except bentoml.exceptions.BentoMLException as error:
        raise StoreError(f"{first_line(error)}; `bentoml list` shows the Bentos of this store") from None
    return _Bento(str(bento.tag), Path(bento.path), bento.info.labels.get("model"))


def _build(builder: str, bento: _Bento, name: str, request: ImageRequest) -> None:
    given = [f"build-arg=BASE={request.base}"] if request.base else []
    options = [f"--{option}" for option in [*given, *request.options]]
    file = bento.folder / "env/docker/Dockerfile"
    command = [builder, "build", "--file", str(file), "--tag", name, *options, str(bento.folder)]
    # A build takes minutes and is watched; stdout is the report's.
    done = subprocess.run(command, env={**os.environ, **_ENVIRONMENT}, stdout=sys.stderr, check=False)
    if done.returncode:
        raise StoreError(f"{builder} could not build the image of {bento.tag}; its messages are above")


def _summary(data: Mapping[str, str | None]) -> str:
    # buildah has nothing to serve with; podman sees the same images.
    runner = "docker" if data["builder"] == "docker" else "podman"
    return "\n".join(
        [
            f"Built {data['image']} with {data['builder']}",
            f"  from    {data['bento']}",
            f"  pinned  {data['pinned'] or 'nothing'}",
            f"  size    {data['size']}",
            "Next:",
            f"  {runner} run --rm -p 3000:3000 -e CREDIT_RISK_API_KEYS=… {data['image']}",
        ]
    )
