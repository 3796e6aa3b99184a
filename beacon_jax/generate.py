"""`python -m beacon_jax.generate`: see `beacon_jax.cli.generate`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("generate")
