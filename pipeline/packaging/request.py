"""What ``package`` and ``image`` are asked to do."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.settings import Request


class PackageRequest(Request):
    """Flags of ``package``."""

    unpinned: bool = False
    """Build without a model inside: the Bento then serves a mounted store only."""


class ImageRequest(Request):
    """Flags of ``image``."""

    builder: Literal["docker", "podman", "buildah"] | None = None
    """What builds; None: the first of them that works."""
    bento: str | None = None
    """Tag of the Bento; None: a new one is built."""
    unpinned: bool = False
    """Build the new Bento without a model inside."""
    base: str | None = None
    """The image to build on; None: that of the container file."""
    tag: str | None = None
    """Name of the image; None: the Bento's tag."""
    options: list[str] = Field(default_factory=list)
    """Further options of the builder, such as ``network=host``."""
