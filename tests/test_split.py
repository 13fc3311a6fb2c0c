from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.tables.holdout import is_test_row

SHARE = 0.2


def test_rows_keep_their_side_whatever_happens_to_the_others(schema: Schema, applications: pd.DataFrame) -> None:
    before = pd.Series(is_test_row(applications, schema, 42, SHARE), index=applications.index)
    shuffled = applications.sample(frac=0.7, random_state=1)
    more = pd.concat([shuffled, applications.sample(500, random_state=2).assign(age=99.0)])
    after = is_test_row(more, schema, 42, SHARE)[: len(shuffled)]
    np.testing.assert_array_equal(after, before[shuffled.index])


def test_equal_rows_go_to_one_side(schema: Schema, applications: pd.DataFrame) -> None:
    twice = pd.concat([applications, applications])
    sides = is_test_row(twice, schema, 42, SHARE).reshape(2, -1)
    np.testing.assert_array_equal(sides[0], sides[1])


def test_corrected_label_does_not_move_a_row(schema: Schema, applications: pd.DataFrame) -> None:
    flipped = applications.assign(status="ok")
    np.testing.assert_array_equal(
        is_test_row(flipped, schema, 42, SHARE), is_test_row(applications, schema, 42, SHARE)
    )


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_share_is_met(schema: Schema, applications: pd.DataFrame, share: float) -> None:
    # Five standard deviations of a binomial share over 4,454 rows.
    assert is_test_row(applications, schema, 42, share).mean() == pytest.approx(share, abs=0.038)


def test_seeds_give_independent_splits(schema: Schema, applications: pd.DataFrame) -> None:
    one = is_test_row(applications, schema, 1, 0.5)
    two = is_test_row(applications, schema, 2, 0.5)
    assert np.mean(one == two) == pytest.approx(0.5, abs=0.04)


def test_seeds_give_independent_splits_of_a_table_of_numbers_alone(
    schema: Schema, applications: pd.DataFrame
) -> None:
    fields = {name: field for name, field in schema.fields.items() if field.is_numeric}
    numbers = schema.model_copy(update={"fields": fields})
    one, two = (is_test_row(applications, numbers, seed, 0.5) for seed in (1, 2))
    assert np.mean(one == two) == pytest.approx(0.5, abs=0.04)
