"""A row read in one piece, without windows, buffers or loops: attention as a table.

What a query of an open window sees are entries of its own window, turned to their
places there, and what earlier windows have kept, turned to its slots. One mask over all
entries says so. For llama configs with full beacons.
"""

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.core.law import Law
from beacon_jax.core.step import layout_of
from beacon_jax.model.rotary import cos_sin, rotate


class Entries:
    """All entries of a row of full windows at given ratios, in order."""

    def __init__(self, config, ratios):
        law = Law.of(config)
        self.window, self.place, self.beacon, self.slot = [], [], [], []
        self.sources = []  # of each slot its first token, and the one behind its last
        for number, ratio in enumerate(ratios):
            ratio = int(ratio)
            before = len(self.sources)
            layout = layout_of(config, ratio, law.window)
            slot = np.full(layout.length, -1)
            if number < len(ratios) - 1:
                kept = law.kept_entries(ratio, before)
                slot[kept] = before + np.arange(len(kept))
                spans, _ = law.source(ratio, kept)
                self.sources += (number * law.window + spans).tolist()
            self.window += [number] * layout.length
            self.place += (before + np.arange(layout.length)).tolist()
            is_beacon = np.isin(np.arange(layout.length), layout.beacon_index)
            self.beacon += is_beacon.tolist()
            self.slot += slot.tolist()
        self.window, self.place, self.slot = map(
            np.asarray, (self.window, self.place, self.slot)
        )
        self.beacon = np.asarray(self.beacon, bool)
        self.raw, self.beacons = np.nonzero(~self.beacon)[0], np.nonzero(self.beacon)[0]
        order = np.arange(len(self.window))
        here = (self.window[:, None] == self.window) & (order[:, None] >= order)
        past = (self.slot >= 0) & (self.window < self.window[:, None])
        self.here, self.past = here, past
        # Entries that are slots, in the order of the slots.
        self.kept = np.argsort(np.where(self.slot < 0, order.max() + 1, self.slot))
        self.kept = self.kept[: len(self.sources)]


def paid_to_slots(config, v, tokens, ratios):
    """Returns the attention of raw tokens to slots, means over heads, [L, T, U]."""
    e = Entries(config, ratios)
    params, own = v["params"], v["beacon"]
    x = jnp.zeros((len(e.window), config.hidden_size))
    x = x.at[e.raw].set(params["embed"]["embedding"][tokens])
    x = x.at[e.beacons].set(own["embed"]["embedding"][0])
    turned = lambda y, places: rotate(
        y[None], *cos_sin(config, jnp.asarray(places)[None])
    )[0]
    found = []
    for layer in range(config.num_layers):
        of = lambda tree, layer=layer: jax.tree.map(lambda a: a[layer], tree)
        p, b = of(params["layers"]), of(own["layers"]["attention"])
        h = _norm(x, p["input_norm"]["scale"], config)

        def project(name, h=h, p=p, b=b):
            y = jnp.tensordot(h, p["attention"][name]["kernel"], 1)
            of_beacons = jnp.tensordot(h[e.beacons], b[name]["kernel"], 1)
            return y.at[e.beacons].set(of_beacons)

        groups = config.num_heads // config.num_kv_heads
        q, k, value = map(project, ("q_proj", "k_proj", "v_proj"))
        k, value = (jnp.repeat(y, groups, axis=1) for y in (k, value))
        q = turned(q, e.place)
        score = lambda k, q=q: jnp.einsum("tnh,snh->nts", q, k)
        here, there = (turned(k, y) for y in (e.place, np.maximum(e.slot, 0)))
        scores = jnp.where(e.past, score(there), score(here)) * config.head_dim**-0.5
        scores = jnp.where(e.here | e.past, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        seen = jnp.where(e.past, weights, 0).mean(0)
        found.append(seen[e.raw][:, e.kept])
        out = jnp.einsum("nts,snh->tnh", weights, value)
        x = x + jnp.tensordot(out, p["attention"]["o_proj"]["kernel"], 2)
        h, m = _norm(x, p["post_norm"]["scale"], config), p["mlp"]
        gate, up = (h @ m[f"{name}_proj"]["kernel"] for name in ("gate", "up"))
        x = x + (jax.nn.silu(gate) * up) @ m["down_proj"]["kernel"]
    return jnp.stack(found), e


def _norm(x, scale, config):
    size = jnp.mean(x * x, axis=-1, keepdims=True)
    return scale * x * jax.lax.rsqrt(size + config.rms_norm_eps)
