"""A launcher that is driven by another program."""
import sys

import pytest

from cluster.driven import Launcher
from cluster.run import Broken

SAYS = "print('the plan'); [print(f'step {i}/900 | loss 2') for i in range(900)]; print('resuming\\nstep 7/900')"


def test_what_does_not_come_is_told_with_what_came_and_of_steps_in_a_row_the_last(tmp_path):
    launcher = Launcher([sys.executable, "-c", SAYS], tmp_path / "screen", cwd=tmp_path)
    with pytest.raises(Broken) as failure:
        launcher.until("^finished", 60)
    assert str(failure.value) == ("the launcher ended with status 0 without a word of '^finished'\nIts last words:\n"
                                  "  the plan\n  step 899/900 | loss 2\n  resuming\n  step 7/900")
