"""Scores of continuations against the model's logits over everything at once."""

import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import beacon_jax
from beacon_jax.core.feed import feed
from beacon_jax.core.loss import SCORED, token_scores
from beacon_jax.core.memory import init_memory
from beacon_jax.evaluation import likelihood
from beacon_jax.evaluation.likelihood import Pair
from beacon_jax.inference.model import Model
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.tokenise import encode

# Context and continuation lengths: within a window of 32, at its edges, behind whole
# windows, a continuation longer than a window.
SHAPES = [(1, 40), (5, 3), (32, 2), (33, 31), (40, 70), (97, 3), (96, 4)]
LONGEST = 128


@pytest.fixture(scope="module")
def lm(model_folder):
    return beacon_jax.load(model_folder)


@pytest.fixture(scope="module")
def pairs(lm):
    rng = np.random.default_rng(0)
    made = [
        Pair(*(rng.integers(1, lm.config.vocab_size, n).astype(np.int32) for n in ns))
        for ns in SHAPES
    ]
    # The same context with other continuations, one of which is what the model says.
    context = made[5].context
    best = all_logits(lm, made, 0)[5][len(context) - 1].argmax()
    return [*made, *(Pair(context, np.asarray([t], np.int32)) for t in (best, 7))]


def all_logits(lm, pairs, ratio):
    """[B, T, V] of everything but the last tokens. Without beacons by the decoder
    alone, in one window of all tokens; with them by one call of `feed`."""
    c = lm.config
    rows = [np.concatenate([p.context, p.continuation[:-1]]) for p in pairs]
    tokens = np.zeros((len(rows), LONGEST), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    if ratio:
        lengths = jnp.asarray([len(row) for row in rows])
        memory, plan = init_memory(c, len(rows), 256), np.asarray([ratio])
        given = memory, jnp.asarray(tokens), lengths, plan
        out, _ = feed(Net(c), lm.variables, *given, outputs="logits")
        return np.asarray(out.logits)
    model = Decoder(Net(c), Layout(1, LONGEST, 0))
    shape = (c.num_layers, len(rows), LONGEST, c.num_kv_heads, c.head_dim)

    @jax.jit
    def whole(variables):
        buffer, zero = jnp.zeros(shape), jnp.zeros(len(rows), jnp.int32)
        hidden, *_ = apply(model, variables, jnp.asarray(tokens), buffer, buffer, zero)
        return apply(model, variables, hidden, method="logits")

    return np.asarray(whole(lm.variables))


@pytest.mark.parametrize("ratio", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_scores_are_those_of_all_logits_at_once(lm, pairs, ratio):
    found = likelihood.score(lm, pairs, ratio=ratio)
    for logits, pair, score in zip(
        all_logits(lm, pairs, ratio), pairs, found, strict=True
    ):
        start, n = len(pair.context) - 1, len(pair.continuation)
        rows = np.asarray(jax.nn.log_softmax(logits[start : start + n]), np.float64)
        total = rows[np.arange(n), pair.continuation].sum()
        assert score.loglikelihood == pytest.approx(total, abs=1e-4 * n)
        assert score.greedy == (rows.argmax(1) == pair.continuation).all()
    if not ratio:
        assert [s.greedy for s in found[-2:]] == [True, False]


def test_a_context_of_several_requests_is_compressed_once(lm, pairs, monkeypatch):
    rows = []

    def counted(self, contexts, ratio, compress=Model.compress, **options):
        rows.append(len(contexts))
        return compress(self, contexts, ratio, **options)

    monkeypatch.setattr(Model, "compress", counted)
    shared = [pairs[5], *pairs[-2:]]
    together = likelihood.score(lm, shared, ratio=2)
    assert rows == [1]
    among_others = likelihood.score(lm, pairs, ratio=2)
    for one, other in zip(together, [among_others[5], *among_others[-2:]], strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)


def test_results_come_in_order_and_are_told_as_they_come(lm, pairs):
    told = {}
    some = [pairs[i] for i in (1, 2, 0)]
    found = likelihood.score(
        lm, some, ratio=0, batch_size=1, on_score=lambda i, s: told.update({i: s})
    )
    assert list(told) == [2, 1, 0]  # the longest first: 40, 33 and 7 inputs
    assert [told[i] for i in range(3)] == found


def test_the_ratio_of_a_request_follows_its_length(lm):
    ratio = lambda name, n: likelihood.ratio_of(lm.config, name, n)
    # 512 positions: with 1,024 tokens to come x2 has too few, x4 is the largest.
    assert ratio("adapt", 100) == 4
    assert ratio("full", 100) == 0
    assert ratio("auto", 700) == 2
    assert likelihood.longest(lm.config, "full") == 512
    assert likelihood.longest(lm.config, 2) == 2 * 480 + 32
    assert likelihood.longest(lm.config, "auto") == 4 * 480 + 32
    with pytest.raises(ValueError, match="ratio=5"):
        ratio(5, 100)


def test_a_batch_is_as_large_as_its_devices_can_share(lm):
    sizes = lambda model: [len(likelihood.fill_up(model, [7] * n)) for n in (1, 3, 5)]
    assert sizes(lm) == [1, 4, 8]
    mesh = types.SimpleNamespace(shape={"data": 3, "fsdp": 2, "tensor": 4})
    split = types.SimpleNamespace(partition=types.SimpleNamespace(mesh=mesh))
    assert sizes(split) == [6, 6, 12]


def test_an_empty_side_is_named(lm):
    with pytest.raises(ValueError, match="continuation of pair 0 has shape"):
        likelihood.score(lm, [Pair(np.ones(3, np.int32), np.zeros(0, np.int32))])
    with pytest.raises(ValueError, match="batch_size=0"):
        likelihood.score(lm, [Pair(np.ones(3), np.ones(1))], batch_size=0)


def test_no_more_logits_exist_at_once_than_a_few_positions():
    b, w, d, v = 4, 2048, 8, 1000
    program = jax.make_jaxpr(
        lambda h, y, kernel: token_scores(lambda x: x @ kernel, h, y)
    )(jnp.zeros((b, w, d)), jnp.zeros((b, w), jnp.int32), jnp.zeros((d, v)))
    sizes = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            sizes.update(np.prod(x.aval.shape) for x in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                walk(inner)

    walk(program.jaxpr)
    assert SCORED * v in sizes and max(sizes) == SCORED * v


# --- from text to pairs ----------------------------------------------------------


def test_both_texts_are_encoded_together_and_cut_behind_the_context(lm):
    tokenizer = lm.tokenizer
    for context, continuation in (
        ("window beacon", " memory slot"),
        ("window beacon  ", "memory"),  # its spaces belong to the continuation
        ("wind", "ow river"),  # one word, cut in the middle
    ):
        pair = likelihood.encode_pair(tokenizer, context, continuation)
        both = encode(tokenizer, context + continuation, "start")
        assert np.concatenate(pair).tolist() == both.tolist()
        alone = encode(tokenizer, context.rstrip(), "start")
        assert len(pair.context) == min(len(alone), len(both) - 1)


def test_an_empty_context_is_the_token_in_front_of_a_text(lm):
    tokenizer = lm.tokenizer
    prefix = likelihood.prefix_token(tokenizer)
    assert prefix in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for context in ("", "  "):
        pair = likelihood.encode_pair(tokenizer, context, "river stone")
        assert pair.context.tolist() == [prefix] and len(pair.continuation) >= 1
    own = tokenizer.decode([prefix])
    pair = likelihood.encode_pair(tokenizer, "", f"{own}river")
    assert pair.context.tolist() == [prefix] and prefix not in pair.continuation
    with pytest.raises(ValueError, match="continuation is empty"):
        likelihood.encode_pair(tokenizer, "river", "")


def test_a_long_context_loses_its_left_or_its_middle():
    tokens = np.arange(10)
    cut = lambda room, side: likelihood.shorten(tokens, room, side).tolist()
    assert cut(20, "middle") == list(range(10))
    assert cut(4, "left") == [6, 7, 8, 9]
    assert cut(5, "middle") == [0, 1, 7, 8, 9]
    assert cut(0, "left") == cut(-3, "middle") == [9]
    with pytest.raises(ValueError, match="truncation='right'"):
        cut(4, "right")


@pytest.mark.parametrize(("n", "most"), [(10, 4), (8, 4), (3, 4), (9, 1), (0, 4)])
def test_rolling_predicts_every_token_once(n, most):
    tokens = np.arange(1, n + 1)
    pairs = likelihood.rolling_pairs(tokens, 0, most)
    parts = [p.continuation for p in pairs]
    assert np.concatenate([*parts, np.zeros(0)]).tolist() == tokens.tolist()
    seen = np.concatenate([[0], tokens])
    for pair in pairs:
        inputs = len(pair.context) + len(pair.continuation) - 1
        assert inputs <= most and len(pair.context) >= 1
        end = int(pair.continuation[0])
        assert pair.context.tolist() == seen[end - len(pair.context) : end].tolist()
    if n == 10:  # the example in lm_eval's documentation of loglikelihood_rolling
        assert [p.context.tolist() for p in pairs] == [[0], [4], [6, 7, 8]]
