"""Power laws ``L = a * C^b`` fitted to losses, with confidence intervals."""

from dataclasses import dataclass

import numpy as np

# Of Student's distribution: 97.5 % of it lies below, by degrees of freedom from 1 on; beyond, the normal one's.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.96


@dataclass(frozen=True)
class PowerLaw:
    """``a * C^b``."""

    a: float
    b: float
    a_interval: tuple[float, float] | None = None
    """The 95 % confidence interval of ``a``; None where there are too few points to say."""
    b_interval: tuple[float, float] | None = None

    def __call__(self, compute):
        """The loss at ``compute``, a number or an array."""
        return self.a * np.asarray(compute, float) ** self.b

    def __str__(self) -> str:
        return f"{self.a:.3f} * C^{self.b:.3f}"


def fit_power_law(compute, loss) -> PowerLaw:
    """Least squares on the logarithms; the intervals take the residuals for independent and normal.

    Args:
        compute: [n], above 0, at least two different.
        loss: [n], above 0.

    Raises:
        ValueError: too few points.
    """
    x, y = np.log(np.asarray(compute, float)), np.log(np.asarray(loss, float))
    if len(np.unique(x)) < 2:
        raise ValueError(f"a power law needs runs of at least 2 different amounts of compute, not {len(np.unique(x))}")
    spread = ((x - x.mean()) ** 2).sum()
    b = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    offset = float(y.mean() - b * x.mean())
    law, freedom = PowerLaw(float(np.exp(offset)), b), len(x) - 2
    if freedom < 1:
        return law
    variance = ((y - offset - b * x) ** 2).sum() / freedom
    quantile = _QUANTILES[freedom - 1] if freedom <= len(_QUANTILES) else _NORMAL
    of_b = quantile * float(np.sqrt(variance / spread))
    of_a = quantile * float(np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / spread)))
    a_interval = float(np.exp(offset - of_a)), float(np.exp(offset + of_a))
    return PowerLaw(law.a, b, a_interval, (b - of_b, b + of_b))
