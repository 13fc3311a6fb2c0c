"""Draw the parameters of the next trial from the search space."""

from __future__ import annotations

from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from pipeline.training.settings import Range, TrainSettings


def distributions(settings: TrainSettings) -> dict[str, BaseDistribution]:
    """The search space, as Optuna has it."""
    return {str(name): _distribution(allowed) for name, allowed in settings.search_space.items()}


class SeededSampler(BaseSampler):
    """Optuna's TPE sampler, seeded anew for each trial by how many trials came before it.

    So a resumed study draws what it would have drawn, not its first numbers again, and two processes that drive
    one study never draw the same.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tpe = TPESampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed the sampler for this trial."""
        trials = study.get_trials(deepcopy=False)
        before = sum(other.number < trial.number and other.state != TrialState.FAIL for other in trials)
        self._tpe = TPESampler(seed=(self._seed * 100_003 + before) % 2**32)
        self._tpe.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As TPE does."""
        return dict(self._tpe.infer_relative_search_space(study, trial))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE does."""
        return dict(self._tpe.sample_relative(study, trial, search_space))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE does."""
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)


def _distribution(allowed: Range) -> BaseDistribution:
    if allowed.integer:
        return IntDistribution(int(allowed.low), int(allowed.high), log=allowed.log)
    return FloatDistribution(allowed.low, allowed.high, log=allowed.log)
