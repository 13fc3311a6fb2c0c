from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import ConfigError
from pipeline.core.policy import Policy
from pipeline.core.settings import Settings
from pipeline.promotion.settings import PromoteSettings
from pipeline.training.settings import TrainSettings
from service.settings import ServeSettings
from tests.testkit import PROJECT

SHIPPED = [
    ("schema.yaml", Schema),
    ("train.yaml", TrainSettings),
    ("promote.yaml", PromoteSettings),
    ("serve.yaml", ServeSettings),
]


@pytest.mark.parametrize(("name", "model"), SHIPPED)
def test_shipped_configuration_is_valid(name: str, model: type[Settings]) -> None:
    assert model.load(PROJECT / "conf" / name)


def changed(tmp_path: Path, name: str, path: list[str], value: object) -> Path:
    """A copy of a shipped file with one key set."""
    document = yaml.safe_load((PROJECT / "conf" / name).read_text())
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    copy = tmp_path / name
    copy.write_text(yaml.safe_dump(document, sort_keys=False))
    return copy


@pytest.mark.parametrize(
    ("name", "model", "path", "value", "expected"),
    [
        ("train.yaml", TrainSettings, ["trails"], 5, "trails: unknown key; allowed: data, experiment"),
        (
            "train.yaml",
            TrainSettings,
            ["trials"],
            0,
            "trials: Input should be greater than or equal to 1, received 0",
        ),
        ("train.yaml", TrainSettings, ["trials"], "50", "trials: Input should be a valid integer, received '50'"),
        (
            "train.yaml",
            TrainSettings,
            ["search_space", "eta", "lo"],
            1,
            "search_space.eta.lo: unknown key; allowed: low",
        ),
        (
            "policy.yaml",
            Policy,
            ["thresholds", "maybe_above"],
            0.9,
            "maybe_above is 0.9, greater than declined_above, 0.5",
        ),
        (
            "serve.yaml",
            ServeSettings,
            ["thresholds"],
            {"maybe_above": 0.3, "declined_above": 0.5},
            "thresholds belong in policy.yaml",
        ),
        ("schema.yaml", Schema, ["fields", "age", "knd"], "integer", "fields.age.knd: unknown key; allowed: kind"),
        (
            "schema.yaml",
            Schema,
            ["fields", "age", "kind"],
            "int",
            "fields.age.kind: Input should be 'integer', 'number'",
        ),
        (
            "schema.yaml",
            Schema,
            ["ratios", "x"],
            {"expression": "age / nope", "description": ""},
            "nope is neither",
        ),
        (
            "schema.yaml",
            Schema,
            ["ratios", "x"],
            {"expression": "open('f')", "description": ""},
            "may hold only names",
        ),
        (
            "schema.yaml",
            Schema,
            ["ratios", "x"],
            {"expression": "marital", "description": ""},
            "marital is neither",
        ),
        ("schema.yaml", Schema, ["fields", "income", "missing"], [-1], "must lie within [min, max]"),
        ("schema.yaml", Schema, ["fields", "home", "example"], "tent", "must be one of the categories"),
    ],
)
def test_wrong_key_is_named_with_what_is_allowed(
    tmp_path: Path, name: str, model: type[Settings], path: list[str], value: object, expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        model.load(changed(tmp_path, name, path, value))
    assert expected in str(error.value)
    assert name in str(error.value)


def test_flags_win_over_the_file() -> None:
    settings = TrainSettings.load(PROJECT / "conf/train.yaml", trials=7, seed=None)
    assert settings.trials == 7
    assert settings.seed == 42


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trials: 5\ntrials: 6\n", "'trials' is given twice"),
        ("- 1\n", "must hold a mapping"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_unreadable_file_says_why(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        TrainSettings.load(file)


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        TrainSettings.load(tmp_path / "absent.yaml")
