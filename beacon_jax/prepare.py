"""`python -m beacon_jax.prepare`: see `beacon_jax.cli.prepare`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("prepare")
