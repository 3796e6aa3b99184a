"""`python -m beacon_jax.train`: see `beacon_jax.cli.train`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("train")
