"""What the front and the scorer agree on: path, headers, and the secret that lets one call the other."""

from __future__ import annotations

import os

import orjson

from pipeline.core.promoted import Promotion

PATH = "/score"

VERSION_HEADER = "x-version"
"""Names the version that is to score: see `version_name`."""

TOKEN_HEADER = "x-scorer-token"  # noqa: S105 # a header's name

TOKEN_VARIABLE = "CREDIT_RISK_SCORER_TOKEN"  # noqa: S105 # a variable's name
"""Environment variable with the secret. ``bentoml serve service:front`` makes one up for all its processes."""


def version_name(promotion: Promotion) -> bytes:
    """Name exactly one version, by its tag and the digests of its files."""
    return orjson.dumps({"tag": promotion.tag, "digests": promotion.digests}, option=orjson.OPT_SORT_KEYS)


def token() -> str:
    """Return the secret of this process."""
    return os.environ[TOKEN_VARIABLE]
