"""The authors' implementation, replayed (docs/specification.md section 7)."""

from pathlib import Path

import pytest

from tests.golden import Replay, main

pytestmark = pytest.mark.optimized

CASES = sorted((Path(__file__).parents[1] / "goldens").glob("*/case.json"))


# Their claims are also those of p2 (training), of test_properties (rows of different
# length) and of inference/test_golden_decode (p8).
SLOW = ("p1_", "p7_", "p8_")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.parent.name,
            marks=pytest.mark.slow if case.parent.name.startswith(SLOW) else [],
        )
        for case in CASES
    ],
)
def test_a_golden_case_is_reproduced(case):
    checks = Replay(case.parent).run()
    assert checks
    misses = [c for c in checks if not c.passed]
    assert not misses


def test_the_command_fails_on_a_case_that_does_not_match(tmp_path, capsys):
    import shutil

    import numpy as np

    source = next(c.parent for c in CASES if c.parent.name.startswith("b1"))
    for file in source.iterdir():
        shutil.copy(file, tmp_path / file.name)
    data = dict(np.load(tmp_path / "case.npz"))
    data["logits"][0, 3, 5] += 1e-3
    np.savez(tmp_path / "case.npz", **data)
    assert main([str(tmp_path)]) == 1
    assert "MISS" in capsys.readouterr().out
