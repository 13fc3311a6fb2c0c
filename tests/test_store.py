"""What stands in the store answers as MLflow's model does, and nothing altered is ever opened."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import bentoml
import cloudpickle
import mlflow
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb

from pipeline.core.contract.checks import violations
from pipeline.core.contract.requests import request_validator
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import StoreError
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import open_bundle
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.golden import golden_rows
from pipeline.core.promoted import Promotion
from pipeline.promotion.staging import stage
from pipeline.promotion.store_folders import is_intact, prune
from pipeline.registry.logged_model import open_model
from tests.testkit.registry import Machine

FILES = ("saved_model.ubj", "custom_objects.pkl", "model.yaml")


def promoted(machine: Machine) -> Promotion:
    found = machine.pointer()
    assert found
    return found


def test_the_stored_model_answers_as_mlflow_does_for_every_applicant(
    promoted_machine: Machine, applications: pd.DataFrame
) -> None:
    with promoted_machine.entered():
        bundle = open_bundle(promoted_machine.folder(1), promoted(promoted_machine).digests)
        columns = list(bundle.schema.fields)
        rows: Any = applications[columns].astype(object).where(applications[columns].notna(), None)
        model = mlflow.pyfunc.load_model("models:/credit_risk_model/1")
        expected = np.asarray(model.predict(rows))
    matrix = FrameEncoder(bundle.schema, bundle.vectorizer).transform(applications)
    assert np.abs(bundle.probabilities(matrix) - expected).max() <= 1e-6
    assert bundle.golden_difference() <= 1e-6


def test_bentoml_itself_finds_the_version_and_calls_it_latest(
    promoted_machine: Machine,
) -> None:
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    BentoMLContainer.model_store.set(ModelStore(promoted_machine.home / "models"))
    try:
        assert [str(model.tag) for model in bentoml.models.list()] == ["credit_risk_model:v1"]
        model = bentoml.models.get("credit_risk_model:latest")
        assert str(model.tag) == "credit_risk_model:v1"
        assert set(model.custom_objects) == {"DictVectorizer", "schema", "golden"}
        columns = model.custom_objects["DictVectorizer"].feature_names_
        assert bentoml.xgboost.load_model(model).num_features() == len(columns)
    finally:
        BentoMLContainer.model_store.reset()


def test_golden_rows_come_from_the_contract_keep_it_and_are_always_the_same(schema: Schema) -> None:
    rows = golden_rows(schema)
    assert rows == golden_rows(schema)
    assert not list(violations(pd.DataFrame(rows), schema))
    validate = request_validator(schema).validate_python
    for row in rows:
        validate(row)
    for name, field in schema.fields.items():
        assert {row[name] for row in rows} >= set(field.categories)


@pytest.mark.parametrize("name", FILES)
def test_one_altered_byte_in_any_file_refuses_the_model_before_it_is_opened(
    promoted_machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        pytest.fail("an altered model was opened")

    monkeypatch.setattr(cloudpickle, "loads", opened)
    monkeypatch.setattr(xgb, "Booster", opened)
    path, digests = promoted_machine.folder(1) / name, promoted(promoted_machine).digests
    whole = path.read_bytes()
    generator = random.Random(name)
    for position in generator.sample(range(len(whole)), 20):
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ (1 << generator.randrange(8))]) + whole[position + 1 :]
        )
        with pytest.raises(StoreError, match=f"{name}: its sha256"):
            open_bundle(promoted_machine.folder(1), digests)


@pytest.mark.parametrize("name", FILES)
def test_an_absent_or_a_foreign_file_refuses_the_model(promoted_machine: Machine, name: str) -> None:
    folder, digests = promoted_machine.folder(1), promoted(promoted_machine).digests
    (folder / "foreign.py").write_text("")
    with pytest.raises(StoreError, match=r"absent or unexpected: foreign\.py"):
        open_bundle(folder, digests)
    (folder / "foreign.py").unlink()
    (folder / name).unlink()
    with pytest.raises(StoreError, match=f"absent or unexpected: {name}"):
        open_bundle(folder, digests)


class Planted:
    """A pickle that writes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_planted_pickle_never_runs(promoted_machine: Machine, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (promoted_machine.folder(1) / "custom_objects.pkl").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(StoreError):
        open_bundle(promoted_machine.folder(1), promoted(promoted_machine).digests)
    # Neither does any command open it: the version is staged again from MLflow.
    again = promoted_machine.run("promote", "--version", "1")
    assert again.code == 0, again.err
    assert "stored again" in again.out
    assert not mark.exists()
    assert file_digests(promoted_machine.folder(1)) == promoted(promoted_machine).digests


def test_a_model_that_no_longer_answers_as_it_did_is_refused(promoted_machine: Machine) -> None:
    folder = promoted_machine.folder(1)
    objects = cloudpickle.loads((folder / "custom_objects.pkl").read_bytes())
    objects["golden"]["probabilities"][0] += 2e-6
    (folder / "custom_objects.pkl").write_bytes(cloudpickle.dumps(objects))
    with pytest.raises(StoreError, match="golden rows"):
        open_bundle(folder, file_digests(folder)).check_golden()


def test_a_booster_that_a_full_disk_cut_is_refused_before_it_is_opened(
    promoted_machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = bentoml.xgboost.save_model

    def save_and_cut(*arguments: Any, **options: Any) -> Any:
        model = save(*arguments, **options)
        # What a write without space leaves, without a word.
        os.truncate(tmp_path / "models/credit_risk_model/v2/saved_model.ubj", 1000)
        return model

    monkeypatch.setattr(bentoml.xgboost, "save_model", save_and_cut)
    with promoted_machine.entered(), pytest.raises(StoreError, match="not written whole; free space"):
        stage(open_model("models:/credit_risk_model/2"), "credit_risk_model:v2", tmp_path, {})


def test_pruning_keeps_the_newest_and_the_protected_and_foreign_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    home = tmp_path / "models/credit_risk_model"
    for name in ("v1", "v2", "v3", "v4", "v10", "mine"):
        (home / name).mkdir(parents=True)
    tags = {name: f"credit_risk_model:{name}" for name in ("v1", "v2", "v3", "v4", "v10")}
    order = [tags["v10"], tags["v3"], tags["v2"], tags["v1"]]
    removed = prune(3, order, [tags["v10"], tags["v1"]])
    # v4 was never promoted; v1 is the previous one.
    assert removed == [tags["v2"], tags["v4"]]
    assert {path.name for path in home.iterdir()} == {"v1", "v3", "v10", "mine"}
    assert not is_intact(tags["v2"], {"saved_model.ubj": "0" * 64})
