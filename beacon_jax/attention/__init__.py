"""Causal attention behind a memory prefix: the one attention op of the package."""

from beacon_jax.attention.api import IMPLEMENTATIONS, RESIDUALS, prefix_attention

__all__ = ["IMPLEMENTATIONS", "RESIDUALS", "prefix_attention"]
