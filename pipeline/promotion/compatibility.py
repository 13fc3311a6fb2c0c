"""Compare two data contracts: what changes for the clients of the champion when the candidate answers."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.contract.schema import Field, Schema, Target


def schema_changes(champion: Schema, candidate: Schema) -> tuple[str, ...]:
    """Name every change that a person must allow before the candidate answers the champion's clients.

    Nothing is named if each application that the champion accepts is accepted and means the same, each field keeps
    its role (one of role audit stays out of the model) and its direction, and the probability is still that of the
    same label.
    """
    return (
        *_target_changes(champion.target, candidate.target),
        *(f"{name}: removed" for name in champion.fields if name not in candidate.fields),
        *_changes_of_fields(champion, candidate),
        *_changes_of_ratios(champion, candidate),
    )


def _target_changes(before: Target, after: Target) -> Iterator[str]:
    if before.name != after.name:
        yield f"target: {before.name} became {after.name}"
    if (before.negative, before.positive) != (after.negative, after.positive):
        labels = [f"{target.positive} against {target.negative}" for target in (before, after)]
        yield f"target: the probability of {labels[0]} became that of {labels[1]}"


def _changes_of_fields(champion: Schema, candidate: Schema) -> Iterator[str]:
    for name, field in candidate.fields.items():
        before = champion.fields.get(name)
        if before is not None:
            yield from (f"{name}: {change}" for change in _field_changes(before, field))
        elif not field.optional:
            yield f"{name}: new and required"


def _changes_of_ratios(champion: Schema, candidate: Schema) -> Iterator[str]:
    for name, ratio in candidate.ratios.items():
        before = champion.ratios.get(name)
        if before is not None and before.monotone != ratio.monotone:
            yield f"{name}: {_direction_change(before.monotone, ratio.monotone)}"


def _field_changes(before: Field, after: Field) -> Iterator[str]:
    if before.kind != after.kind and not (before.kind == "integer" and after.kind == "number"):
        yield f"kind {before.kind} became {after.kind}"
        return
    yield from _new_meanings(before, after)
    yield from _new_refusals(before, after)


def _new_meanings(before: Field, after: Field) -> Iterator[str]:
    if before.role != after.role:
        yield f"role {before.role} became {after.role}"
    if before.monotone != after.monotone:
        yield _direction_change(before.monotone, after.monotone)
    if before.unit != after.unit:
        yield f"unit {before.unit} became {after.unit}"
    if set(before.missing) != set(after.missing):
        yield "the codes that mean missing changed"


def _new_refusals(before: Field, after: Field) -> Iterator[str]:
    if before.optional and not after.optional:
        yield "became required"
    if lost := set(before.categories) - set(after.categories):
        yield f"no longer accepts {', '.join(sorted(lost))}"
    if after.bounds[0] > before.bounds[0] or after.bounds[1] < before.bounds[1]:
        yield f"range {_range(before)} became the narrower {_range(after)}"


def _direction_change(before: str | None, after: str | None) -> str:
    return f"direction {before or 'free'} became {after or 'free'}"


def _range(field: Field) -> str:
    low, high = field.bounds
    return f"[{low:g}, {high:g}]"
