"""Settings as text and back: `75,subsampling=4:4:4` for the fields of a frozen dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from shields.errors import ConfigError
from shields.registry import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["check_settings", "read_settings", "write_settings"]

Settings = TypeVar("Settings", bound="DataclassInstance")


def check_settings(settings: DataclassInstance, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise `ConfigError` unless every field has its type, and its place within `limits`.

    Args:
        settings: A dataclass of numbers, truth values, words and `Literal`s.
        limits: Field -> smallest and largest value that makes sense.
    """
    owner = type(settings).__name__
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if typing.get_origin(hint) is typing.Literal:
            if value not in typing.get_args(hint):
                raise ConfigError(_choices(owner, field.name, typing.get_args(hint), value))
        elif not _fits(value, hint):
            kind = getattr(hint, "__name__", str(hint))
            raise ConfigError(f"`{field.name}` of {owner} must be a {kind}, got {value!r}")
        least, most = limits.get(field.name, (None, None))
        if least is not None and value is not None and not least <= value <= most:
            raise ConfigError(
                f"`{field.name}` of {owner} must lie in [{least:g}, {most:g}], got {value!r}"
            )


def _fits(value: object, hint: object) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    kinds = (int, float) if hint is float else hint
    # True is an int to Python, a mistake to us.
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))  # type: ignore[arg-type]


def _choices(owner: str, name: str, options: tuple[object, ...], value: object) -> str:
    hint = did_you_mean(str(value), [_as_text(option) for option in options])
    return f"`{name}` of {owner} cannot be {_as_text(value)!r}; {hint}"


def read_settings(kind: type[Settings], text: str, name: str) -> Settings:
    """Build `kind` from text; what is not mentioned keeps its default.

    Args:
        kind: A dataclass of numbers, truth values, words and `Literal`s, each with a default.
        text: Values after commas, `key=value`; the first may be the fields' values in their order
            with colons between, `75:4:4:4`, and the last of the fields may hold colons itself.
        name: What an error calls the thing.

    Raises:
        ConfigError: A setting that `kind` does not have, is given twice, or cannot be read.

    Example:
        >>> from robustness.attacks import Jpeg
        >>> read_settings(Jpeg, "60:4:4:4", "jpeg")
        Jpeg(quality=60, subsampling='4:4:4')
    """
    names = [field.name for field in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for place, part in enumerate(filter(None, (part.strip() for part in text.split(",")))):
        for key, value in _pairs(part, names, name, first=place == 0):
            if key not in names:
                hint = did_you_mean(key, names) if names else "it has none"
                raise ConfigError(f"{name} has no setting {key!r}; {hint}")
            if key in values:
                raise ConfigError(f"{name} is given {key!r} twice, in {text!r}")
            values[key] = _value(f"{name}: {key}", value, hints[key])
    return kind(**values)


def _pairs(part: str, names: list[str], name: str, *, first: bool) -> list[tuple[str, str]]:
    """Setting and value of `key=value`, or of `value:value` in the order of the fields."""
    if "=" in part:
        key, _, value = part.partition("=")
        return [(key.strip(), value.strip())]
    if not first or not names:
        known = f"write it as name={part}; {did_you_mean(part, names)}" if names else "it has none"
        raise ConfigError(f"{name}: which setting is {part!r}? {known}")
    return list(zip(names, part.split(":", len(names) - 1), strict=False))


def _value(what: str, text: str, hint: Any) -> Any:  # noqa: ANN401  the field's own type
    if isinstance(hint, types.UnionType):
        if text == "none":
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        options = typing.get_args(hint)
        return next((option for option in options if _as_text(option) == text), text)
    if hint is bool:
        if text not in {"true", "false"}:
            raise ConfigError(f"{what} must be true or false, got {text!r}")
        return text == "true"
    try:
        return hint(text)
    except ValueError:
        kind = {"int": "whole number", "float": "number"}.get(hint.__name__, hint.__name__)
        raise ConfigError(f"{what} must be a {kind}, got {text!r}") from None


def write_settings(settings: DataclassInstance) -> str:
    """Write what `read_settings` reads: the first field always, others where not the default.

    Example:
        >>> from robustness.attacks import Jpeg, Resize
        >>> write_settings(Jpeg()), write_settings(Resize(size=512, kernel="box"))
        ('75', '512,kernel=box')
    """
    parts = []
    for place, field in enumerate(dataclasses.fields(settings)):
        value = getattr(settings, field.name)
        if place == 0:
            parts.append(_as_text(value))
        elif value != field.default:
            parts.append(f"{field.name}={_as_text(value)}")
    return ",".join(parts)


def _as_text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
