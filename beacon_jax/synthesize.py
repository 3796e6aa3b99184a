"""`python -m beacon_jax.synthesize`: see `beacon_jax.cli.synthesize`."""

from beacon_jax.cli import start

if __name__ == "__main__":
    start("synthesize")
