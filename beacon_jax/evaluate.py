"""`python -m beacon_jax.evaluate`: see `beacon_jax.cli.evaluate`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("evaluate")
