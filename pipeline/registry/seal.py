"""The seal of a logged model: digests of its files and its golden answers, kept apart from the files.

Somebody who can write MLflow's artifacts must not be able to change what is promoted, or to run code there. So
``train`` records the digest of every file of the model, and what the model answers to its golden rows, in the
tracking database; everything that opens a model compares its files first, and runs no code among them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import TrackingError, first_line
from pipeline.core.files import file_digests, sha256

DIGESTS_TAG, GOLDEN_TAG = "credit_risk.digests", "credit_risk.golden"
"""Tags of MLflow's logged model that hold the seal."""

_WRITTEN_BY_MLFLOW = "registered_model_meta"
"""MLflow writes this file into a local artifact folder whenever somebody opens a version by its name."""

_DIGESTS = TypeAdapter(dict[str, str])
_PROBABILITIES = TypeAdapter(list[float])


@dataclass(frozen=True)
class Seal:
    """What `train` recorded of a logged model.

    Attributes
    ----------
    digests
        Sha256 of every file of the model, by its path.
    golden
        Probabilities of default that the model gave for its golden rows.
    """

    digests: Mapping[str, str]
    golden: Sequence[float]


def record_seal(client: Any, model_id: str, golden: Sequence[float], own: Mapping[str, str]) -> None:
    """Seal a model that was just logged.

    Parameters
    ----------
    client
        MLflow's client.
    golden
        What the model answers to its golden rows.
    own
        Digests of the files that were given to MLflow, by their path in the model.

    Raises
    ------
    TrackingError
        A file in the artifact store is not the one that was given.
    """
    with tempfile.TemporaryDirectory() as folder:
        digests = file_digests(_download(client.get_logged_model(model_id).artifact_location, Path(folder)))
        digests.pop(_WRITTEN_BY_MLFLOW, None)
    if changed := [name for name, digest in own.items() if digests.get(name) != digest]:
        raise TrackingError(
            f"{', '.join(changed)}: changed in the artifact store while the model was logged; train again"
        )
    client.set_logged_model_tags(
        model_id, {DIGESTS_TAG: json.dumps(digests), GOLDEN_TAG: json.dumps([float(value) for value in golden])}
    )


def read_seal(client: Any, model_id: str, shown: str) -> Seal:
    """Read what was recorded of a model.

    Parameters
    ----------
    shown
        What to call the model in an error.

    Raises
    ------
    TrackingError
        Nothing, or nothing readable, was recorded.
    """
    tags = client.get_logged_model(model_id).tags
    try:
        return Seal(
            _DIGESTS.validate_json(tags[DIGESTS_TAG]), _PROBABILITIES.validate_json(tags[GOLDEN_TAG], strict=True)
        )
    except (KeyError, ValidationError):
        raise unsealed(shown) from None


def unsealed(shown: str) -> TrackingError:
    """Make the error for a model without a seal."""
    return TrackingError(
        f"{shown}: the tracking database holds no digests of its files, as for models logged before release 0.2. "
        "Run `python -m pipeline train` again with the same settings: a finished study is refitted at once and "
        "registered as a new version"
    )


def fetch(client: Any, model_id: str, seal: Seal, folder: Path, shown: str) -> Mapping[str, bytes]:
    """Download a model, compare every file with its seal, and give their contents. Nothing is interpreted.

    Parameters
    ----------
    folder
        Where to download to.
    shown
        What to call the model in an error.

    Raises
    ------
    TrackingError
        A file is absent, was changed or was added since the model was logged.
    """
    try:
        root = _download(client.get_logged_model(model_id).artifact_location, folder)
        contents = {
            path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
        contents.pop(_WRITTEN_BY_MLFLOW, None)
    except OSError as error:
        raise TrackingError(f"{shown}: its files cannot be read ({first_line(error)}); restore them") from None
    problems = [
        *(f"{name} is missing" for name in sorted(seal.digests.keys() - contents.keys())),
        *(f"{name} was added" for name in sorted(contents.keys() - seal.digests.keys())),
        *(
            f"{name} was changed"
            for name, content in sorted(contents.items())
            if name in seal.digests and sha256(content) != seal.digests[name]
        ),
    ]
    if problems:
        raise TrackingError(
            f"{shown}: not the files that were logged: {', '.join(problems)}; "
            "restore them in the artifact store, or train again"
        )
    return contents


def _download(location: str, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    target = folder / "logged-model"
    target.mkdir()
    return Path(download_artifacts(artifact_uri=location, dst_path=str(target)))
