"""`python -m beacon_jax.inspect`: see `beacon_jax.cli.inspect`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("inspect")
