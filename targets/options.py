"""Checks the values of options: they come from a command line or a recipe as YAML, and may be anything."""

import math
from collections.abc import Sequence
from typing import Any

from targets.errors import OptionError

__all__ = ["cores", "flag", "number", "place", "text", "texts", "whole"]


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Returns a whole number of `least` or more; raises `OptionError` naming the option otherwise."""
    # YAML's true is a whole number to Python.
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}, expected {least} or more", hint=f"give a whole number, {name}={least}")
    return value


def number(name: str, value: Any, *, above: float | None = None) -> float:
    """Returns a finite number of 0 or more, or one beyond `above`; raises `OptionError` naming the option otherwise."""
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if wrong or value < 0 or (above is not None and value <= above):
        expected = "0 or more" if above is None else f"more than {above:g}"
        raise OptionError(f"{name} is {value!r}, expected {expected}", hint=f"give a number, such as {name}=10")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Returns true or false; raises `OptionError` naming the option otherwise."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}, expected true or false")
    return value


def text(name: str, value: Any) -> str:
    """Returns a string that is not empty; raises `OptionError` naming the option otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise OptionError(f"{name} is {value!r}, expected text", hint=f"put it in quotes: {name}='…'")
    return value


def place(name: str, value: Any) -> str:
    """Returns a path on a device; ~ is refused by name, for words reach a device quoted."""
    if text(name, value).startswith("~"):
        hint = f"write the whole path, such as {name}=/home/pi{value[1:]}"
        raise OptionError(f"{name} is {value!r}, but ~ means nothing there: words reach the device quoted", hint=hint)
    return str(value)


def texts(name: str, value: Any) -> list[str]:
    """Returns a list of strings; a bare string, whose letters would be taken apart, is refused by name."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise OptionError(f"{name} is {value!r}, expected a list of texts", hint=f"write {name}=['…', '…']")
    return list(value)


def cores(value: Any) -> tuple[int, ...]:
    """Returns core numbers from a list, a single number or nothing; raises `OptionError` for anything else."""
    if value is None:
        return ()
    given = [value] if isinstance(value, int) else value
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise OptionError(f"cores is {value!r}, expected numbers of cores", hint="write cores=[0,1]")
    return tuple(whole("each of cores", item, least=0) for item in given)
