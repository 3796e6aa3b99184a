"""Retention: a trained score finds the facts of a text, and all heads keep them.

Where each head chooses for itself, every head drops another part of a fact, and what is
left of it in a small model is no fact any more. With SmolLM2-135M and KVzip's scores, 5
of 12 passkeys survive x2 when heads choose alone, 11 when all layers and heads keep the
same tokens (1,024 tokens). So a linear score of a token's values in all layers says how
likely it belongs to a statement that a reader may be asked for. What is likely enough
stays in all layers and heads, exactly; the rest of the room goes to attention matching.
Alone that tells 7 of these 12 passkeys at x4 and none at x8; with facts whose values
are matched as well 10 and 7, with exact ones 12 and 12.

The weights are fitted in minutes, without a gradient: `beacon-jax retain`
(`inference.fit_retention`). The values that attention matching makes are
corrected besides, if there is a correction (`compressors.correction`).
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.hf.reader import SafetensorsReader, Tensor
from beacon_jax.hf.writer import write_safetensors
from beacon_jax.inference.compressors.attention_matching import (
    AttentionMatching,
    Kept,
    Seen,
)
from beacon_jax.inference.compressors.base import FORCED
from beacon_jax.inference.compressors.correction import corrected
from beacon_jax.inference.compressors.piece import Made, Piece, floats
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
      correction: added to values that attention matching makes, float32 [L, K, H];
        None: nothing.
    """

    name = "retention"

    def __init__(
        self,
        weights: Float[np.ndarray, "L K H"],
        bias: float,
        threshold: float,
        sample: Float[np.ndarray, "L H"],
        correction: Float[np.ndarray, "L K H"] | None = None,
    ):
        self.weights, self.sample, self.correction = weights, sample, correction
        self.bias, self.threshold = float(bias), float(threshold)

    def with_correction(
        self, correction: Float[np.ndarray, "L K H"] | None
    ) -> "Retention":
        """Returns the same score with another correction."""
        rest = self.bias, self.threshold, self.sample
        return Retention(self.weights, *rest, correction)

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
        shape, some = found.get("weights", ()), "correction" in found
        if len(shape) != 3 or found != _shapes(*shape, corrects=some):
            raise ValueError(
                f"{file} has the tensors {found}: weights [L, K, H], bias [1], "
                "threshold [1] and sample [L, H] are needed, and a correction has "
                "[L, K, H]. Write it again with `beacon-jax retain`."
            )
        read = {name: reader.read(name).astype(np.float32) for name in found}
        if wrong := [name for name, x in read.items() if not np.isfinite(x).all()]:
            raise ValueError(
                f"{file}: {', '.join(wrong)} has values that are no numbers. Write it "
                "again with `beacon-jax retain`."
            )
        bias, threshold = (float(read[name][0]) for name in ("bias", "threshold"))
        rest = read["sample"], read.get("correction")
        return cls(read["weights"], bias, threshold, *rest)

    def save(self, folder: str | Path) -> Path:
        """Writes the weights into a folder, which is made; returns the file."""
        arrays = {
            "weights": self.weights,
            "bias": np.asarray([self.bias]),
            "threshold": np.asarray([self.threshold]),
            "sample": self.sample,
        }
        if self.correction is not None:
            arrays["correction"] = self.correction
        arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
        tensors = {name: Tensor(x.shape, x.dtype) for name, x in arrays.items()}
        file = Path(folder).expanduser() / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file, "out") as partial:
            write_safetensors(partial, tensors, lambda name: [arrays[name]])
        return file

    @property
    def digest(self) -> str:
        """Hash of the weights."""
        parts = [self.weights, self.sample, np.asarray([self.bias, self.threshold])]
        if self.correction is not None:
            parts.append(self.correction)
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
        votes = super().score(piece, seen, count)
        return jnp.where(facts[None, :, None], FORCED, votes)

    def make(
        self,
        piece: Piece,
        seen: Any,
        scores: Float[Array, "L B K S"],
        count: Int[Array, " B"],
    ) -> MemoryState:
        # Infinite scores are those of slots that stay as they are.
        exact = jnp.where(scores >= FORCED, jnp.inf, scores)
        return super().make(piece, seen, exact, count)

    def made(self, piece: Piece, seen: Seen, kept: Kept, size: int) -> Made:
        made = super().made(piece, seen, kept, size)
        if self.correction is None:
            return made
        kept_of = np.maximum(np.asarray(kept.count), 1)
        crowd = np.log(np.maximum(piece.lengths, 1) / kept_of).astype(np.float32)
        return corrected(made, kept, crowd, jnp.asarray(self.correction))

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
    layers: int, heads: int, size: int, *, corrects: bool
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in a file."""
    found = {"weights": (layers, heads, size), "sample": (layers, size)}
    if corrects:
        found["correction"] = layers, heads, size
    return found | {"bias": (1,), "threshold": (1,)}


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
