"""The one decoder for Llama-2/3, Mistral, Qwen2, Qwen2.5 and Qwen3, and its beacons.

Parameters live in two collections: "params" (the base, frozen) and "beacon" (trained).
Every parameter has logical axis names; layers are scanned and their parameters stacked.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.attention import RESIDUALS, prefix_attention
from beacon_jax.model import buffers, stages
from beacon_jax.model.buffers import Buffer
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, inverse_frequencies, rotate

INIT = nn.initializers.normal(0.02)
LAYERS = "layers"  # the name of what is stacked, in every collection
QUERIES = "queries"  # a collection of what attention asks, for those who name it
# Float16 ends at 65,504, the residual stream of models trained in bfloat16 does not:
# Qwen2-57B's layers write up to 50,000 at once (auto-round #218), and their inputs, as
# products of two numbers, may be as large. What a layer writes is computed this much
# smaller and added up in float32, so it may reach 1,048,064.
SHRINK = 2.0**-4


def residual_dtype(dtype: Any) -> Any:
    """Returns the dtype of the residual stream of a model that computes in `dtype`."""
    return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype


def shrunk(x: Array) -> Array:
    """Scales the input of an output projection by 1/16 in float16: no overflow."""
    return x * jnp.asarray(SHRINK, x.dtype) if x.dtype == jnp.float16 else x


def add_residual(x: Array, out: Array) -> Array:
    """Adds to the residual stream x what was made of `shrunk` numbers."""
    return x + out.astype(x.dtype) / SHRINK if out.dtype == jnp.float16 else x + out


class Entries(NamedTuple):
    """Keys (not rotated) and values of the kept entries, [L, B, n, K, H]."""

    k: Array
    v: Array


class Place(NamedTuple):
    """Where the T entries of a window stand in each row's buffer, for all layers.

    Attributes:
      prefix: entries in front of them, which is also the first one's position.
      cos, sin: of their rotary angles.
      live: rows whose buffers are written; None: all.
      real: entries that stand for real tokens (a window may have less than W tokens of
        a row, or none); None: all.
    """

    prefix: Int[Array, " B"]
    cos: Float[Array, "B T 1 H2"]
    sin: Float[Array, "B T 1 H2"]
    live: Bool[Array, " B"] | None = None
    real: Bool[Array, "B T"] | None = None


def place_of(
    config: ModelConfig,
    layout: Layout,
    prefix: Int[Array, " B"],
    valid: Int[Array, " B"] | None = None,
) -> Place:
    """Places the entries of a layout behind `prefix` others in each row.

    Args:
      valid: raw tokens of each row that are real; None: all.
    """
    angles = cos_sin(config, prefix[:, None] + jnp.arange(layout.length))
    if valid is None:
        return Place(prefix, *angles)
    real = valid[:, None] >= layout.tokens_before
    return Place(prefix, *angles, live=valid > 0, real=real)


def attend_rows(
    net: Net,
    q: Float[Array, "B T N H"],
    k: Buffer,
    v: Buffer,
    prefix: Int[Array, " B"],
    layer: buffers.Layer,
    frequencies: Float[np.ndarray, " H2"],
) -> Float[Array, "B T N H"]:
    """Runs `prefix_attention`; with a partition each device has its rows and heads.

    The compiler cannot split a kernel: it would gather what goes in.
    """

    def attend(q, k, v, prefix, layer):
        k, v, options = buffers.for_attention(k, v, frequencies)
        options |= {"layer": layer, "implementation": net.attention}
        options["target"] = net.target
        return prefix_attention(q, k, v, prefix, **options)

    partition = net.partition
    if partition is None:
        return attend(q, k, v, prefix, layer)
    # Heads go with their kv head.
    split = partition.spec(("batch", None, "kv_heads", None), q.shape)
    k_split, v_split = (buffers.specs(x, partition) for x in (k, v))
    one = jax.sharding.PartitionSpec(split[0])
    layers = None if layer is None else jax.sharding.PartitionSpec()
    return jax.shard_map(
        attend,
        mesh=partition.mesh,
        in_specs=(split, k_split, v_split, one, layers),
        out_specs=split,
        axis_names=partition.free_axes,
        check_vma=False,
    )(q, k, v, prefix, layer)


def _zeros(init, shape):
    """Makes an initialiser of boxed zeros for a beacon variable.

    Only shapes and axes count here; the start values come from `init_beacon`.
    """
    return lambda: jax.tree.map(
        jnp.zeros_like, init(jax.random.key(0), shape, jnp.float32)
    )


class Linear(nn.Module):
    """Maps [B, T, *inputs] to [B, T, *outputs]; beacon rows use their own weights.

    Attributes:
      own: beacons have weights of their own.
      rank: above 0 these are no weights in place of the base's W: beacon rows get
        (x A) B on top of x W. W + A B is never made: the backward pass would keep one
        per layer.
      anchored: beacon rows start from the result of the raw row in front of them, in
        place of their own x W.
      writes: into the residual stream; its inputs are `shrunk`.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    use_bias: bool
    own: bool
    layout: Layout
    dtype: Any
    writes: bool = False
    rank: int = 0
    anchored: bool = False

    @nn.compact
    def __call__(self, x):
        shape = self.inputs + self.outputs
        kernel_init = nn.with_logical_partitioning(INIT, self.axes)
        bias_axes = self.axes[len(self.inputs) :]
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, bias_axes)
        base: dict[str, Any] = {"kernel": self.param("kernel", kernel_init, shape)}
        if self.use_bias:
            base["bias"] = self.param("bias", bias_init, self.outputs)
        if not self.own:
            return self._from_base(x, base)
        if self.rank:
            return self._low_rank(x, self._from_base(x, base))
        kernel = self.variable("beacon", "kernel", _zeros(kernel_init, shape))
        beacon: dict[str, Any] = {"kernel": kernel.value}
        if self.use_bias:
            bias = self.variable("beacon", "bias", _zeros(bias_init, self.outputs))
            beacon["bias"] = bias.value
        if self.layout.beacons == 0:
            return self._apply(x, base)
        raw, beacons = self.layout.split(x)
        return self.layout.join(self._apply(raw, base), self._apply(beacons, beacon))

    def _from_base(self, x, base):
        """Multiplies with the base's W; anchored beacons get their anchors' results."""
        if not self.anchored or self.layout.beacons == 0:
            return self._apply(x, base)
        raw = self._apply(self.layout.split(x)[0], base)
        return self.layout.join(raw, self.layout.anchors(raw))

    def _low_rank(self, x, y):
        """Adds (x A) B to the beacon rows of y, which are those of `_from_base`."""
        n = len(self.inputs)

        def matrix(name, shape, axes):
            init = nn.with_logical_partitioning(INIT, axes)
            return self.variable("beacon", name, _zeros(init, shape)).value

        a = matrix("lora_a", (*self.inputs, self.rank), (*self.axes[:n], None))
        b = matrix("lora_b", (self.rank, *self.outputs), (None, *self.axes[n:]))
        if self.layout.beacons == 0:
            return y
        change = self._product(self._product(self.layout.split(x)[1], a, n), b, 1)
        raw, beacons = self.layout.split(y)
        return self.layout.join(raw, beacons + change)

    def _product(self, x, kernel, n):
        """Multiplies the last n axes of x with the first n of a kernel."""
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        return jnp.tensordot(x, kernel.astype(self.dtype), contract)

    def _apply(self, x, weights):
        y = self._product(x, weights["kernel"], len(self.inputs))
        if "bias" not in weights:
            return y
        bias = weights["bias"].astype(self.dtype)
        return y + (shrunk(bias) if self.writes else bias)


class RMSNorm(nn.Module):
    """Normalises the last axis by its root mean square in float32; casts to `dtype`."""

    size: int
    eps: float
    dtype: Any
    axis: str = "norm"

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale: Any = self.param("scale", init, (self.size,))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (scale.astype(jnp.float32) * y).astype(self.dtype)


class Attention(nn.Module):
    """Attention of a window to the memory and to itself.

    Qwen3 normalises each head of q and k in front of rotary, by frozen scales that raw
    and beacon rows share: k = norm(x W), for beacons with a rank norm(x W + (x A) B),
    and with an anchor norm(anchor's x W + (x A) B). The anchor's result is taken and
    changed in front of the norm, so the key of a fresh beacon is its anchor's, bit by
    bit. Keys are normed as they enter the memory, which is not rotated.

    Attributes:
      keep: entries whose un-rotated keys and values are returned.
      remat: the backward pass writes the window into its buffer again, instead of
        keeping a buffer per layer.
    """

    net: Net
    layout: Layout
    keep: tuple[int, ...]
    remat: bool = False

    def setup(self):
        c, dtype = self.net.config, self.net.dtype
        d, h = (c.hidden_size,), c.head_dim
        owned, rank = (c.beacon.param, c.beacon.rank) if c.beacon else ((), 0)
        anchored = c.beacon is not None and c.beacon.anchor == "last"
        make = lambda letter, i, o, axes, bias: Linear(
            *(i, o, axes, bias, letter in owned, self.layout, dtype),
            writes=letter == "o",
            rank=rank,
            anchored=anchored and letter in "kv",
        )
        heads, kv_heads = (c.num_heads, h), (c.num_kv_heads, h)
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.q_proj = make("q", d, heads, ("embed", "heads", "head_dim"), c.qkv_bias)
        self.k_proj = make("k", d, kv_heads, kv_axes, c.qkv_bias)
        self.v_proj = make("v", d, kv_heads, kv_axes, c.qkv_bias)
        self.o_proj = make("o", heads, d, ("heads", "head_dim", "embed"), c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(h, c.rms_norm_eps, dtype, "head_dim") for _ in "qk"
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        k_buffer: Buffer,
        v_buffer: Buffer,
        place: Place,
        layer: buffers.Layer,
    ) -> tuple[Float[Array, "B T D"], Entries, Buffer, Buffer]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.net.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        keep = jnp.asarray(self.keep, jnp.int32)
        kept = Entries(k[:, keep], v[:, keep])
        prefix, live = place.prefix, place.live
        # A decoded token reads the buffer, a window what `buffers.read` makes of it.
        window = self.layout.groups * self.layout.raw > 1
        if window and live is not None and place.real is not None:
            k_buffer = buffers.centred(
                k_buffer,
                k * self.net.config.rope.attention_scale,
                layer,
                live & (prefix == 0),
                place.real,
            )
        q, k = (rotate(x, place.cos, place.sin) for x in (q, k))
        if not self.is_initializing():  # and is nothing where no one asks for it
            self.sow(QUERIES, "rotated", q)

        def attend(q, k, v, k_buffer, v_buffer):
            frequencies = inverse_frequencies(self.net.config)
            k_buffer = buffers.put(k_buffer, k, prefix, layer, live, frequencies)
            v_buffer = buffers.put(v_buffer, v, prefix, layer, live, frequencies)
            k_read, v_read, at = k_buffer, v_buffer, layer
            if window:
                k_read, _ = buffers.read(k_buffer, k, prefix, layer, frequencies)
                v_read, at = buffers.read(v_buffer, v, prefix, layer, frequencies)
            out = attend_rows(self.net, q, k_read, v_read, prefix, at, frequencies)
            return out, k_buffer, v_buffer

        if self.remat:
            keep_these = jax.checkpoint_policies.save_only_these_names(*RESIDUALS)
            attend = jax.checkpoint(attend, prevent_cse=False, policy=keep_these)
        out, k_buffer, v_buffer = attend(q, k, v, k_buffer, v_buffer)
        return self.o_proj(shrunk(out)), kept, k_buffer, v_buffer


class MLP(nn.Module):
    """The SwiGLU feed-forward block."""

    net: Net
    layout: Layout

    @nn.compact
    def __call__(self, x):
        c = self.net.config
        d, f = (c.hidden_size,), (c.intermediate_size,)
        rest = (c.mlp_bias, False, self.layout, self.net.dtype)
        gate = Linear(d, f, ("embed", "mlp"), *rest, name="gate_proj")(x)
        up = Linear(d, f, ("embed", "mlp"), *rest, name="up_proj")(x)
        down = Linear(f, d, ("mlp", "embed"), *rest, writes=True, name="down_proj")
        return down(jax.nn.silu(gate) * shrunk(up))


class Layer(nn.Module):
    """Attention and feed-forward of one layer, each behind a norm.

    Attributes:
      keep: entries whose un-rotated keys and values are returned.
      remat: as `Attention` has it.
    """

    net: Net
    layout: Layout
    keep: tuple[int, ...]
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        k: Buffer,
        v: Buffer,
        place: Place,
        layer: buffers.Layer = None,
    ) -> tuple[Float[Array, "B T D"], Entries, Buffer, Buffer]:
        """Runs a window.

        Args:
          k, v: this layer's buffers [B, S, K, H] or, with its number in `layer`, those
            of all layers [L, B, S, K, H], which are written in place. Training takes
            slices: a stacked one would add a whole-buffer cotangent per layer.

        Returns:
          (x, what of the window may enter the memory, k and v with the window in them).
        """
        net, c = self.net, self.net.config
        norm = lambda name: RMSNorm(c.hidden_size, c.rms_norm_eps, net.dtype, name=name)
        attention = Attention(net, self.layout, self.keep, self.remat, name="attention")
        out, kept, k, v = attention(norm("input_norm")(x), k, v, place, layer)
        x = net.constrain(add_residual(x, out), "batch", None, None)
        out = MLP(net, self.layout, name="mlp")(norm("post_norm")(x))
        return net.constrain(add_residual(x, out), "batch", None, None), kept, k, v

    def over_layers(self, carry: tuple, layer: Int[Array, ""], place: Place) -> tuple:
        """Runs this layer in a scan over all, which carries (x, k, v)."""
        x, k, v = carry
        x, kept, k, v = self(x, k, v, place, layer)
        return (x, k, v), kept


class Embed(nn.Module):
    """The embedding table [V, D] and, with beacons, their single row [1, D]."""

    config: ModelConfig

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(INIT, ("vocab", "embed"))
        self.table: Any = self.param("embedding", init, (c.vocab_size, c.hidden_size))
        if c.beacon:
            init = nn.with_logical_partitioning(INIT, (None, "embed"))
            shape = (1, c.hidden_size)
            self.row = self.variable("beacon", "embedding", _zeros(init, shape)).value

    def __call__(self, tokens):
        return self.table[tokens]


class _Head(nn.Module):
    """The output matrix [D, V] of a model whose embeddings are not tied."""

    size: int
    vocab: int

    @nn.compact
    def __call__(self):
        init = nn.with_logical_partitioning(INIT, ("embed", "vocab"))
        return self.param("kernel", init, (self.size, self.vocab))


@jax.custom_vjp
def _scores(x: Float[Array, "*B D"], kernel: Float[Array, "D V"]) -> Array:
    """Multiplies with a float32 result; in bfloat16 its cotangent is bfloat16, too.

    Otherwise jax would convert the kernel to float32, for products that are slower.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _scores_forward(x: Any, kernel: Any) -> tuple[Array, tuple[Any, ...]]:
    trained = () if kernel.perturbed else None  # a frozen one costs no product
    return _scores(x.value, kernel.value), (x.value, kernel.value, trained)


def _scores_backward(residuals: tuple[Any, ...], d: Any) -> tuple[Any, Any]:
    x, kernel, trained = residuals
    if isinstance(d, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    if x.dtype == jnp.bfloat16:  # float16 would lose the smallest
        d = d.astype(x.dtype)
    multiply = functools.partial(jnp.tensordot, preferred_element_type=jnp.float32)
    d_x, d_kernel = multiply(d, kernel, (-1, 1)).astype(x.dtype), None
    if trained is not None:
        rows = tuple(range(x.ndim - 1))
        d_kernel = multiply(x, d, (rows, rows)).astype(kernel.dtype)
    return d_x, d_kernel


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)


class Decoder(nn.Module):
    """A window (or a decoded token) of every row through all layers.

    Attributes:
      net: what is computed, in which dtype (the residual stream has
        `residual_dtype`), and where.
      layout: where beacons stand among the T entries.
      keep: entries whose un-rotated keys and values are returned.
    """

    net: Net
    layout: Layout
    keep: tuple[int, ...] = ()

    def setup(self):
        c = self.net.config
        self.embed = Embed(c)
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0, "beacon": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            methods=["over_layers"],
        )
        self.layers = scanned(self.net, self.layout, self.keep)
        self.final_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.net.dtype)
        if not c.tie_embeddings:
            self.lm_head = _Head(c.hidden_size, c.vocab_size)

    def __call__(
        self,
        tokens: Int[Array, "B R"],
        k: Buffer,
        v: Buffer,
        prefix: Int[Array, " B"],
        valid: Int[Array, " B"] | None = None,
    ):
        """Runs R raw tokens and the layout's beacons, T entries in all.

        Args:
          tokens: ids of the raw entries, R = groups * raw of the layout.
          k, v: the buffers; row b's first prefix[b] entries are its memory.
          prefix: entries in front of this window, which is also its first position.
          valid: raw tokens of each row that are real; a row without any is not written.
            None: all.

        Returns:
          (hidden [B, R, D] of the raw rows after the final norm, Entries kept, k, v).
        """
        x = self.begin(tokens)
        place = place_of(self.net.config, self.layout, prefix, valid)
        if stages.count(self.net) > 1 and not self.is_initializing():
            one = lambda net: layer_of(net, self.layout, self.keep)
            given = (self.layers.variables, x, k, v, place)
            x, kept, k, v = stages.through(self.net, one, *given)
            return self.finish(x), kept, k, v
        numbers = jnp.arange(self.net.config.num_layers)
        (x, k, v), kept = self.layers.over_layers((x, k, v), numbers, place)
        return self.finish(x), kept, k, v

    def begin(self, tokens: Int[Array, "B R"]) -> Float[Array, "B T D"]:
        """Embeds tokens and beacons: what enters the first layer."""
        dtype = residual_dtype(self.net.dtype)
        x = self.net.constrain(self.embed(tokens).astype(dtype), "batch", None, None)
        if not self.layout.beacons:
            return x
        row = self.embed.row.astype(dtype)
        n = self.layout.groups * self.layout.beacons
        beacons = jnp.broadcast_to(row, (x.shape[0], n, x.shape[-1]))
        return self.net.constrain(self.layout.join(x, beacons), "batch", None, None)

    def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B R D"]:
        """Returns the raw rows after the final norm."""
        return self.final_norm(self.layout.split(x)[0])

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns the float32 logits of final hidden states."""
        tied = self.net.config.tie_embeddings
        kernel: Any = self.embed.table.T if tied else self.lm_head()
        return _scores(hidden, kernel.astype(self.net.dtype))

    def everything(self, tokens, k, v, prefix):
        """Touches every parameter; what `init` runs."""
        hidden, *_ = self(tokens, k, v, prefix)
        return self.logits(hidden)


def layer_of(net: Net, layout: Layout, keep: tuple[int, ...]) -> stages.LayerCall:
    """Makes the function that runs one layer of given variables, for `stages`."""
    one = Layer(net, layout, keep, parent=None)  # of no module, also inside of one
    return lambda variables, *given: apply(one, variables, *given)


def split_layers(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (all but the layers, the layers), each {collection: tree}."""
    outer = {
        name: {key: part for key, part in tree.items() if key != LAYERS}
        for name, tree in variables.items()
    }
    layers = {name: t[LAYERS] for name, t in variables.items() if LAYERS in t}
    return outer, layers


def apply(
    model: nn.Module, variables: Any, *args: Any, method: str = "__call__"
) -> Any:
    """Runs a method of a model on its variables, none of which is mutable."""
    return model.apply(variables, *args, method=method)


def init_variables(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Makes random base parameters, boxed with their axis names, and zero beacons.

    `jax.eval_shape` it for shapes and axes; `flax.linen.unbox` gives plain arrays.
    Output projections are scaled by (2 L) ** -0.5, as usual for random starts.
    """
    model = Decoder(Net(config), Layout(1, 1, 0))
    shape = (config.num_layers, 1, 1, config.num_kv_heads, config.head_dim)
    buffer, zero = jnp.zeros(shape), jnp.zeros((1,), jnp.int32)
    variables = dict(
        model.init(
            key, jnp.zeros((1, 1), jnp.int32), buffer, buffer, zero, method="everything"
        )
    )
    variables.setdefault("beacon", {})
    scale = 1.0 / math.sqrt(2 * config.num_layers)
    layers = variables["params"]["layers"]
    for block, name in (("attention", "o_proj"), ("mlp", "down_proj")):
        kernel = layers[block][name]["kernel"]
        layers[block][name]["kernel"] = jax.tree.map(lambda x: x * scale, kernel)
    return variables


@functools.lru_cache
def variable_axes(config: ModelConfig) -> dict[str, Any]:
    """Returns the logical axes of every variable, a tuple in place of each array."""
    boxed = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    is_boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(lambda x: tuple(x.names), boxed, is_leaf=is_boxed)


def constrain_entries(net: Net, entries: Entries) -> Entries:
    """Splits buffers [L, B, S, K, H] over rows and heads."""
    axes = ("layers", "batch", None, "kv_heads", None)
    return Entries(*(net.constrain(x, *axes) for x in entries))
