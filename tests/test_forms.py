"""Forms of JSON: what is unlike is said, with its place; what is alike is not."""

import math

import pytest

from beacon_jax.forms import Count, form_of, unlike

FORM = {
    "name": str,
    "rows": [{"count": Count, "share": float, "hash": (str, None), "own?": bool}],
    "sizes": {str: int},
    "kind": frozenset({"a", "b"}),
    "any": {},
}
ROW = {"count": 3, "share": 1, "hash": None}
LIKE = {"name": "x", "rows": [ROW], "sizes": {"k": -1}, "kind": "b", "any": {"z": 1}}


def test_what_is_as_its_form_may_have_more_keys_and_lack_optional_ones():
    assert unlike(LIKE, FORM, "it") == ""
    more = ROW | {"own": True, "hash": "ab", "share": 0.5, "new": [1]}
    assert unlike(LIKE | {"rows": [more], "new": None}, FORM, "it") == ""
    assert unlike(LIKE | {"rows": []}, FORM, "it") == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "it.name is 3, not a text"),
        ({"rows": {}}, "it.rows is {}, not a list"),
        ({"rows": [ROW, 7]}, "it.rows[1] is 7, not an object"),
        ({"rows": [{}]}, "it.rows[0].count is missing"),
        ({"rows": [ROW | {"count": -1}]}, "it.rows[0].count is -1, not a whole number"),
        ({"rows": [ROW | {"count": True}]}, "it.rows[0].count is True, not a whole"),
        ({"rows": [ROW | {"count": 1.0}]}, "it.rows[0].count is 1.0, not a whole"),
        ({"rows": [ROW | {"share": math.nan}]}, "it.rows[0].share is nan, not a num"),
        ({"rows": [ROW | {"share": -math.inf}]}, "it.rows[0].share is -inf, not a num"),
        ({"rows": [ROW | {"share": 10**400}]}, "it.rows[0].share is 10000000"),
        ({"rows": [ROW | {"share": False}]}, "it.rows[0].share is False, not a numb"),
        ({"rows": [ROW | {"hash": 1}]}, "it.rows[0].hash is 1, not a text or null"),
        ({"rows": [ROW | {"own": 1}]}, "it.rows[0].own is 1, not true or false"),
        ({"sizes": {"k": "1"}}, "it.sizes.k is '1', not a whole number"),
        ({"kind": "c"}, "it.kind is 'c', not one of a, b"),
        ({"kind": ["a"]}, "it.kind is ['a'], not one of a, b"),
        ({"any": None}, "it.any is None, not an object"),
        ({"name": [9] * 99}, "..., not a text"),
    ],
)
def test_what_is_unlike_is_said_with_its_place(change, message):
    said = unlike(LIKE | change, FORM, "it")
    assert message in said and len(said) < 120


def test_the_form_of_a_value_fits_it_and_others_with_fewer_keys():
    value = {"a": 1, "b": {"c": 0.5, "d": (1, 2)}, "e": None, "f": "x", "g": True}
    form = form_of(value)
    read = {"a": 2, "b": {"c": 1, "d": ["x"]}, "e": None, "f": "", "g": False}
    assert unlike(read, form, "it") == unlike({}, form, "it") == ""
    assert unlike({"b": {"d": 3}}, form, "it") == "it.b.d is 3, not a list"
    assert unlike({"g": 1}, form, "it") == "it.g is 1, not true or false"
