"""`python -m beacon_jax.serve`: see `beacon_jax.cli.serve`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("serve")
