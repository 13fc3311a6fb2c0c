"""What ``package`` is asked to do."""

from __future__ import annotations

from pipeline.core.settings import Request


class PackageRequest(Request):
    """Flags of ``package``."""

    unpinned: bool = False
    """Build without a model inside: the Bento then serves a mounted store only."""
