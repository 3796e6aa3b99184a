"""Compares what was read from JSON with the form in which it was written.

A form is a type, None, or built of forms:

    Count                 a whole number from 0 on
    int, float, str ...   a value of this type; a float is finite; an int is one, too,
                          if a float can hold it; a list may hold anything
    {"key": form, ...}    an object with these keys, and perhaps others
    {"key?": form, ...}   the same, but the key may be missing
    {str: form}           an object whose keys are any
    [form]                a list
    (form, form, ...)     a value of one of these forms
    frozenset({...})      one of these values
"""

import sys
from typing import Any

from beacon_jax.names import short


class Count:
    """The form of a whole number from 0 on."""


_WORDS: dict[Any, str] = {
    Count: "a whole number from 0 on",
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    None: "null",
}


def unlike(value: Any, form: Any, name: str) -> str:
    """Says what in a value is not as its form, as "NAME.a[0] is 7, not a text".

    Args:
      name: of the value, for the message.

    Returns:
      "" if all of it is as its form.
    """
    if isinstance(form, dict):
        return _unlike_object(value, form, name)
    if isinstance(form, list):
        if not isinstance(value, list):
            return _is_not(value, "a list", name)
        found = (unlike(x, form[0], f"{name}[{i}]") for i, x in enumerate(value))
        return next(filter(None, found), "")
    if isinstance(form, tuple):
        fits = not all(unlike(value, one, name) for one in form)
        return "" if fits else _is_not(value, " or ".join(map(_word, form)), name)
    return "" if _fits(value, form) else _is_not(value, _word(form), name)


def form_of(value: Any) -> Any:
    """Returns the form of a value; keys of objects may be missing in others."""
    if isinstance(value, dict):
        return {f"{key}?": form_of(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return list
    return None if value is None else type(value)


def _unlike_object(value: Any, form: dict[Any, Any], name: str) -> str:
    if not isinstance(value, dict):
        return _is_not(value, "an object", name)
    if str in form:
        found = (unlike(x, form[str], f"{name}.{key}") for key, x in value.items())
        return next(filter(None, found), "")
    for given, inner in form.items():
        key = given.removesuffix("?")
        if key not in value:
            if key == given:
                return f"{name}.{key} is missing"
            continue
        if said := unlike(value[key], inner, f"{name}.{key}"):
            return said
    return ""


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, frozenset):
        return isinstance(value, str) and value in form
    if form is None:
        return value is None
    if form is Count:
        return type(value) is int and value >= 0
    if form is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is form


def _word(form: Any) -> str:
    if isinstance(form, frozenset):
        return f"one of {', '.join(sorted(form))}"
    if isinstance(form, dict | list):
        return "an object" if isinstance(form, dict) else "a list"
    return _WORDS[form]


def _is_not(value: Any, wanted: str, name: str) -> str:
    return f"{name} is {short(repr(value))}, not {wanted}"
