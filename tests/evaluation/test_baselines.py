"""Every baseline against a float64 decoder that is told which entries are left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from beacon_jax.evaluation.baselines import FAMILIES, make_methods
from beacon_jax.evaluation.baselines.shortened import self_information
from beacon_jax.evaluation.methods import Full, remember
from beacon_jax.evaluation.reading import feed_state
from beacon_jax.inference.compressors.attention_matching import DRAWN
from beacon_jax.inference.compressors.kvzip import WHOLE
from beacon_jax.inference.compressors.retention import Retention, sample_of
from beacon_jax.model import rotary
from beacon_jax.model.buffers import biased, entries_of
from beacon_jax.model.config import BeaconConfig, RopeConfig
from beacon_jax.model.partition import make_partition
from beacon_jax.model.quantize import dequantize
from beacon_jax.model.shapes import param_shapes
from beacon_jax.tokenise import encode
from tests.evaluation import numpy_model
from tests.evaluation.conftest import VOCAB, random_tree
from tests.evaluation.numpy_model import (
    attention,
    forward,
    inverse_frequencies,
    nothing,
    rotated,
    softmax,
)

W, LONGEST = 8, 64
PAST, FOLLOWING = (40, 0, 8, 24), (8, 5, 7, 3)  # tokens of the rows
SHAPES = {
    # Grouped queries without sinks; as many kv heads as heads, sinks and yarn; norms.
    "gqa": dict(num_kv_heads=2, beacon=BeaconConfig(window=W, ratios=(2, 4, 8))),
    "mha": dict(
        num_kv_heads=4,
        beacon=BeaconConfig(window=W, ratios=(2, 4, 8), sink=2),
        rope=RopeConfig(kind="yarn", factor=4.0, original_max_position=64),
    ),
    "qwen3": dict(
        family="qwen3",
        num_kv_heads=2,
        beacon=BeaconConfig(window=W, ratios=(2, 4, 8)),
    ),
}
FLOATS = sorted(set(FAMILIES) - {"beacon", "int8", "beacon_int8"})


@pytest.fixture(scope="module")
def models(model):
    """The tokenizer of the shared model with two small random decoders."""
    made = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        config = dataclasses.replace(model.config, **shape)
        tree = random_tree(param_shapes(config), np.random.default_rng(seed))
        variables = jax.tree.map(jnp.asarray, tree)
        made[name] = dataclasses.replace(model, config=config, variables=variables)
    return made


@pytest.fixture(scope="module")
def rows():
    """(past, following), token ids without bos."""
    rng = np.random.default_rng(7)
    draw = lambda sizes: [rng.integers(1, VOCAB, n).astype(np.int32) for n in sizes]
    return draw(PAST), draw(FOLLOWING)


def made(family, ratio):
    return make_methods([family], [ratio])[0].sized(LONGEST)


def read_all(model, row):
    return forward(model.config, model.variables, row, nothing(model.config), 0)


def beacon_slots(model, row, ratio):
    return len(row) // ratio + (model.config.beacon.sink if len(row) else 0)


# --- what each method leaves of a row: (entries, position of what follows) ----------


def left_by_full(model, row, ratio, following):
    return read_all(model, row).own, len(row)


def left_by_window(model, row, ratio, following):
    return nothing(model.config), 0


def left_by_streaming(model, row, ratio, following):
    k, memory = beacon_slots(model, row, ratio), nothing(model.config)
    for start in range(0, len(row), W):
        at = memory.k.shape[1]
        piece = row[start : start + W]
        own = forward(model.config, model.variables, piece, memory, at).own
        memory = memory.then(own)
        places = list(range(memory.k.shape[1]))
        while len(places) > k:  # the oldest that is no sink goes
            del places[min(4, k // 2)]
        memory = memory.take(places).compact()
    return memory, memory.k.shape[1]


def shortened(choose):
    def left(model, row, ratio, following):
        text = choose(row, beacon_slots(model, row, ratio))
        return read_all(model, text).own, len(text)

    return left


def left_by_selective(model, row, ratio, following):
    if not len(row):
        return nothing(model.config), 0
    logits = read_all(model, row).logits
    surprise = [np.inf]
    for scores, token in zip(logits[:-1], row[1:], strict=True):
        surprise.append(np.log(np.exp(scores - scores[token]).sum()))
    places = sorted(range(len(row)), key=lambda i: -surprise[i])
    text = row[sorted(places[: beacon_slots(model, row, ratio)])]
    return read_all(model, text).own, len(text)


def sampled(choose):
    def left(model, row, ratio, following):
        places = choose(row, beacon_slots(model, row, ratio), ratio)
        return read_all(model, row).own.take(places).compact(), len(places)

    return left


def left_by_mean_pool(model, row, ratio, following):
    own = read_all(model, row).own
    sinks = beacon_slots(model, row, ratio) - len(row) // ratio
    groups = [own.take(slice(i, i + ratio)) for i in range(0, len(row), ratio)]
    memory = own.take(slice(0, sinks))
    for group in groups:
        means = (x.mean(1, keepdims=True) for x in group[:2])
        memory = memory.then(numpy_model.Entries.plain(*means, group.at[:, :1]))
    return memory.compact(), memory.k.shape[1]


def snapped(aware):
    def left(model, row, ratio, following):
        k = beacon_slots(model, row, ratio)
        if not k:
            return nothing(model.config), 0
        text = np.concatenate([row, following]) if aware else row
        own = 0 if aware else min(64, k // 2)
        watching = min(64, len(following)) if aware else own
        candidates = len(row) - own
        found = read_all(model, text)
        index = snap_index(model.config, found, watching, candidates, k - own)
        last = np.arange(candidates, len(row))[None, :, None]
        last = np.broadcast_to(last, (*index.shape[:1], own, index.shape[2]))
        index = np.concatenate([index, last], axis=1)
        return found.own.take_each(index).compact(), k

    return left


def snap_index(config, found, watching, candidates, k):
    """Places [L, k, K] with the most pooled votes of the last `watching` queries."""
    total, index = found.own.k.shape[1], []
    group = config.num_heads // config.num_kv_heads
    seen = np.tril(np.ones((total, total), bool))
    for layer in range(config.num_layers):
        keys = rotated(config, found.own.k[layer], found.own.at[layer])
        weights = attention(config, found.queries[layer], keys, seen)
        chosen = []
        for head in range(config.num_kv_heads):
            votes = np.zeros(candidates + 4)
            for n in range(head * group, (head + 1) * group):
                for t in range(total - watching, total):
                    votes[2:-2] += weights[n, t, :candidates] / group
            pooled = np.convolve(votes, np.ones(5) / 5, "valid")
            chosen.append(np.sort(np.argsort(-pooled, kind="stable")[:k]))
        index.append(np.stack(chosen, -1))
    return np.stack(index)


def chosen(scores_of):
    """Keeps the slots with the highest scores [K, n] of a layer, at compact places."""

    def left(model, row, ratio, following):
        k = beacon_slots(model, row, ratio)
        if not k:
            return nothing(model.config), 0
        own, index = read_all(model, row).own, []
        for scores in scores_of(model, row):
            order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
            index.append(np.sort(order, axis=-1).T)
        return own.take_each(np.stack(index)).compact(), k

    return left


def expected_scores(model, row):
    config, found = model.config, read_all(model, row)
    n, h, scale = len(row), model.config.head_dim, model.config.rope.attention_scale
    at = np.arange(n)[:, None]
    angles = (n + np.arange(512))[:, None] * inverse_frequencies(config.rope, h)
    cos, sin = (np.diag(f(angles).mean(0)) * scale for f in (np.cos, np.sin))
    turn = np.block([[cos, -sin], [sin, cos]])
    for layer in range(config.num_layers):
        queries = rotated(config, found.queries[layer], -at)[4:] / scale**2
        keys = rotated(config, found.own.k[layer], found.own.at[layer])
        group = config.num_heads // config.num_kv_heads
        scores = np.zeros((config.num_kv_heads, n))
        for head in range(config.num_heads):
            mine = queries[:, head]
            mean, k = turn @ mine.mean(0), keys[4:, head // group]
            spread = turn @ np.cov(mine.T, bias=True) @ turn.T
            each = k @ mean / h**0.5 + np.einsum("sh,hj,sj->s", k, spread, k) / (2 * h)
            scores[head // group, 4:] += softmax(each) / group
        scores *= np.linalg.norm(found.own.v[layer], axis=-1).T
        scores[:, :4] = np.inf
        yield scores


def matching(facts_of=lambda model, own, k: []):
    """Least squares that are solved exactly, biases by the same updates.

    facts_of: places that stay as they are in all layers and heads, of k.
    """

    def left(model, row, ratio, following):
        config, n, h = model.config, len(row), model.config.head_dim
        if not n:
            return nothing(config), 0
        # A float32 slot has a bias of 4 bytes beside its key and value.
        k = beacon_slots(model, row, ratio) * 8 * h // (8 * h + 4)
        found, made = read_all(model, row), []
        facts = facts_of(model, found.own, k)
        heads = range(config.num_kv_heads)
        for layer in range(config.num_layers):
            made += [matched_head(config, found, layer, x, k, facts) for x in heads]
        back = lambda x: np.moveaxis(
            np.stack(x).reshape(config.num_layers, len(heads), *x[0].shape), 1, 2
        )
        return numpy_model.Entries(*map(back, zip(*made, strict=True))), k

    return left


def matched_head(config, found, layer, head, k, facts):
    """Entries of one head: keys, values, places and biases of its k slots."""
    own, h, scale = found.own, config.head_dim, config.rope.attention_scale
    n, group = own.k.shape[1], config.num_heads // config.num_kv_heads
    mine = found.queries[layer][:, head * group : (head + 1) * group]
    queries = rotated(config, mine, -np.arange(n)[:, None]) / scale**2
    turn = np.arange(n)[:, None] % W
    there, here = (rotated(config, queries, at + turn).reshape(-1, h) for at in (n, k))
    keys = rotated(config, own.k[layer], own.at[layer])[:, head]
    scores = there @ keys.T / h**0.5
    weights, total = softmax(scores), np.log(np.exp(scores).sum(1, keepdims=True))
    votes = np.sqrt((weights**2).sum(0))
    votes[facts] = np.inf
    index = np.sort(np.argsort(-votes, kind="stable")[:k])
    exact, values = np.isin(index, facts), own.v[layer, :, head]
    moved = rotated(config, own.k[layer, index, head], np.arange(k))
    scores = here @ moved.T / h**0.5
    share, w = np.exp(scores - total), np.ones(k)
    for _ in range(64):
        w = w * share.sum(0) / (share.T @ (share @ w))
        w = np.where(exact, 1.0, np.clip(w, 1e-3, 1e3))
    few = softmax(scores + np.log(w))
    missing = weights @ values - few @ values[index]
    few, kept = few[:, ~exact], values[index]
    drawn = np.diag(DRAWN * (few**2).sum(0) + 1e-6)
    kept[~exact] += np.linalg.solve(few.T @ few + drawn, few.T @ missing)
    return own.k[layer, index, head], kept, np.arange(k), np.log(w)


def repeated_scores(model, row):
    config, n = model.config, len(row)
    prompt = np.asarray(encode(model.tokenizer, WHOLE, "bare"))
    text = np.concatenate([row, prompt, row])
    found, place = read_all(model, text), np.arange(len(text))
    seen = (place[None] < n) | (place[None] <= place[n:, None])
    for layer in range(config.num_layers):
        keys = rotated(config, found.own.k[layer], found.own.at[layer])
        weights = attention(config, found.queries[layer][n:], keys, seen)[..., :n]
        scores = weights.max(1).reshape(config.num_kv_heads, -1, n).max(1)
        scores[:, :4] = 1.0
        yield scores


def retained(weights, bias, threshold):
    """Facts by their values in all layers and heads, and attention matching besides."""

    def facts_of(model, own, k):
        likely = np.einsum("lnkh,lkh->n", own.v, weights) + bias
        best = np.argsort(-likely, kind="stable")[: k // 2]
        return [int(i) for i in best if likely[i] > threshold]

    return matching(facts_of)


LEFT = {
    "full": left_by_full,
    "window": left_by_window,
    "streaming": left_by_streaming,
    "keep_head": shortened(lambda row, k: row[:k]),
    "keep_tail": shortened(lambda row, k: row[::-1][:k][::-1]),
    "keep_ends": shortened(
        lambda row, k: np.delete(row, range((k + 1) // 2, len(row) - k // 2))
    ),
    "selective": left_by_selective,
    "random": sampled(lambda row, k, r: made("random", r).choose(row, k)),
    "strided": sampled(lambda row, k, r: made("strided", r).choose(row, k)),
    "mean-pool": left_by_mean_pool,
    "snapkv": snapped(aware=False),
    "snapkv_aware": snapped(aware=True),
    "expected-attention": chosen(expected_scores),
    "kvzip": chosen(repeated_scores),
    "attention-matching": matching(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FLOATS)
def test_what_follows_sees_exactly_the_entries_that_the_method_leaves(
    family, shape, models, rows
):
    model, (past, following) = models[shape], rows
    method = made(family, 4)
    memory, _ = remember(model, method, past, following)
    out, _ = feed_state(model, memory.state, following, 0, "logits")
    for i, (row, more) in enumerate(zip(past, following, strict=True)):
        left, start = LEFT[family](model, row, 4, more)
        assert memory.slots[i] == left.k.shape[1]
        want = forward(model.config, model.variables, more, left, start).logits
        got = np.asarray(out.logits)[i, : len(more)]
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [-9.0, 0.0, 9.0])
def test_what_follows_sees_the_facts_that_retention_leaves(
    shape, threshold, models, rows, tmp_path
):
    model, (past, following) = models[shape], rows
    c, rng = model.config, np.random.default_rng(5)
    weights = rng.normal(size=(c.num_layers, c.num_kv_heads, c.head_dim))
    weights = weights.astype(np.float32)
    Retention(weights, 0.5, threshold, sample_of(model.variables)).save(tmp_path)
    method = made(f"retention:{tmp_path}", 4)
    memory, _ = remember(model, method, past, following)
    out, _ = feed_state(model, memory.state, following, 0, "logits")
    for i, (row, more) in enumerate(zip(past, following, strict=True)):
        left, start = retained(weights, 0.5, threshold)(model, row, 4, more)
        want = forward(model.config, model.variables, more, left, start).logits
        got = np.asarray(out.logits)[i, : len(more)]
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("shape", ["gqa", pytest.param("mha", marks=pytest.mark.slow)])
def test_every_method_keeps_the_bytes_of_beacons_or_says_what_it_keeps(
    shape, models, rows
):
    model, (past, following) = models[shape], rows
    heads = SHAPES[shape]["num_kv_heads"]
    floats, int8 = (2 * 2 * heads * n for n in (8 * 4, 8 + 4))
    methods = [m.sized(LONGEST) for m in make_methods(sorted(FAMILIES), [2, 4, 8])]
    for method in methods:
        # A program each: int8 beacons of every ratio in one shape, others of x8.
        each = shape == "mha" and method.family == "beacon_int8"
        if "beacon" in method.family and method.ratio != 8 and not each:
            continue
        memory, kept = remember(model, method, past, following)
        if method.family == "window":
            slots = [0] * len(past)
        elif method.ratio is None:
            slots = [len(row) for row in past]
        else:
            slots = [beacon_slots(model, row, method.ratio) for row in past]
        slot = int8 if "int8" in method.family else floats
        if method.family == "attention-matching":
            larger = floats + 2 * heads * 4
            slots, slot = [n * floats // larger for n in slots], larger
        assert kept == [n * slot for n in slots], method.name
        assert np.array_equal(memory.state.slots, memory.slots)
        assert not np.asarray(memory.state.raw).any()
        assert (memory.state.sinks <= memory.state.slots).all()
    for method in (m for m in methods if m.ratio in (None, 8)):
        assert remember(model, method, [past[1]] * 4, following)[1] == [0] * 4


# Slots with a bias are larger: in the bytes of everything there are fewer.
@pytest.mark.parametrize("family", sorted({*FLOATS} - {"window", "attention-matching"}))
def test_a_budget_of_everything_changes_nothing(family, models, rows):
    model, (past, following) = models["gqa"], rows
    full = remember(model, Full().sized(LONGEST), past, following)[0]
    kept = remember(model, made(family, 1), past, following)[0]
    want, got = (
        feed_state(model, m.state, following, 0, "logits")[0].logits
        for m in (full, kept)
    )
    if family == "mean-pool":  # turned back and again
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-4)
    else:
        assert np.array_equal(got, want)


def same_memory(a, b):
    """Every slot that counts is bit-identical."""
    a, b = a.state, b.state
    counts = np.arange(a.capacity) < np.asarray(a.slots)[:, None]
    layers = lambda x: np.moveaxis(np.asarray(x), 0, 2)[counts]
    parts = lambda s: [entries_of(s.k), s.v, np.swapaxes(biased(s.k).bias, 2, 3)]
    return np.array_equal(a.slots, b.slots) and all(
        np.array_equal(layers(x), layers(y))
        for x, y in zip(parts(a), parts(b), strict=True)
    )


@pytest.mark.parametrize("family", [*FLOATS, "beacon"])
def test_only_what_is_called_question_aware_looks_at_what_follows(family, models, rows):
    model, (past, following) = models["gqa"], rows
    method = made(family, 8)
    other = [row[::-1] for row in following]
    memories = [remember(model, method, past, f)[0] for f in (following, other)]
    assert same_memory(*memories) != FAMILIES[family].question_aware
    assert method.question_aware == method.name.startswith("snapkv_aware")


def test_a_random_choice_depends_on_the_tokens_of_the_row_alone(models, rows):
    model, (past, following) = models["gqa"], rows
    method = made("random", 4)
    chosen = method.choose(past[0], 10)
    assert len(set(chosen)) == 10 and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, method.choose(past[0].astype(np.int64), 10))
    assert set(method.choose(past[0], 5)) < set(chosen)
    changed = past[0].copy()
    changed[-1] += 1
    assert not np.array_equal(chosen, method.choose(changed, 10))
    order = [2, 0, 3, 1]
    one, other = (
        remember(model, method, [past[i] for i in o], [following[i] for i in o])[0]
        for o in (range(4), order)
    )
    v, moved = one.state.v[:, 0, :10], other.state.v[:, 1, :10]
    np.testing.assert_allclose(moved, v, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "ratio", "budget", "kept"),
    [
        (16, 4, 4, [3, 7, 11, 15]),
        (8, 8, 1, [7]),
        (16, 4, 6, [0, 1, 4, 8, 11, 15]),  # two sinks; the others 3.5 apart
        (8, 8, 3, [0, 1, 7]),
        (8, 1, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0, 4, 0, []),
    ],
)
def test_strides_end_where_beacons_stand(tokens, ratio, budget, kept):
    found = made("strided", ratio).choose(np.zeros(tokens, np.int32), budget)
    assert found.tolist() == kept


@pytest.mark.parametrize(
    ("exact", "rounded"), [("full", "int8"), ("beacon", "beacon_int8")]
)
def test_an_int8_memory_is_the_memory_rounded(exact, rounded, models, rows):
    model, (past, following) = models["gqa"], rows
    a, b = (
        remember(model, made(f, 8), past, following)[0].state for f in (exact, rounded)
    )
    real = np.arange(a.capacity) < np.asarray(a.slots)[:, None]
    turns = rotary.inverse_frequencies(model.config)
    for want, found in ((a.k, b.k), (a.v, b.v)):
        got = dequantize(found, frequencies=turns)
        step = np.moveaxis(np.asarray(found.scale), -1, -2)[..., None]
        off = np.abs(got - want)
        # Layer 0 reads embeddings alone; the next one reads a memory that was rounded.
        assert (off[0] <= 0.51 * step[0])[real].all()
        assert 0 < off[1][real].max() < 0.1 * np.abs(np.asarray(want[1])[real]).max()


def test_self_information_is_the_loss_of_each_token(models, rows):
    model, (past, _) = models["gqa"], rows
    found = self_information(model, past)
    assert [len(x) for x in found] == [len(row) for row in past]
    assert np.isinf(found[0][0]) and np.isfinite(found[0][1:]).all()
    logits = read_all(model, past[0]).logits[:-1]
    want = np.log(np.exp(logits).sum(-1)) - logits[np.arange(39), past[0][1:]]
    np.testing.assert_allclose(found[0][1:], want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_mesh_leaves_the_same_memory(models, rows):
    past, following = rows
    one = models["gqa"]
    split = dataclasses.replace(one, partition=make_partition("data:2,tensor:2"))
    for family in ("snapkv_aware", "streaming", "mean-pool", "kvzip"):
        method = made(family, 4)
        a, b = (remember(m, method, past, following)[0].state for m in (one, split))
        assert b.k.sharding.spec == P(None, "data", None, "tensor")
        assert np.array_equal(a.slots, b.slots)
        real = np.arange(a.capacity) < np.asarray(a.slots)[:, None]
        for x, y in ((a.k, b.k), (a.v, b.v)):
            np.testing.assert_allclose(
                np.asarray(y)[:, real], np.asarray(x)[:, real], rtol=1e-5, atol=1e-5
            )
