"""Read YAML files of the conf folder into frozen settings; an error names the key and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as PydanticField

from pipeline.core.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)

CONF_VARIABLE = "CREDIT_RISK_CONF"
"""Environment variable that names another conf folder, for the commands and the service alike."""


class Settings(BaseModel):
    """Base of all settings: strict, frozen, and every key known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **flags: Any) -> Self:
        """Read a YAML file, lay command-line flags over it, and validate both.

        Parameters
        ----------
        path
            The YAML file.
        **flags
            Values that win over the file's; ``None`` means "not given".

        Raises
        ------
        ConfigError
            The file is absent, is no YAML mapping, or a key is unknown or has a wrong value.
        """
        given = {key: value for key, value in flags.items() if value is not None}
        return parse_settings(cls, {**read_yaml(path), **given}, source=str(path))


class Request(Settings):
    """Base of what the commands are asked to do: one frozen model for each command's flags."""

    conf: Path = PydanticField(default_factory=lambda: conf_folder())
    """The conf folder: one profile's settings, contract and policy."""


def conf_folder() -> Path:
    """Conf folder of this process, wherever it runs: ``$CREDIT_RISK_CONF``, else the project's ``conf/``."""
    return Path(os.environ.get(CONF_VARIABLE) or Path(__file__).parents[2] / "conf")


def parse_settings(model: type[ModelT], values: Mapping[str, Any], source: str) -> ModelT:
    """Validate a mapping; `source` names the file in the error.

    Raises
    ------
    ConfigError
        One line for each broken key: the key, what is wrong, what was received.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, dict(detail)) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one YAML mapping; a key that is given twice is an error, not a silent overwrite."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing YAML file") from None
    try:
        # _UniqueKeyLoader is a SafeLoader: plain values only.
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values, received {type(values).__name__}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _explain(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        allowed = ", ".join(_keys_beside(model, detail["loc"]))
        return f"{where}: unknown key; allowed: {allowed}"
    if detail["type"] == "missing":
        return f"{where}: missing; {_description(model, detail['loc'])}"
    # YAML knows lists; that they become tuples here is of no interest to who wrote one.
    message = str(detail["msg"]).removeprefix("Value error, ").replace("valid tuple", "valid list")
    received = "" if isinstance(detail["input"], dict) else f", received {detail['input']!r}"
    return f"{where}: {message}{received}" if where else f"{message}{received}"


def _keys_beside(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    owner = _model_at(model, loc[:-1])
    return list(owner.model_fields) if owner else []


def _description(model: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    owner = _model_at(model, loc[:-1])
    field = owner.model_fields.get(str(loc[-1])) if owner else None
    return (field.description if field else None) or "it has no default"


def _model_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Follow an error's location down to the settings class that owns it; mapping keys are stepped over."""
    current: type[BaseModel] | None = model
    for part in loc:
        field = current.model_fields.get(str(part)) if current else None
        if field is not None:
            current = next(_models_in(field.annotation), current)
    return current


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
