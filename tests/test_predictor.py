from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xgboost as xgb

from pipeline.core.model.features import Matrix
from pipeline.core.model.predictor import Predictor

RNG = np.random.default_rng(7)
COLUMNS = 5


@pytest.fixture(scope="module")
def booster() -> xgb.Booster:
    """A few trees over five columns, some values missing."""
    matrix = with_missing(400)
    labels = (np.nansum(matrix, axis=1) > COLUMNS / 2).astype(np.float32)
    return xgb.train({"objective": "binary:logistic", "nthread": 1}, xgb.QuantileDMatrix(matrix, labels), 20)


def with_missing(rows: int) -> Matrix:
    matrix = RNG.random((rows, COLUMNS), dtype=np.float32)
    matrix[RNG.random(matrix.shape) < 0.1] = np.nan
    return matrix


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 1000])
def test_it_gives_what_xgboost_gives_bit_for_bit(booster: xgb.Booster, rows: int) -> None:
    predict, matrix = Predictor(booster), with_missing(rows)
    given = predict(matrix)
    expected = booster.inplace_predict(matrix)
    assert given.dtype == np.float32
    assert given.shape == (rows,)
    assert given.tobytes() == expected.tobytes()


def test_an_earlier_result_outlives_the_next_call(booster: xgb.Booster) -> None:
    predict, first, second = Predictor(booster), with_missing(8), with_missing(8)
    kept = predict(first)
    predict(second)
    assert kept.tobytes() == booster.inplace_predict(first).tobytes()


def test_threads_do_not_take_each_others_results(booster: xgb.Booster) -> None:
    predict = Predictor(booster)
    matrices = [with_missing(32) for _ in range(2)]

    def wrong(matrix: Matrix) -> int:
        expected = booster.inplace_predict(matrix).tobytes()
        return sum(predict(matrix).tobytes() != expected for _ in range(3000))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(wrong, matrices)) == [0, 0]
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("matrix", [np.asfortranarray(with_missing(16)), with_missing(32)[::2], np.zeros((3, 5))])
def test_any_layout_is_read_as_it_is_meant(booster: xgb.Booster, matrix: Matrix) -> None:
    plain = np.ascontiguousarray(matrix, dtype=np.float32)
    assert Predictor(booster)(matrix).tobytes() == booster.inplace_predict(plain).tobytes()


def test_rows_of_another_width_are_refused(booster: xgb.Booster) -> None:
    with pytest.raises(ValueError, match="columns"):
        Predictor(booster)(np.zeros((2, COLUMNS + 1), dtype=np.float32))


def test_it_keeps_the_booster_that_it_scores_with() -> None:
    matrix = with_missing(50)
    booster = xgb.train({"objective": "binary:logistic"}, xgb.QuantileDMatrix(matrix, np.arange(50) % 2), 3)
    expected = booster.inplace_predict(matrix).tobytes()
    predict = Predictor(booster)
    del booster
    assert predict(matrix).tobytes() == expected
