"""Retention: a trained score finds the facts of a text, and all heads keep them.

Where each head chooses for itself, every head drops another part of a fact, and what is
left of it in a small model is no fact any more. With SmolLM2-135M and KVzip's scores, 5
of 12 passkeys survive x2 when heads choose alone, 11 when all layers and heads keep the
same tokens (1,024 tokens). So a linear score of a token's values in all layers says how
likely it belongs to a statement that a reader may be asked for. What is likely enough
stays in all layers and heads, exactly; the rest of the room goes to attention matching.
Alone that tells 6 of these 12 passkeys at x4 and none at x8; with facts whose values
are matched as well 10 and 7, with exact ones 12 and 12.

The weights are fitted in minutes, without a gradient: `beacon-jax retain`
(`inference.fit_retention`). Summaries, which it may have besides, are trained.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.hf.reader import SafetensorsReader, Tensor
from beacon_jax.hf.writer import write_safetensors
from beacon_jax.inference.compressors.attention_matching import (
    AttentionMatching,
    Matched,
)
from beacon_jax.inference.compressors.base import FORCED
from beacon_jax.inference.compressors.piece import Kept, Made, Piece, floats
from beacon_jax.inference.compressors.summary import (
    Summary,
    features,
    rounded,
    summarised,
)
from beacon_jax.model.buffers import Buffer
from beacon_jax.model.net import Net
from beacon_jax.paths import new_file

FILE = "retention.safetensors"
SHARE = 0.5  # of the room, at most, that is for what is likely
ALIKE = 0.9  # cosine of the samples of two models whose values mean the same


class Retention(AttentionMatching):
    """Keeps what a trained score takes for facts, whole, and matches attention besides.

    It sees no question. In each piece at most half of what may be kept is kept by the
    score, in all layers and heads, with keys and values as they are; the rest is what
    attention matching makes.

    Attributes:
      weights: of the values of a token in all layers, float32 [L, K, H].
      bias: is added to their sum.
      threshold: what a likely token is above.
      sample: of the model's weights, from which another model is told, [L, H].
      summary: what kept tokens gain of those dropped around them; None: nothing.
    """

    name = "retention"

    def __init__(
        self,
        weights: Float[np.ndarray, "L K H"],
        bias: float,
        threshold: float,
        sample: Float[np.ndarray, "L H"],
        summary: Summary | None = None,
    ):
        self.weights, self.sample = weights, sample
        self.summary = None if summary is None else rounded(summary)
        self.bias, self.threshold = float(bias), float(threshold)

    def with_summary(self, summary: Summary | None) -> "Retention":
        """Returns the same scores with another summary."""
        rest = self.bias, self.threshold, self.sample
        return Retention(self.weights, *rest, summary)

    @classmethod
    def load(cls, path: str | Path) -> "Retention":
        """Reads what `save` wrote.

        Args:
          path: the file, or the folder with it.

        Raises:
          FileNotFoundError, ValueError: there is none, or it is damaged.
        """
        path = Path(path).expanduser()
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"method=retention:{path} has no {FILE}: give the folder that "
                "`beacon-jax retain` wrote, or make one with it."
            )
        reader = SafetensorsReader([file], file.parent)
        found = {name: tensor.shape for name, tensor in reader.tensors.items()}
        shape, rank = found.get("weights", ()), found.get("summary_a", ())[-1:]
        if len(shape) != 3 or found != _shapes(shape, *rank):
            raise ValueError(
                f"{file} has the tensors {found}: weights [L, K, H], bias [1], "
                "threshold [1] and sample [L, H] are needed, and for a summary "
                "summary_a [L, K, 3 H + 2, R] and summary_b [L, K, R, 2 H]. Write it "
                "again with `beacon-jax retain`."
            )
        read = {name: reader.read(name).astype(np.float32) for name in found}
        if wrong := [name for name, x in read.items() if not np.isfinite(x).all()]:
            raise ValueError(
                f"{file}: {', '.join(wrong)} has values that are no numbers. Write it "
                "again with `beacon-jax retain`."
            )
        bias, threshold = (float(read[name][0]) for name in ("bias", "threshold"))
        summary = Summary(read["summary_a"], read["summary_b"]) if rank else None
        return cls(read["weights"], bias, threshold, read["sample"], summary)

    def save(self, folder: str | Path) -> Path:
        """Writes the weights into a folder, which is made; returns the file."""
        arrays = {
            "weights": self.weights,
            "bias": np.asarray([self.bias]),
            "threshold": np.asarray([self.threshold]),
            "sample": self.sample,
        }
        if self.summary is not None:
            arrays |= {"summary_a": self.summary.a, "summary_b": self.summary.b}
        arrays = {
            name: x if x.dtype == ml_dtypes.bfloat16 else x.astype(np.float32)
            for name, x in arrays.items()
        }
        tensors = {name: Tensor(x.shape, x.dtype) for name, x in arrays.items()}
        file = Path(folder).expanduser() / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file, "out") as partial:
            write_safetensors(partial, tensors, lambda name: [arrays[name]])
        return file

    @property
    def digest(self) -> str:
        """Hash of the weights."""
        numbers = np.asarray([self.bias, self.threshold])
        parts = self.weights, self.sample, numbers, *(self.summary or ())
        data = b"".join(np.ascontiguousarray(x, np.float64).tobytes() for x in parts)
        return hashlib.sha256(data).hexdigest()[:16]

    def observe(self, piece: Piece) -> Any:
        self._check(piece)
        return super().observe(piece)

    def score(
        self, piece: Piece, seen: Any, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        weights = jnp.asarray(self.weights)
        found = likely(piece.net, piece.state.v, weights) + self.bias
        facts = chosen(found, jnp.asarray(piece.inside), self.threshold, count)
        attended = super().score(piece, seen, count)
        return jnp.where(facts[None, :, None], FORCED, attended)

    def make(
        self,
        piece: Piece,
        seen: Any,
        scores: Float[Array, "L B K S"],
        count: Int[Array, " B"],
    ) -> MemoryState:
        return super().make(piece, seen, self.exact(scores), count)

    @staticmethod
    def exact(scores: Float[Array, "L B K S"]) -> Float[Array, "L B K S"]:
        """Marks facts as slots that stay as they are."""
        return jnp.where(scores >= FORCED, jnp.inf, scores)

    def made(self, piece: Piece, kept: Kept, found: Matched) -> Made:
        if self.summary is None:
            return super().made(piece, kept, found)
        summary = Summary(*map(jnp.asarray, self.summary))
        k, v = summarised(piece.net, piece.state, kept, found, summary)
        return Made(k, v, found.bias)

    def _check(self, piece: Piece) -> None:
        """Raises ValueError if the weights are not of the piece's model."""
        c = piece.net.config
        own = (c.num_layers, c.num_kv_heads, c.head_dim)
        if own != self.weights.shape:
            raise ValueError(
                f"method=retention has weights of shape {self.weights.shape}, but the "
                f"model has values of {own} (layers, kv heads, head size): give those "
                "that `beacon-jax retain` made for this model."
            )
        theirs = sample_of(piece.variables)
        norms = np.linalg.norm(theirs) * np.linalg.norm(self.sample)
        alike = float((theirs * self.sample).sum() / norms) if norms else 0.0
        if alike < ALIKE:
            raise ValueError(
                "method=retention was fitted to another model of the same shapes (the "
                f"cosine of their weights is {alike:.2f}): give those that "
                "`beacon-jax retain` made for this model."
            )


def _shapes(
    weights: tuple[int, ...], rank: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in a file; rank: of its summary, if any."""
    layers, heads, size = weights
    found = {"weights": weights, "sample": (layers, size), "bias": (1,)}
    found["threshold"] = (1,)
    if rank is not None:
        found["summary_a"] = layers, heads, features(size), rank
        found["summary_b"] = layers, heads, rank, 2 * size
    return found


def sample_of(variables: Any) -> Float[np.ndarray, "L H"]:
    """Takes a row of each layer's value projection.

    The same model in another precision has nearly the same, another model has not.
    """
    kernel = variables["params"]["layers"]["attention"]["v_proj"]["kernel"]
    return np.asarray(kernel[:, 0, 0].astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="net")
def likely(
    net: Net, values: Buffer, weights: Float[Array, "L K H"]
) -> Float[Array, "B S"]:
    """Adds up the weighted values of each slot over layers and heads."""

    def one(x):
        layer, of_layer = x
        return jnp.einsum("BSKH,KH->BS", floats(net, values, layer), of_layer)

    return jax.lax.map(one, (jnp.arange(len(weights)), weights)).sum(0)


@jax.jit
def chosen(
    found: Float[Array, "B S"],
    inside: Bool[Array, "B S"],
    threshold: Any,
    count: Int[Array, " B"],
) -> Bool[Array, "B S"]:
    """Tells which slots are above the threshold, of the highest SHARE of `count`."""
    found = jnp.where(inside, found, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-found, axis=-1, stable=True), axis=-1)
    return (found > threshold) & (rank < jnp.floor(count * SHARE)[:, None])
