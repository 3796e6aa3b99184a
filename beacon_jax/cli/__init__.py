"""The commands: one file each, which turns flags into one call of the package."""

import importlib
import sys

from absl import app


def start(name: str) -> None:
    """Runs the command `name` with the arguments of this process."""
    module = importlib.import_module(f"beacon_jax.cli.{name}")
    if not hasattr(module, "define_flags"):
        return module.main()
    sys.modules["__main__"].__doc__ = module.__doc__  # what absl shows for --help
    module.define_flags()
    parse = getattr(module, "parse", app.parse_flags_with_usage)
    app.run(module.main, flags_parser=parse)
