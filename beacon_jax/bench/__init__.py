"""Measurements: what `beacon-jax bench` runs, and scripts for questions of their own.

`runner` measures the parts (`kernels`, `parity`, `serving`, `training`) one row after
the other; `roofline` computes what chips can reach. `python -m beacon_jax.bench.NAME`
answers one question: aot, aot_kernels, block_search, endless, help_time, int8_loss,
kill_and_resume, lean_backward, long_prompt, mount_loss, prepare_memory, serve_load,
stages, stress_collectives.
"""
