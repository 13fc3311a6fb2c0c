"""Candidate and champion are compared on rows that neither was trained on, each by its own model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.core.files import file_digests
from pipeline.core.model.encoders import FrameEncoder
from pipeline.promotion.evidence import gather
from pipeline.promotion.pointer import write_pointer
from pipeline.promotion.staging import Stored, reopen
from pipeline.registry import client as champion
from pipeline.registry.logged_model import SEED, TEST_SHARE, open_model
from pipeline.tables.holdout import is_test_row
from tests.testkit.registry import BETTER, GOOD, Machine


@pytest.fixture
def machine(promoted_machine: Machine) -> Iterator[Machine]:
    """A machine on which the first good version is promoted, with this process on it."""
    with promoted_machine.entered():
        yield promoted_machine


def stored(machine: Machine) -> Stored:
    """The promoted version, opened."""
    promotion = machine.pointer()
    assert promotion
    found = reopen(promotion.tag, promotion.digests)
    assert found
    return found


def answers(version: int, rows: pd.DataFrame) -> Any:
    """What MLflow's version answers."""
    parts = open_model(f"models:/credit_risk_model/{version}").parts
    return parts.booster.inplace_predict(FrameEncoder(parts.schema, parts.vectorizer).transform(rows))


@pytest.mark.parametrize("changed", [{SEED: "7"}, {TEST_SHARE: "0.4"}, {}])
def test_rows_of_either_ones_training_are_left_out_and_counted(
    machine: Machine, schema: Schema, applications: pd.DataFrame, changed: dict[str, str]
) -> None:
    before, after = champion.by_number(GOOD), champion.by_number(BETTER)
    candidate = replace(after, parameters={**after.parameters, **changed})
    evidence, rests_on = gather(candidate, stored(machine), before, None)
    seed, share = int(candidate.parameters[SEED]), float(candidate.parameters[TEST_SHARE])
    held_out = is_test_row(applications, schema, seed, share)
    unseen = held_out & is_test_row(applications, schema, 42, 0.2)
    np.testing.assert_array_equal(evidence.labels, schema.labels(applications[unseen]))
    np.testing.assert_array_equal(evidence.champion, answers(GOOD, applications[unseen]))
    np.testing.assert_array_equal(evidence.candidate, evidence.champion)  # the same model is staged
    assert f"on {unseen.sum():,} held-out rows" in rests_on
    left_out = f"{held_out.sum() - unseen.sum():,} more were in credit_risk_model:v1's training"
    assert evidence.holdout_note.startswith(left_out) if changed else evidence.holdout_note == ""


def test_a_champion_of_another_run_is_not_taken_from_the_store_under_its_tag(
    machine: Machine, schema: Schema, applications: pd.DataFrame
) -> None:
    assert machine.run("promote", "--version", str(BETTER)).code == 0
    shutil.rmtree(machine.folder(GOOD))
    shutil.copytree(machine.folder(BETTER), machine.folder(GOOD))
    promotion = machine.pointer()
    assert promotion
    foreign = {"tag": "credit_risk_model:v1", "version": GOOD, "run_id": "f" * 32}
    write_pointer(promotion.model_copy(update={**foreign, "digests": file_digests(machine.folder(GOOD))}))
    evidence, _ = gather(champion.by_number(BETTER), stored(machine), champion.by_number(GOOD), None)
    rows = applications[is_test_row(applications, schema, 42, 0.2)]
    np.testing.assert_array_equal(evidence.champion, answers(GOOD, rows))
    np.testing.assert_array_equal(evidence.candidate, answers(BETTER, rows))
