"""`python -m beacon_jax.convert`: see `beacon_jax.cli.convert`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("convert")
