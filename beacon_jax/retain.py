"""`python -m beacon_jax.retain`: see `beacon_jax.cli.retain`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("retain")
