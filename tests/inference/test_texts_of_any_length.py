"""Texts that are read as they come: equal to the whole text, and capped in slots."""

import io
import random

import jax.numpy as jnp
import numpy as np
import pytest

import beacon_jax
from beacon_jax.core.move import thin
from beacon_jax.inference import stream
from beacon_jax.inference.validate import ArgumentError
from beacon_jax.model.rotary import cos_sin, rotate

RNG = random.Random(0)
WORDS = [
    "the",
    "key",
    "of",
    "door",
    "919",
    "été",
    "naïve",
    "北京",
    "x=1;",
    "def",
    "f(a):",
]
WORDS += ["return\n\n\t", "--", "☃", ""]
TEXT = " ".join(RNG.choice(WORDS) for _ in range(3000))


@pytest.fixture(scope="module")
def model():
    return beacon_jax.load("tiny-beacon")


@pytest.fixture
def small(monkeypatch):
    """Cuts that are tried every 300 characters."""
    monkeypatch.setattr(stream, "CHARACTERS", 300)
    monkeypatch.setattr(stream, "MARGIN", 40)


def parts(text, most, seed=0):
    rng, at = random.Random(seed), 0
    while at < len(text):
        size = rng.randrange(1, most)
        yield text[at : at + size]
        at += size


# The same buffer: another one may be summed up in another order.
ROOM = {"capacity": 2600}


def same(a, b, exact=True):
    assert a.entries.tolist() == b.entries.tolist()
    n = int(a.entries[0])
    for name in ("k", "v"):
        x, y = (np.asarray(getattr(m.state, name))[:, 0, :n] for m in (a, b))
        np.testing.assert_allclose(x, y, atol=0 if exact else 1e-4, rtol=0)
    assert [(r.fed, r.slots, r.raw, r.windows) for r in a.rows] == [
        (r.fed, r.slots, r.raw, r.windows) for r in b.rows
    ]
    assert np.array_equal(a.rows[0].spans, b.rows[0].spans)


@pytest.mark.parametrize("most", [pytest.param(7, marks=pytest.mark.slow), 900])
def test_a_text_in_pieces_is_the_text(model, small, most):
    whole = model.compress(TEXT, ratio=4, **ROOM)
    made = model.compress(parts(TEXT, most), ratio=4, progress_windows=3, **ROOM)
    same(made, whole)
    ask = {"max_new_tokens": 20}
    got = model.generate("The key is", memory=made, **ask)
    assert got == model.generate("The key is", memory=whole, **ask)


@pytest.mark.slow
def test_a_file_is_read_as_it_comes(model, small, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    told = []
    made = model.compress(
        path,
        ratio=[2, 8],
        progress_windows=2,
        **ROOM,
        on_progress=lambda done, of: told.append((done, of)),
    )
    same(made, model.compress(TEXT, ratio=[2, 8], **ROOM))
    assert [d for d, _ in told] == sorted(d for d, _ in told)
    assert told[-1] == (made.rows[0].length,) * 2
    assert all(of >= done for done, of in told)
    with path.open(encoding="utf-8-sig") as file:
        same(model.compress(file, ratio=[2, 8], **ROOM), made)
    answer = model.complete("The key", context=path, ratio=8, max_new_tokens=9)
    want = model.complete("The key", context=TEXT, ratio=8, max_new_tokens=9)
    assert answer.tokens.tolist() == want.tokens.tolist()


@pytest.mark.slow
def test_ids_and_a_memory_that_goes_on(model, small):
    ids = model.encode(TEXT, "text", first=True)
    whole = model.compress(ids, ratio=8, **ROOM)
    made = model.compress(iter(np.array_split(ids, 9)), ratio=8, **ROOM)
    same(made, whole)
    begun = model.compress(ids[:333], ratio=8, **ROOM)
    used = np.asarray(begun.state.k).copy()
    rest = model.compress(iter(ids[333:].tolist()), ratio=8, memory=begun)
    same(rest, whole)
    assert np.array_equal(np.asarray(begun.state.k), used)  # it is not taken over
    capped = model.compress(iter([ids[333:700]]), ratio=8, memory=begun, slot_cap=80)
    assert capped.rows[0].length == 700
    opened = model.compress(ids[:50], ratio=2)  # its window has more beacons
    goes_on = model.compress(iter([ids[50:400]]), ratio=8, memory=opened, slot_cap=64)
    assert goes_on.rows[0].length == 400
    cut = begun.truncate(300)
    again = model.compress(iter([ids[300:700]]), ratio=8, memory=cut)
    same(again, model.compress(ids[:700], ratio=8, **ROOM))


@pytest.mark.slow
def test_the_buffer_has_room_for_what_follows_and_no_more(model, small):
    made = model.compress(parts(TEXT, 900), ratio=8, reserve=100)
    whole = model.compress(TEXT, ratio=8, reserve=100)
    assert made.state.capacity <= whole.state.capacity
    answer = model.complete("The", memory=made, max_new_tokens=90)
    assert answer.memory.rows[0].length > made.rows[0].length


def test_a_text_without_a_place_to_cut_is_kept_until_it_ends(model, small):
    text = "a" * 2000
    whole = model.compress(text, ratio=8, **ROOM)
    same(model.compress(parts(text, 50), ratio=8, **ROOM), whole)


def test_a_cap_holds_however_long_the_text_is(model, small):
    cap, seen = 48, []
    for length in (2000, 8000, len(TEXT)):
        memory = model.compress(parts(TEXT[:length], 500), ratio=8, slot_cap=cap)
        assert memory.rows[0].slots <= cap
        spans = memory.rows[0].spans
        assert spans[0, 0] == 0 and (spans[1:, 0] == spans[:-1, 1]).all()
        assert spans[-1, 1] == memory.rows[0].start
        seen.append(memory.state.capacity)
        widths = np.diff(spans, axis=1)[:, 0]
        assert widths[0] >= widths[-1] == 8
        assert model.generate("The", memory=memory, max_new_tokens=5)
    assert len(set(seen)) == 1
    text = model.compress(TEXT, ratio=8, slot_cap=cap)
    same(text, memory)
    # The tokens of a text that is there as a whole are kept.
    assert model.generate("The", memory=text, max_new_tokens=5, repetition_penalty=1.2)
    again = text.truncate(text.rows[0].start - 40)
    assert again.rows[0].length == text.rows[0].start - 40
    with pytest.raises(ValueError, match="repetition_penalty needs the tokens"):
        model.generate("The", memory=memory, repetition_penalty=1.2)
    int8 = model.compress(TEXT, ratio=8, slot_cap=cap, memory_dtype="int8")
    assert int8.rows[0].slots == memory.rows[0].slots


def test_what_fits_under_the_cap_is_as_without(model):
    short = TEXT[:1000]
    same(
        model.compress(short, ratio=8, slot_cap=4096),
        model.compress(short, ratio=8),
        exact=False,
    )


def test_of_two_old_slots_the_later_one_stays(model):
    memory = model.compress(TEXT[:3000], ratio=8)
    row, config = memory.rows[0], model.config
    number = lambda n: jnp.asarray([n], jnp.int32)
    made = thin(config, memory.state.copy(), number(2), number(10))
    kept = [0, 1, *range(3, 22, 2), *range(22, row.slots)]
    assert int(made.slots[0]) == row.slots - 10 == len(kept)
    before, after = (np.asarray(s.v)[:, 0] for s in (memory.state, made))
    np.testing.assert_array_equal(after[:, : len(kept)], before[:, kept])
    # Keys lie rotated: turned by the distance that they moved they are the same.
    moved = np.arange(len(kept)) - np.asarray(kept)
    keys = jnp.asarray(np.asarray(memory.state.k)[:, 0, kept])
    turned = rotate(keys, *cos_sin(config, jnp.asarray(moved), scaled=False))
    np.testing.assert_allclose(np.asarray(made.k)[:, 0, : len(kept)], turned, atol=1e-5)
    told = row.thinned(2, 10)
    assert told.slots == len(kept) and told.fed == row.fed
    assert (told.spans[1:, 0] == told.spans[:-1, 1]).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 8, "method": "snapkv"}, "method='snapkv' needs the whole text"),
        ({"ratio": 8, "spans": "key"}, "spans='key' needs the whole text"),
        ({"max_slots": 90}, "max_slots=90 needs the whole text"),
        ({"ratio": "auto"}, "ratio='auto' needs the whole text.*ratio=8"),
        ({}, "ratio=None is a mix over the whole text: give ratio=8"),
        ({"ratio": [2, 4], "slot_cap": 90}, "does not go with slot_cap=90"),
        ({"ratio": 2, "slot_cap": 9}, "slot_cap=9 is too small.*give 64 or more"),
        ({"ratio": 8, "slot_cap": 0}, "slot_cap=0"),
        ({"ratio": 8, "recent": True}, "recent=True needs the whole text"),
    ],
)
def test_what_a_stream_cannot_have_is_refused(model, options, says):
    with pytest.raises(ArgumentError, match=says):
        model.compress(iter(["a b c"]), **options)


def test_sources_that_are_none(model, tmp_path):
    with pytest.raises(ArgumentError, match="is empty"):
        model.compress(iter([]), ratio=8)
    with pytest.raises(ArgumentError, match="is not there: name a text file"):
        model.compress(tmp_path / "no.txt", ratio=8)
    with pytest.raises(ArgumentError, match="is a folder"):
        model.compress(tmp_path, ratio=8)
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1") + b" text")
    with pytest.raises(ArgumentError, match="not UTF-8 at or behind byte 0"):
        model.compress(tmp_path / "b.txt", ratio=8)
    with pytest.raises(TypeError, match=r"context\[1\]=None is"):
        model.compress(iter(["a", None]), ratio=8)
    with pytest.raises(TypeError, match=r"context\[0\]=b'a'"):
        model.compress(io.BytesIO(b"a"), ratio=8)
    with pytest.raises(ArgumentError, match="slot_cap=90 compresses a context: give"):
        model.complete("a", slot_cap=90, ratio=8)
    with pytest.raises(ArgumentError, match="slot_cap=90 is of one text"):
        model.compress(["a", "b"], ratio=8, slot_cap=90)
