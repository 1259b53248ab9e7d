"""Checks of single parameters: what is wrong, by name."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from pantheraml.errors import InvalidError

P = ParamSpec("P")
R = TypeVar("R")


def unknown_parameter(name: str, known: Sequence[str]) -> TypeError:
    """Make the error for a keyword that is none, with the nearest that is one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return TypeError(f"{name!r} is not a parameter{hint}")


def names_checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function answer a keyword that it has not with the nearest one that it has."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise unknown_parameter(name, known)
        return function(*args, **kwargs)

    return checked


def choice(name: str, value: object, known: Sequence[str]) -> str:
    """Refuse a word that is not one of `known`, naming the nearest.

    Raises
    ------
    InvalidError
        It is none of them.
    """
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidError(f"{name} must be one of {', '.join(known)}; it is {value!r}{hint}")


def whole(name: str, value: object, low: int, high: int) -> int:
    """Refuse what is not a whole number in [low, high].

    Raises
    ------
    InvalidError
        It is none; the message has the name and the value.
    """
    fits = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not fits or not hasattr(value, "__int__"):
        raise InvalidError(f"{name} must be a whole number, it is {value!r}")
    result = int(value)
    if not low <= result <= high:
        raise InvalidError(f"{name} must be from {low} to {high}, it is {result}")
    return result


def number(
    name: str, value: object, low: float, high: float, *, above: bool = False, below: bool = False
) -> float:
    """Refuse what is not a finite number in [low, high]; `above`, `below`: without that end.

    Raises
    ------
    InvalidError
        It is none; the message has the name and the value.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InvalidError(f"{name} must be a number, it is {value!r}")
    result = float(value)
    inside = math.isfinite(result) and low <= result <= high
    if not inside or (above and result == low) or (below and result == high):
        first = f"above {low:g}" if above else f"at least {low:g}"
        last = f"below {high:g}" if below else f"at most {high:g}"
        raise InvalidError(f"{name} must be {first} and {last}, it is {result:g}")
    return result


def truth(name: str, value: object) -> bool:
    """Refuse what is not True or False.

    Raises
    ------
    InvalidError
        It is neither.
    """
    if not isinstance(value, bool):
        raise InvalidError(f"{name} must be True or False, it is {value!r}")
    return value
