"""`python -m beacon_jax.compress`: see `beacon_jax.cli.compress`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("compress")
