from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.training.command import run
from pipeline.training.interruptions import Interruptions, resumable
from pipeline.training.request import TrainRequest
from tests.testkit import DATA, PROJECT

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def steps_of(training: Callable[[Interruptions, list[str]], None]) -> list[str]:
    """Run a training that is interrupted; returns the steps that it took."""
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt, match="study s keeps its finished trials: run the same command again"):
        _run(training, steps)
    return steps


def _run(training: Callable[[Interruptions, list[str]], None], steps: list[str]) -> None:
    with resumable("s") as interruptions:
        training(interruptions, steps)


@BOTH
def test_a_signal_interrupts_at_once(number: signal.Signals) -> None:
    def training(_: Interruptions, steps: list[str]) -> None:
        steps.append("before")
        signal.raise_signal(number)
        steps.append("after")

    assert steps_of(training) == ["before"]


@BOTH
def test_a_deferred_section_is_finished_first(number: signal.Signals) -> None:
    def training(interruptions: Interruptions, steps: list[str]) -> None:
        with interruptions.deferred():
            signal.raise_signal(number)
            steps.append("statement finished")
        steps.append("after")

    assert steps_of(training) == ["statement finished"]


def test_the_end_of_a_training_is_not_cut_short_by_further_signals() -> None:
    def training(_: Interruptions, steps: list[str]) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            steps.append("ended")

    assert steps_of(training) == ["ended"]


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruptions().handled():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_training_runs_on_a_thread_that_is_not_the_main_one(
    tmp_path: Path, tracking_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notebooks and schedulers run it there, where Python refuses to install signal handlers."""
    values = yaml.safe_load((PROJECT / "conf/train.yaml").read_text())
    values |= {"max_rounds": 10, "trials": 2, "workers": 1, "folds": 2, "experiment": "tests", "data": str(DATA)}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values | {"storage": f"sqlite:///{tmp_path}/optuna.db"}))
    monkeypatch.chdir(tmp_path)
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run(TrainRequest(config=tmp_path / "train.yaml"))))
    thread.start()
    thread.join(240)
    assert reports[0].data["trials"] == 2
    assert reports[0].data["test"]["auc"] > 0.7
