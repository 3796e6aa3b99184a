"""Methods whose name ends in _recent: exact recent tokens, and what has their bytes."""

import numpy as np
import pytest

from beacon_jax.evaluation import likelihood
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.likelihood import Pair
from beacon_jax.evaluation.methods import remember
from beacon_jax.evaluation.reading import answer, losses, read

W = 32


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(3)
    return [rng.integers(5, 300, n).astype(np.int32) for n in (4 * W, 2 * W, W)]


def test_names_end_in_recent_and_ratio(model):
    names = ["beacon", "beacon_recent", "snapkv_recent", "beacon_int8_recent"]
    made = make_methods(names, [2, "adapt"])
    assert [m.name for m in made[:4]] == [
        "beacon_x2",
        "beacon_adapt",
        "beacon_recent_x2",
        "beacon_recent_adapt",
    ]
    assert [m.recent for m in made[::2]] == [False, True, True, True]
    assert made[3].resolve(model, 64).recent
    with pytest.raises(ValueError, match="mean-pool_recent: .* streaming_recent"):
        make_methods(["mean-pool_recent"], [2])
    with pytest.raises(ValueError, match="full_recent"):
        make_methods(["full_recent"], [2])


@pytest.mark.parametrize(
    "family",
    [
        "beacon",
        "streaming",
        "snapkv",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("random", "keep_ends", "selective", "snapkv_aware")
        ),
    ],
)
def test_all_of_one_ratio_keep_the_same_bytes(model, texts, family):
    (method,) = make_methods([f"{family}_recent"], [4])
    memory, kept = remember(model, method.sized(4 * W), texts, texts)
    slot = memory.slot_nbytes
    slots = [3 * W // 4 + W, W // 4 + W, W]
    ids = 4 * W  # bytes: beacons keep them, others have as many slots as they buy
    if family == "beacon":
        assert memory.recent and kept == [n * slot + ids for n in slots]
        return
    assert not memory.recent
    assert all(
        n * slot <= held <= n * slot + ids for n, held in zip(slots, kept, strict=True)
    )


@pytest.mark.slow
def test_what_follows_reads_the_raw_window(model, texts):
    """Losses and answers are those of the model's own memory."""
    (method,) = make_methods(["beacon_recent"], [4])
    text, following = texts[0], texts[1][:W]
    memory, _ = remember(model, method, [text], [following])
    labels = np.roll(following, -1)
    found, _ = losses(model, memory, [following], [labels], 4)
    expected = []
    for n in (1, W // 2, W):
        tokens = np.concatenate([text, following[:n]])
        made = model.compress(tokens[:-1], ratio=4, recent=True)
        logits, _ = read(model, [tokens[-1:]], 4, made)
        logits = np.asarray(logits[0], np.float64)
        loss = np.logaddexp.reduce(logits) - logits[labels[n - 1]]
        expected.append(loss)
    np.testing.assert_allclose(found[0, [0, W // 2 - 1, W - 1]], expected, atol=1e-4)
    logits, after = read(model, [following], 4, memory)
    answers = answer(model, after, logits, 40, 4)
    whole = np.concatenate([text, following])
    made = model.complete(whole, ratio=4, recent=True, max_new_tokens=40)
    np.testing.assert_array_equal(answers.tokens[0], made.tokens)
    assert answers.memory.rows[0].own == made.memory.rows[0].own


def test_likelihoods_are_sums_of_its_losses(model, texts):
    (method,) = make_methods(["beacon_recent"], [4])
    pair = Pair(texts[0][: 3 * W + 5], texts[1][:40])
    (found,) = likelihood.score(model, [pair], ratio=4, recent=True)
    memory, _ = remember(model, method, [pair.context[: 3 * W]], [pair.continuation])
    rest = np.concatenate([pair.context[3 * W :], pair.continuation])
    each, _ = losses(model, memory, [rest[:-1]], [rest[1:]], 4)
    assert found.loglikelihood == pytest.approx(-each[0, 4:44].sum(), abs=1e-3)
    (other,) = likelihood.score(model, [pair], ratio=4)
    assert other.loglikelihood != pytest.approx(found.loglikelihood, abs=1e-3)
    (short,) = likelihood.score(model, [Pair(*texts[2:], texts[1][:3])], recent=True)
    assert np.isfinite(short.loglikelihood)
