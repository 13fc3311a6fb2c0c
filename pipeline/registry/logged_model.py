"""Log a model to MLflow as a registered version, and open one again.

The model's ``artifacts`` folder holds ``booster.ubj``, ``vectorizer.skops``, ``schema.yaml`` and
``golden_rows.json``. For users of MLflow's own ``predict`` it also holds code, ``pipeline/registry/pyfunc.py`` and
this package; nothing in this project runs that code, and nothing in it is a pickle.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xgboost as xgb
import yaml
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.errors import TrackingError, first_line
from pipeline.core.files import file_digests
from pipeline.core.model.encoders import RowEncoder
from pipeline.core.model.features import Matrix, feature_names_digest
from pipeline.core.model.golden import golden_rows
from pipeline.core.promoted import MODEL_NAME
from pipeline.registry.client import CANDIDATE, asking
from pipeline.registry.seal import fetch, read_seal, record_seal, unsealed

BOOSTER, VECTORIZER, SCHEMA = "booster", "vectorizer", "schema"
FILES = {BOOSTER: "booster.ubj", VECTORIZER: "vectorizer.skops", SCHEMA: "schema.yaml"}
"""Names of the parts, and of their files in the model's ``artifacts`` folder."""

GOLDEN_ROWS = "golden_rows"
_GOLDEN_FILE = "golden_rows.json"

SCHEMA_DIGEST, FEATURES_DIGEST = "schema_digest", "features_digest"
"""Keys of the model's metadata: sha256 of the contract, and of the column names in order."""

DATA, DATA_DIGEST, SEED, TEST_SHARE = "train.data", "train.data_digest", "train.seed", "train.test_share"
"""Parameters of the training run that say which rows were held out: see `pipeline.tables.holdout`."""

_REQUIREMENTS = (
    "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "scikit-learn", "skops", "typing-extensions",
    "xgboost",
)  # fmt: skip
"""What loading and predicting import. Given to MLflow, because inferring it costs 8 s a model."""


_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")


class Parts(NamedTuple):
    """What a model is made of."""

    booster: xgb.Booster
    vectorizer: DictVectorizer
    schema: Schema

    def probabilities(self, rows: Sequence[Mapping[str, Any]]) -> Matrix:
        """Probabilities of default of valid applications, in [0, 1]: shape (n,), float32."""
        matrix = RowEncoder(self.schema, self.vectorizer).transform(rows)
        return np.asarray(self.booster.inplace_predict(matrix), dtype=np.float32)


class OpenedModel(NamedTuple):
    """A logged model, verified.

    Attributes
    ----------
    uri
        Its exact name: a version, never an alias.
    parts
        What it is made of.
    golden
        ``rows`` and the ``probabilities`` that it gave for them when it was logged.
    """

    uri: str
    parts: Parts
    golden: Mapping[str, Any]


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

    parts = Parts(booster, vectorizer, schema)
    rows = golden_rows(schema)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder, parts)
        (folder / _GOLDEN_FILE).write_text(json.dumps(rows), encoding="utf-8")
        files = {**FILES, GOLDEN_ROWS: _GOLDEN_FILE}
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={part: str(folder / file) for part, file in files.items()},
            code_paths=[str(Path(__file__).parents[1])],
            pip_requirements=[f"{package}=={version(package)}" for package in _REQUIREMENTS],
            signature=signature(schema),
            input_example=pd.DataFrame([schema.example()]),
            metadata={
                **(metadata or {}),
                SCHEMA_DIGEST: schema.digest,
                FEATURES_DIGEST: feature_names_digest(vectorizer),
            },
        )
        client = mlflow.MlflowClient()
        own = {f"artifacts/{file}": digest for file, digest in file_digests(folder).items()}
        record_seal(client, info.model_id, parts.probabilities(rows).tolist(), own)
    # Registered once it is sealed: a version that anybody can see can be promoted.
    registered = mlflow.register_model(f"models:/{info.model_id}", MODEL_NAME)
    client.set_registered_model_alias(MODEL_NAME, CANDIDATE, registered.version)
    return client.get_model_version(MODEL_NAME, str(registered.version))


def open_model(uri: str) -> OpenedModel:
    """Open a logged model, after every file was compared with the digests in the tracking database.

    None of the model's code runs, and MLflow's description of it is not read.

    Parameters
    ----------
    uri
        ``models:/NAME/3``, ``models:/NAME@candidate``, ``models:/m-ID`` or ``runs:/RUN/model``.

    Raises
    ------
    TrackingError
        The model is absent, is not one of this project's, or a file of it was changed, added or removed.
    """
    with asking() as client, tempfile.TemporaryDirectory(prefix="credit-risk-model-") as folder:
        exact, model_id = _found(client, uri)
        seal = read_seal(client, model_id, exact)
        contents = fetch(client, model_id, seal, Path(folder), exact)
    rows = json.loads(contents[f"artifacts/{_GOLDEN_FILE}"])
    return OpenedModel(exact, _parts(contents), {"rows": rows, "probabilities": list(seal.golden)})


def _found(client: Any, uri: str) -> tuple[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return _resolved(client, uri)
    except MlflowException as error:
        raise TrackingError(
            f"{uri}: cannot be found ({first_line(error)}); name a model that is registered"
        ) from None


def _resolved(client: Any, uri: str) -> tuple[str, str]:
    """Return the exact name and the id of a model: an alias becomes the version that it names now."""
    kind, _, rest = uri.partition(":/")
    if kind == "runs" and rest.count("/") == 1:
        return uri, _model_of_run(client, *rest.split("/"))
    if kind != "models" or not rest:
        raise TrackingError(f"{uri}: must be models:/NAME/VERSION, models:/NAME@ALIAS or runs:/RUN/NAME")
    if _MODEL_ID.fullmatch(rest):
        return uri, rest
    name, at, alias = rest.partition("@")
    if at:
        registered = client.get_model_version_by_alias(name, alias)
    else:
        name, _, number = rest.rpartition("/")
        registered = client.get_model_version(name, number)
    exact = f"models:/{name}/{registered.version}"
    model_id = str(registered.source).removeprefix("models:/")
    if not _MODEL_ID.fullmatch(model_id):
        raise unsealed(exact)
    return exact, model_id


def _model_of_run(client: Any, run_id: str, name: str) -> str:
    experiment = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"):
        if model.name == name:
            return str(model.model_id)
    raise TrackingError(f"runs:/{run_id}/{name}: the run logged no model of this name; name a run of `train`")


def signature(schema: Schema) -> Any:
    """MLflow signature of the model: it takes the contract's fields and returns a probability of default per row.

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
    """Read the three files of a model from a folder that is trusted."""
    return _parts({f"artifacts/{name}": (folder / name).read_bytes() for name in FILES.values()})


def _parts(contents: Mapping[str, bytes]) -> Parts:
    """Read the parts from the very bytes that were verified; skops admits only types of scikit-learn and numpy."""
    import skops.io

    booster, vectorizer, schema = (contents[f"artifacts/{FILES[part]}"] for part in (BOOSTER, VECTORIZER, SCHEMA))
    return Parts(
        xgb.Booster(model_file=bytearray(booster)),
        skops.io.loads(vectorizer),
        load_schema(yaml.safe_load(schema.decode())),
    )
