"""The model under evaluation: a checkpoint with the few operations that tasks need.

It has no memory of its own: what a row remembers is a `MemoryState`, which methods make
and tasks pass on.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from beacon_jax.core.feed import FeedOutput, feed
from beacon_jax.core.memory import MemoryState
from beacon_jax.core.plan import capacity
from beacon_jax.hf.checkpoint import Checkpoint, load
from beacon_jax.inference import leaves
from beacon_jax.inference.decode import Decoding, decode
from beacon_jax.inference.loading import placed_on
from beacon_jax.inference.sampling import make_sampling
from beacon_jax.inference.text import Streamer, finisher
from beacon_jax.model.config import BeaconConfig, ModelConfig, check_ratio
from beacon_jax.model.net import Net
from beacon_jax.model.partition import Partition, make_partition
from beacon_jax.resources import load_tokenizer

GREEDY = make_sampling()
Rows = Sequence[np.ndarray]  # one int32 [n] per row, lengths may differ


class Answers(NamedTuple):
    """Greedy continuations of a batch.

    Attributes:
      texts: in front of the stop string or the end token.
      tokens: of each row, int32 [n].
      memory: holds them too; a row that a stop string ended may hold more, so do not
        continue from it when `stop` was given.
    """

    texts: list[str]
    tokens: list[np.ndarray]
    memory: MemoryState


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint with the shapes of this run.

    Attributes:
      config: always with a `beacon` part, because that holds the window.
      longest: largest number of raw tokens of an example, generated ones included.
      partition: the devices that it is split over; None: one.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Any
    longest: int
    partition: Partition | None = None

    @property
    def window(self) -> int:
        assert self.config.beacon is not None
        return self.config.beacon.window

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters, and so of the computation and the memory."""
        return self.net.dtype

    @property
    def net(self) -> Net:
        """What its programs depend on besides arrays."""
        return Net.of(self.config, self.variables, self.partition)

    def new_memory(self, batch: int, ratio: int, dtype: Any = None) -> MemoryState:
        """An empty memory with room for `longest` tokens at this ratio.

        dtype: of keys and values; None: that of the model.
        """
        slots = capacity(self.config, self.plan(ratio))
        dtype = dtype or self.dtype
        return leaves.empty(self.config, batch, slots, dtype, self.partition)

    def feed(
        self,
        memory: MemoryState,
        rows: Rows,
        ratio: int,
        *,
        outputs: str = "last",
        labels: Rows | None = None,
        donate: bool = False,
    ) -> tuple[FeedOutput, MemoryState]:
        """Feeds each row's next tokens; the windows that begin now have `ratio`.

        Rows are padded to one window or, if they are longer, to `longest`: two
        compiled programs per ratio for all lengths and tasks. `memory` stays usable
        unless it is donated, which saves a second one.
        """
        lengths = np.asarray([len(row) for row in rows], np.int32)
        size = self.window if lengths.max() <= self.window else self._padded
        wanted = None if labels is None else jnp.asarray(pad(labels, size, -100))
        return feed(
            self.net,
            self.variables,
            memory,
            jnp.asarray(pad(rows, size, 0)),
            jnp.asarray(lengths),
            jnp.asarray(self.plan(ratio)),
            outputs=outputs,
            labels=wanted,
            donate=donate,
        )

    def decode(
        self,
        memory: MemoryState,
        logits: Float[jax.Array, "B V"],
        new_tokens: int,
        ratio: int,
        stop: Sequence[str] = (),
    ) -> Answers:
        """Decodes greedy answers; `logits` are those of each prompt's end.

        A row ends at an end token, in front of a stop string or after `new_tokens`.
        `memory` stays usable.
        """
        streams = [Streamer(self.tokenizer, stop=stop) for _ in range(len(logits))]
        found = decode(
            self.net,
            self.variables,
            memory,
            logits,
            self.plan(ratio),
            Decoding(new_tokens, GREEDY, finished=finisher(streams)),
        )
        tokens = [t[:n] for t, n in zip(found.tokens, found.lengths, strict=True)]
        return Answers([s.finish() for s in streams], tokens, found.memory)

    def answer_losses(
        self,
        memory: MemoryState,
        logits: Float[jax.Array, "B V"],
        references: Rows,
        ratio: int,
    ) -> list[float]:
        """Mean loss, nats per token, of what should follow each prompt.

        Teacher forced, in pieces of a window; `references` have 1 token or more each.
        """
        first = np.asarray([r[0] for r in references])
        norm = jax.nn.logsumexp(logits, axis=-1)
        lost = norm - jnp.take_along_axis(logits, first[:, None], axis=1)[:, 0]
        sums = np.asarray(lost, np.float64)
        longest = max(map(len, references))
        for start in range(0, longest - 1, self.window):
            at = slice(start, start + self.window)
            given = [r[:-1][at] for r in references]
            wanted = [r[1:][at] for r in references]
            out, memory = self.feed(memory, given, ratio, outputs="loss", labels=wanted)
            losses = np.asarray(out.token_loss, np.float64)
            counts = np.asarray([len(g) for g in given])
            real = np.arange(losses.shape[1]) < counts[:, None]
            sums += np.where(real, losses, 0.0).sum(axis=1)
        return [float(s / len(r)) for s, r in zip(sums, references, strict=True)]

    def plan(self, ratio: int) -> Int[np.ndarray, " P"]:
        """The ratio of every window of a sequence."""
        return np.full(self._padded // self.window + 1, ratio, np.int32)

    @property
    def _padded(self) -> int:
        return -(-self.longest // self.window) * self.window


def load_model(
    path: str,
    longest: int,
    ratios: Sequence[int],
    *,
    window: int | None = None,
    dtype: str | None = None,
    mesh: str | None = None,
) -> Model:
    """Reads a checkpoint for evaluation.

    Args:
      ratios: ratios > 0 that beacons will be asked for (they need not be those of the
        config, which is how unseen ratios are measured).
      window: for a model without beacons only, which has no window of its own.
      mesh: devices to split over, as in "data:1,fsdp:1,tensor:8"; None: one device.

    Raises:
      ValueError: beacons asked of a model that has none, or a window of one that does.
    """
    partition = make_partition(mesh) if mesh else None
    place = placed_on(partition) if partition else None
    read = functools.partial(load, path, dtype=dtype, place=place)
    found = read()
    if found.config.beacon is None:
        if ratios:
            raise ValueError(
                f"--model={path} has no beacons: train some, or use "
                "--methods=full,window."
            )
        if not window:
            raise ValueError(
                f"--model={path} has no beacons and so no window: name one, for "
                "example --window=64."
            )
        found = read(beacon=BeaconConfig(window=window, ratios=(window,)))
    elif window and window != found.config.beacon.window:
        raise ValueError(
            f"--window={window} differs from the {found.config.beacon.window} that "
            f"the beacons of --model={path} were trained with: leave it out."
        )
    assert found.config.beacon is not None
    for ratio in ratios:
        try:
            check_ratio(ratio, found.config.beacon.window)
        except ValueError as error:
            raise ValueError(f"--ratios has {ratio}: {error}") from None
    variables = jax.tree.map(jnp.asarray, found.variables)
    tokenizer = load_tokenizer(path)
    return Model(found, found.config, variables, tokenizer, longest, partition)


def pad(rows: Rows, size: int, fill: int) -> np.ndarray:
    """Pads rows at the right to int32 [B, size]."""
    out = np.full((len(rows), size), fill, np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
