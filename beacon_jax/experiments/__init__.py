"""Experiments: what the paper claims, run from start to end by one command each.

`python -m beacon_jax.experiments.miniature` trains a small model and its beacons.
"""
