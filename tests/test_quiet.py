"""Lines of other libraries that are not for the user of a command."""

import logging

import pytest

from beacon_jax import runtime


@pytest.fixture
def levels():
    before = {name: logging.getLogger(name).level for name in runtime.QUIET}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("jax._src.xla_bridge", logging.INFO),  # Unable to initialize backend 'tpu'
        ("jax._src.compilation_cache", logging.INFO),
        ("matplotlib.font_manager", logging.WARNING),
        ("transformers.tokenization_utils_base", logging.WARNING),
    ],
)
def test_a_command_is_silent_where_a_library_talks_to_itself(levels, name, level):
    runtime.quiet()
    assert not logging.getLogger(name).isEnabledFor(level)
    assert logging.getLogger(name).isEnabledFor(logging.ERROR)
