"""The parameter tree of a model: names and shapes."""

from typing import Any

from beacon_jax.model.config import ModelConfig


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The one declaration of the parameter tree: names and shapes, L layers stacked.

    Returns:
      {"params": tree, "beacon": tree} with tuples as leaves, the beacon tree empty for
      a plain decoder. Conversion is derived from it and the decoder is tested
      against it.
    """
    v, d, f = config.vocab_size, config.hidden_size, config.intermediate_size
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    layers = config.num_layers

    def linear(kernel: tuple[int, ...], bias: tuple[int, ...] | None) -> dict[str, Any]:
        shapes = {"kernel": (layers, *kernel)}
        return shapes | ({"bias": (layers, *bias)} if bias else {})

    qkv, o, mlp = config.qkv_bias, config.o_bias, config.mlp_bias
    attention = {
        "q_proj": linear((d, n, h), (n, h) if qkv else None),
        "k_proj": linear((d, k, h), (k, h) if qkv else None),
        "v_proj": linear((d, k, h), (k, h) if qkv else None),
        "o_proj": linear((n, h, d), (d,) if o else None),
    }
    if config.qk_norm:
        attention |= {
            "q_norm": {"scale": (layers, h)},
            "k_norm": {"scale": (layers, h)},
        }
    params: dict[str, Any] = {
        "embed": {"embedding": (v, d)},
        "layers": {
            "input_norm": {"scale": (layers, d)},
            "attention": attention,
            "post_norm": {"scale": (layers, d)},
            "mlp": {
                "gate_proj": linear((d, f), (f,) if mlp else None),
                "up_proj": linear((d, f), (f,) if mlp else None),
                "down_proj": linear((f, d), (d,) if mlp else None),
            },
        },
        "final_norm": {"scale": (d,)},
    }
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": (d, v)}
    if config.beacon is None:
        return {"params": params, "beacon": {}}
    own = {f"{p}_proj": dict(attention[f"{p}_proj"]) for p in config.beacon.param}
    if rank := config.beacon.rank:
        # o_proj's input and the others' output are two axes.
        ends = {name: 3 if name == "o_proj" else 2 for name in own}
        own = {
            name: {
                "lora_a": (*attention[name]["kernel"][:end], rank),
                "lora_b": (layers, rank, *attention[name]["kernel"][end:]),
            }
            for name, end in ends.items()
        }
    beacon: dict[str, Any] = {"embed": {"embedding": (1, d)}}
    if own:
        beacon["layers"] = {"attention": own}
    return {"params": params, "beacon": beacon}
