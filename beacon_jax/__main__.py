"""`python -m beacon_jax COMMAND`, the same as `beacon-jax COMMAND`."""

from beacon_jax.cli import main

if __name__ == "__main__":
    main()
