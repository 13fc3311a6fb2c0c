"""Draw the parameters of the next trial from the search space."""

from __future__ import annotations

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from pipeline.training.settings import Range, TrainSettings


def distributions(settings: TrainSettings) -> dict[str, BaseDistribution]:
    """The search space, as Optuna has it."""
    return {str(name): _distribution(allowed) for name, allowed in settings.search_space.items()}


def sampler(settings: TrainSettings, asked: int) -> optuna.samplers.BaseSampler:
    """Make the sampler of a study that has asked for so many trials already."""
    # Seeded for each trial: a resumed study draws what it would have drawn, and not its first numbers again.
    return optuna.samplers.TPESampler(seed=(settings.seed * 100_003 + asked) % 2**32)


def _distribution(allowed: Range) -> BaseDistribution:
    if allowed.integer:
        return IntDistribution(int(allowed.low), int(allowed.high), log=allowed.log)
    return FloatDistribution(allowed.low, allowed.high, log=allowed.log)
