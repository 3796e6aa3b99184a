"""The long prompt goes on where it was, and keeps what it promises."""

import dataclasses
import json

import numpy as np
import pytest

from beacon_jax.bench import long_prompt
from beacon_jax.bench.long_prompt import RESULT, STATE, LongPrompt

PROMPT = LongPrompt("nano", layers=0, tokens=61, window=8, ratio=2, piece=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return long_prompt.run(PROMPT, tmp_path_factory.mktemp("whole"))


def test_it_keeps_its_promises_with_one_program(whole):
    assert all(whole["promises"].values())
    assert whole["compiled_programs"] == 1 and whole["processes"] == 1
    assert len(whole["piece_seconds"]) == 4
    token = whole["kv_full_bytes"] // 61
    # 7 windows of 4 beacons each, and 5 open tokens with 2 beacons.
    assert whole["kv_used_bytes"] == (7 * 4 + 5 + 2) * token


def test_a_run_that_was_cut_off_goes_on_and_ends_alike(whole, tmp_path, monkeypatch):
    real, calls = long_prompt.save, []

    def dies(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(long_prompt, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            long_prompt.run(PROMPT, tmp_path)
    assert not (tmp_path / RESULT).exists()
    result = long_prompt.run(PROMPT, tmp_path)
    assert result["processes"] == 2 and len(result["piece_seconds"]) == 4
    for name in ("next_token", "kv_used_bytes", "kv_buffer_bytes"):
        assert result[name] == whole[name]
    assert json.loads((tmp_path / RESULT).read_text()) == result
    again = long_prompt.run(PROMPT, tmp_path)
    assert again["seconds"] == result["seconds"] and again["compiled_programs"] == 0


def test_a_cut_off_save_leaves_the_state_before(tmp_path, monkeypatch):
    long_prompt.run(PROMPT, tmp_path)
    before = (tmp_path / STATE).read_bytes()

    def cut(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    config = PROMPT.model()
    memory = long_prompt.init_memory(config, 1, 40)
    monkeypatch.setattr(long_prompt, "save_file", cut)
    with pytest.raises(OSError):
        long_prompt.save(
            tmp_path / STATE, PROMPT, long_prompt.Done(), memory, np.ones(1)
        )
    assert (tmp_path / STATE).read_bytes() == before


def test_the_state_of_another_prompt_is_refused(tmp_path):
    long_prompt.run(PROMPT, tmp_path)
    other = dataclasses.replace(PROMPT, tokens=45)
    with pytest.raises(ValueError, match="is of another run"):
        long_prompt.run(other, tmp_path)


def test_a_memory_that_is_too_large_breaks_its_promise(monkeypatch, tmp_path):
    real = long_prompt.capacity
    monkeypatch.setattr(long_prompt, "capacity", lambda *a: 2 * real(*a))
    promises = long_prompt.run(PROMPT, tmp_path)["promises"]
    (broken,) = (what for what, kept in promises.items() if not kept)
    assert broken.startswith("KV buffer is 1/ratio")
