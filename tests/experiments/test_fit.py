"""Power laws are found again, and their intervals hold the truth as often as they say."""

import numpy as np
import pytest

from moba_cp.experiments.fit import PowerLaw, fit_power_law


def test_an_exact_law_is_found():
    compute = np.array([1e-6, 1e-5, 3e-5, 2e-4])
    law = fit_power_law(compute, PowerLaw(2.6, -0.063)(compute))
    assert (law.a, law.b) == pytest.approx((2.6, -0.063))
    assert law.b_interval == pytest.approx((-0.063, -0.063), abs=1e-9)


def test_intervals_hold_the_truth_in_95_of_100_cases():
    truth, compute = PowerLaw(1.5, -0.09), np.geomspace(1e-6, 1e-3, 5)
    generator, holds = np.random.default_rng(0), np.zeros(2)
    for _ in range(2000):
        law = fit_power_law(compute, truth(compute) * np.exp(generator.normal(0, 0.01, 5)))
        holds += law.a_interval[0] < truth.a < law.a_interval[1], law.b_interval[0] < truth.b < law.b_interval[1]
    assert 0.93 < holds[0] / 2000 < 0.97 and 0.93 < holds[1] / 2000 < 0.97


def test_two_points_have_a_line_and_no_interval():
    law = fit_power_law([1.0, 10.0], [2.0, 1.0])
    assert law.a == pytest.approx(2.0) and law.a_interval is None
    with pytest.raises(ValueError, match="at least 2 different amounts of compute, not 1"):
        fit_power_law([1.0, 1.0], [2.0, 2.1])
