"""Booster, DictVectorizer and contract in, a version of the registered MLflow model out, and back.

The model's ``artifacts`` folder holds ``booster.ubj``, ``vectorizer.skops`` and ``schema.yaml``; the code that
joins them is ``pipeline/registry/pyfunc.py``. Nothing is pickled: opening a model needs no trust in who wrote it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import xgboost as xgb
import yaml
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.errors import TrackingError, first_line
from pipeline.core.files import sha256
from pipeline.core.model.features import feature_names_digest
from pipeline.core.promoted import MODEL_NAME
from pipeline.registry.client import CANDIDATE

BOOSTER, VECTORIZER, SCHEMA = "booster", "vectorizer", "schema"
FILES = {BOOSTER: "booster.ubj", VECTORIZER: "vectorizer.skops", SCHEMA: "schema.yaml"}
"""Names of the parts, and of their files in the model's ``artifacts`` folder."""

DIGESTS, SCHEMA_DIGEST, FEATURES_DIGEST = "digests", "schema_digest", "features_digest"
"""Keys of the model's metadata: sha256 of each file, of the contract, of the column names in order."""

DATA, DATA_DIGEST, SEED, TEST_SHARE = "train.data", "train.data_digest", "train.seed", "train.test_share"
"""Parameters of the training run that say which rows were held out: see `pipeline.tables.holdout`."""

_REQUIREMENTS = (
    "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "scikit-learn", "skops", "typing-extensions",
    "xgboost",
)  # fmt: skip
"""What loading and predicting import. Given to MLflow, because inferring it costs 8 s a model."""


class Parts(NamedTuple):
    """What a model is made of."""

    booster: xgb.Booster
    vectorizer: DictVectorizer
    schema: Schema


def log_model(
    booster: xgb.Booster, vectorizer: DictVectorizer, schema: Schema, *, metadata: Mapping[str, Any] | None = None
) -> Any:
    """Log the model to the active MLflow run and register it as the newest version, alias `CANDIDATE`.

    Parameters
    ----------
    metadata
        Facts that travel with the model beside its digests: plain values.

    Returns
    -------
    mlflow.entities.model_registry.ModelVersion
        The new version of `MODEL_NAME`.
    """
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), Parts(booster, vectorizer, schema))
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={part: str(Path(folder) / name) for part, name in FILES.items()},
            code_paths=[str(Path(__file__).parents[1])],
            pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
            signature=signature(schema),
            input_example=pd.DataFrame([schema.example()]),
            metadata={**(metadata or {}), **_digests(Path(folder), vectorizer, schema)},
            registered_model_name=MODEL_NAME,
        )
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(MODEL_NAME, CANDIDATE, info.registered_model_version)
    return client.get_model_version(MODEL_NAME, str(info.registered_model_version))


def load_parts(uri: str) -> Parts:
    """Load a model's parts, every file verified against the digests recorded when it was logged.

    Parameters
    ----------
    uri
        ``models:/NAME/3``, ``models:/NAME@candidate``, ``runs:/RUN/model`` or a folder.

    Raises
    ------
    TrackingError
        The model is absent, is not one of this project's, or a file of it was altered.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        folder = Path(download_artifacts(artifact_uri=uri))
        metadata = Model.load(str(folder)).metadata or {}
    except (MlflowException, OSError) as error:
        reason = first_line(error)
        raise TrackingError(f"{uri}: cannot be loaded ({reason}); name a model that is registered") from None
    # A damaged booster file can crash the process that reads it: digests first.
    _verify(folder / "artifacts", metadata.get(DIGESTS), uri)
    return read_parts(folder / "artifacts")


def pinned(uri: str) -> str:
    """Name a model exactly: an alias becomes the version that it stands for now.

    Raises
    ------
    TrackingError
        There is no such alias, or MLflow cannot be reached.
    """
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if not uri.startswith("models:/") or not at:
        return uri
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        reason = first_line(error)
        raise TrackingError(f"{uri}: cannot be found ({reason}); name a model that is registered") from None


def signature(schema: Schema) -> Any:
    """MLflow signature of the model: the contract's fields in, one probability of default a row out.

    Inputs are declared ``any``: MLflow refuses an int64 column where a double is declared, and a categorical
    column where a string is. The contract checks them instead.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType
    from mlflow.types import Schema as Columns
    from mlflow.types.schema import AnyType

    inputs = [ColSpec(AnyType(), name, required=not field.optional) for name, field in schema.fields.items()]
    return ModelSignature(inputs=Columns(inputs), outputs=Columns([ColSpec(DataType.float)]))


def write_parts(folder: Path, parts: Parts) -> None:
    """Write the three files of a model into a folder."""
    import skops.io  # costs two seconds, which reading the names above must not pay

    parts.booster.save_model(folder / FILES[BOOSTER])
    skops.io.dump(parts.vectorizer, folder / FILES[VECTORIZER])
    document = yaml.safe_dump(parts.schema.document(), sort_keys=False, allow_unicode=True)
    (folder / FILES[SCHEMA]).write_text(document, encoding="utf-8")


def read_parts(folder: Path) -> Parts:
    """Read the three files of a model; skops admits no type beyond scikit-learn's and numpy's own."""
    import skops.io

    schema = load_schema(yaml.safe_load((folder / FILES[SCHEMA]).read_text(encoding="utf-8")))
    return Parts(
        xgb.Booster(model_file=folder / FILES[BOOSTER]), skops.io.load(folder / FILES[VECTORIZER]), schema
    )


def _digests(folder: Path, vectorizer: DictVectorizer, schema: Schema) -> dict[str, Any]:
    return {
        DIGESTS: {name: sha256((folder / name).read_bytes()) for name in FILES.values()},
        SCHEMA_DIGEST: schema.digest,
        FEATURES_DIGEST: feature_names_digest(vectorizer),
    }


def _verify(folder: Path, digests: Mapping[str, str] | None, uri: str) -> None:
    if digests is None:
        raise TrackingError(f"{uri}: must be a model logged by `python -m pipeline train`, and holds no digests")
    for name in FILES.values():
        if not (folder / name).is_file() or sha256((folder / name).read_bytes()) != digests.get(name):
            raise TrackingError(f"{uri}: {name} is absent or altered since it was logged; train or restore it")
