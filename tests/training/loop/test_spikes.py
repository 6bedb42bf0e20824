"""What a spike is, against scipy; and that one spike neither hides the next nor makes a plateau's
ripples into more.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from cola_train.training.loop.guard import UsualLoss, count_taken, usual_loss
from cola_train.training.loop.state import RunState

WINDOW = 10


@given(st.lists(st.floats(-10, 10), min_size=WINDOW, max_size=25), st.floats(0.5, 20))
def test_the_limit_is_in_robust_deviations_of_the_window(
    losses: list[float], deviations: float
) -> None:
    state = RunState()
    for number, loss in enumerate(losses):
        assert (usual_loss(state, "a", WINDOW) is None) == (number < WINDOW)
        count_taken(state, "a", WINDOW, loss)
        count_taken(state, "a b", WINDOW, 1e6)  # of other terms
    recent = np.array(losses[-WINDOW:])
    median = float(np.median(recent))
    deviation = max(median_abs_deviation(recent, scale="normal"), 1e-3 * abs(median))
    usual = usual_loss(state, "a", WINDOW)
    assert usual is not None
    # scipy's factor has more digits than 1.4826.
    assert usual.limit(deviations) == pytest.approx(
        median + deviations * deviation, rel=1e-5, abs=1e-3
    )


def test_a_spike_does_not_hide_the_next() -> None:
    usual = UsualLoss.of([2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.1, 1.9, 2.0, 50.0])
    # Mean and standard deviation would put the limit at 6.8 + 6 x 15.2.
    assert 2.1 < usual.limit(6) < 3


def test_a_plateau_has_no_spikes_of_rounding() -> None:
    assert UsualLoss.of([4.0] * WINDOW) == (4.0, 0.004)
    assert UsualLoss.of([-4.0] * WINDOW).limit(10) == pytest.approx(-3.96)


def test_a_window_that_changes_when_a_run_goes_on() -> None:
    state = RunState(recent_losses={"a": [float(loss) for loss in range(20)]})
    assert usual_loss(state, "a", 21) is None
    assert usual_loss(state, "a", WINDOW) == UsualLoss.of([float(loss) for loss in range(10, 20)])
    count_taken(state, "a", WINDOW, 20.0)
    assert state.recent_losses == {"a": [float(loss) for loss in range(11, 21)]}
