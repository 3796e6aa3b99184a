"""The list of slow cases names tests that are there."""

import re

import pytest

from tests.conftest import ROOT, SLOW_CASES


@pytest.mark.parametrize("file", sorted({case.split("::")[0] for case in SLOW_CASES}))
def test_the_list_of_slow_cases_names_tests_that_are_there(file):
    text = (ROOT / file).read_text()
    of_file = [case for case in SLOW_CASES if case.startswith(f"{file}::")]
    names = {re.sub(r"\[.*", "", case, flags=re.S).split("::")[-1] for case in of_file}
    gone = sorted(name for name in names if f"def {name}(" not in text)
    assert not gone, f"tests/slow_cases.txt: {file} has no {gone}: take them out."
