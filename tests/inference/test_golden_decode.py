"""The authors' implementation, replayed through `prefill` and the decoding loop.

`tests.golden` replays the same cases through `feed` and `decode_step`
(docs/specification.md section 7).
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.core.plan import capacity
from beacon_jax.inference.decode import Decoding, decode
from beacon_jax.inference.sampling import make_sampling
from tests.golden import Replay

pytestmark = pytest.mark.optimized

GOLDENS = Path(__file__).parents[1] / "goldens"
GREEDY = make_sampling()


class Loop:
    """One golden case with one memory."""

    def __init__(self, name: str):
        self.replay = Replay(GOLDENS / name)
        config = self.replay.config
        self.calls = [c for c in self.replay.case["calls"] if c["op"] != "reset"]
        resets = [c["op"] for c in self.replay.case["calls"]]
        if "reset" in resets[1:]:  # the same text again, in one call
            self.calls = self.calls[: resets.index("reset", 1) - 1]
        self.plan = self.replay.schedule(self.calls)
        self.memory: Any = None
        self.room = capacity(config, [*self.plan, int(self.plan[-1])])

    def prefill(self, tokens: np.ndarray) -> jax.Array:
        if self.memory is None:
            self.memory = init_memory(self.replay.config, len(tokens), self.room)
        out, self.memory = feed(
            self.replay.net,
            self.replay.variables,
            self.memory,
            tokens,
            None,
            self.plan,
        )
        return out.last_logits

    def decode(self, logits: jax.Array, new: int) -> tuple[np.ndarray, jax.Array]:
        result = decode(
            self.replay.net,
            self.replay.variables,
            self.memory,
            logits,
            self.plan,
            Decoding(new, GREEDY, eos_ids=()),
            donate=True,
        )
        self.memory = result.memory
        return result.tokens, result.logits


@pytest.mark.parametrize("pieces", [(45,), (16, 29), (7, 9, 1, 28)])
def test_the_golden_greedy_text_is_decoded_token_by_token(pieces):
    """Three windows fill up during the 40 tokens."""
    loop = Loop("p4_qwen2_greedy_boundaries")
    prompt, golden = loop.replay.data["gen.prompt"], loop.replay.data["gen.tokens"]
    start = 0
    for size in pieces:
        logits = loop.prefill(prompt[:, start : start + size])
        start += size
    first, last = loop.decode(logits, 23)
    second, _ = loop.decode(last, golden.shape[1] - 23)
    assert np.concatenate([first, second], axis=1).tolist() == golden.tolist()


@pytest.mark.parametrize(
    "name",
    [
        "p3_llama_infer_sink1",
        "p6_llama_chunked_multi_turn",
        "p8_llama_append_full_coverage_chunked",
    ],
)
def test_the_golden_logits_come_out_of_the_loop_fed_with_the_golden_text(name):
    """Of each piece (sinks, multi-turn, appended beacons) the first 30 % are prefilled;
    the loop is given the others one by one, as logits that leave no other choice."""
    loop = Loop(name)
    vocab, picks = loop.replay.config.vocab_size, []
    for call in loop.calls:
        _, ids, _, _ = loop.replay.arrays(call)
        golden = loop.replay.data[f"call{call['index']}.logits_all"]
        begun = 3 * ids.shape[1] // 10
        for at in range(max(begun, 1) - 1, ids.shape[1]):
            if at == begun - 1:
                found = loop.prefill(ids[:, :begun])
            else:
                if loop.memory is None:
                    loop.memory = init_memory(loop.replay.config, len(ids), loop.room)
                forced = jax.nn.one_hot(ids[:, at], vocab)
                tokens, found = loop.decode(forced, 1)
                assert tokens[:, 0].tolist() == ids[:, at].tolist()
            np.testing.assert_allclose(found, golden[:, at], atol=1e-4)
            picks.append(np.argmax(found, axis=1) == np.argmax(golden[:, at], axis=1))
    assert np.all(picks) and len(picks) > 50
