"""`python -m beacon_jax.lm_eval`: see `beacon_jax.cli.lm_eval`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("lm_eval")
