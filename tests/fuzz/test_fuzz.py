"""A few damaged inputs of every kind; `python -m tests.fuzz` tries thousands."""

import random

import pytest

from tests.fuzz import mutate
from tests.fuzz.kinds import KINDS
from tests.fuzz.run import Fuzz
from tests.fuzz.sense import nonsense

# Those that need neither a compiled program nor a second.
QUICK = (
    *("config", "weights", "index", "converted", "adapter", "retention", "gguf"),
    *("rows", "texts", "prepared", "unfinished", "workdir"),
)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", QUICK)
def test_damaged_files_are_used_or_refused_by_name(fuzz, kind):
    whole = [fuzz.attempt(kind, seed) for seed in range(-2, 0)]
    assert [(x.how, x.said) for x in whole] == [("success", "")] * 2
    tried = [fuzz.attempt(kind, seed) for seed in range(6)]
    for number, outcome in enumerate(tried):
        # The first error of a kind imports what it is told by, on a busy core for more
        # than the second that an error may take.
        if outcome.said.startswith("took "):
            tried[number] = fuzz.attempt(kind, number)
    assert [x for x in tried if x.how == "failure"] == []
    assert {x.how for x in tried} <= {"success", "error"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*KINDS} - {*QUICK}))
def test_damaged_files_of_other_kinds_are_used_or_refused_by_name(fuzz, kind):
    test_damaged_files_are_used_or_refused_by_name(fuzz, kind)


def test_a_seed_is_one_input(fuzz):
    first, again = (fuzz.attempt("config", 3) for _ in range(2))
    assert (first.what, first.how) == (again.what, again.how)
    assert first.what != fuzz.attempt("config", 4).what


def test_a_foreign_error_and_a_changed_input_are_failures(fuzz, monkeypatch):
    def foreign(folder, out):
        return {}["no such key"]

    def bare(folder, out):
        return (folder / "absent").read_text()

    def vague(folder, out):
        raise ValueError("it is wrong")

    def removes(folder, out):
        (folder / "config.json").unlink()

    said = []
    for use in (foreign, bare, vague, removes):
        kind = KINDS["config"]
        made = type(kind)(kind.make, kind.damage, (use,))
        monkeypatch.setitem(KINDS, "config", made)
        outcome = fuzz.attempt("config", -1)
        assert outcome.how == "failure"
        said.append(outcome.said)
    assert "KeyError" in said[0] and "of a library" in said[1]
    assert "ValueError: it is wrong" in said[2] and "changed its input" in said[3]


def test_what_cannot_be_meant_in_a_config_is_known():
    assert nonsense({"rope_theta": 1e4, "head_dim": None, "any": "x"}) == ""
    for key, value in (
        *(("rope_theta", "text"), ("rms_norm_eps", float("nan")), ("head_dim", 2.5)),
        *(("attention_bias", "false"), ("bos_token_id", -1), ("beacon_ratio", [-2])),
    ):
        assert nonsense({key: value}) == f"{key}={value!r}"
    found = nonsense({"rope_scaling": {"rope_type": "yarn", "factor": 0}})
    assert found == "rope_scaling.factor=0"


def test_damage_changes_what_it_is_given():
    rng, data = random.Random(0), b'{"a": [1, 2], "b": "text"}' * 3
    changed = [mutate.damage_bytes(rng, data)[0] != data for _ in range(50)]
    assert sum(changed) > 40  # bytes may be replaced by the same
