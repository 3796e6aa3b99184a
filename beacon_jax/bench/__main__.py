"""`python -m beacon_jax.bench`: see `beacon_jax.cli.bench`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("bench")
