"""The numbers of the MoBA paper's charts, drawn in grey beside our own.

Losses are nats per token of the paper's data and tokenizer, compute is in PFLOP/s-days: they are not to be compared
with losses of other data by their level, only by how MoBA stands to full attention.
"""

from .fit import PowerLaw

COMPUTE = (0.41, 5.4)
"""PFLOP/s-days of the smallest and the largest model, 6 * parameters * tokens."""
SCALING_LAW = {"moba": PowerLaw(2.625, -0.063), "full": PowerLaw(2.622, -0.063)}
"""At a sequence length of 8K."""
# (a, b) of MoBA and of full attention for each 2K tokens of 32K.
_BY_POSITION = (
    (3.075, -0.078, 3.068, -0.078), (2.415, -0.084, 2.411, -0.083), (2.085, -0.081, 2.077, -0.081),
    (1.899, -0.092, 1.894, -0.092), (1.789, -0.091, 1.774, -0.089), (1.721, -0.092, 1.697, -0.087),
    (1.670, -0.089, 1.645, -0.088), (1.630, -0.089, 1.600, -0.087), (1.607, -0.090, 1.567, -0.087),
    (1.586, -0.091, 1.542, -0.087), (1.571, -0.093, 1.519, -0.086), (1.566, -0.089, 1.513, -0.085),
    (1.565, -0.091, 1.502, -0.085), (1.562, -0.095, 1.493, -0.088), (1.547, -0.097, 1.471, -0.091),
    (1.546, -0.108, 1.464, -0.097),
)  # fmt: skip
BY_POSITION = [{"moba": PowerLaw(a, b), "full": PowerLaw(c, d)} for a, b, c, d in _BY_POSITION]
GRANULARITY = {"2/8": 2.258, "4/16": 2.243, "8/32": 2.241, "16/64": 2.243, "32/128": 2.241}
GRANULARITY_FULL = 2.242
LAYERWISE = {1: 1.135, 3: 1.12, 5: 1.10, 10: 1.07}
"""Loss of supervised fine-tuning by the number of last layers with full attention, read off the chart."""
