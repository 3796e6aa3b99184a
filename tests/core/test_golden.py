"""The authors' implementation, replayed (docs/specification.md section 7)."""

from pathlib import Path

import pytest

from tests.golden import Replay, main

pytestmark = pytest.mark.optimized

CASES = sorted((Path(__file__).parents[1] / "goldens").glob("*/case.json"))


# Right padding is also what test_properties compares with rows alone.
PADDED = "p7_qwen2_batch_right_padding_train"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.parent.name,
            marks=pytest.mark.slow if case.parent.name == PADDED else [],
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
