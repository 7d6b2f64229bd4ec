"""Tools to prove learning rules, for the library's own tests and for users' rules.

`check_rule` yields named checks; `case` builds small live networks; `per_synapse` and `twins` are independent oracles.
Run everything in 64-bit mode: `with jax.enable_x64(True): ...`.
"""

from gradlab.testing import per_synapse, twins
from gradlab.testing.checks import Check, assert_differs, assert_equal, check_rule, gradient_of, largest_difference
from gradlab.testing.networks import Case, SmoothSpike, assert_alive, case, feed_forward, firing_rates, lif, make_alive

__all__ = [
    "Case",
    "Check",
    "SmoothSpike",
    "assert_alive",
    "assert_differs",
    "assert_equal",
    "case",
    "check_rule",
    "feed_forward",
    "firing_rates",
    "gradient_of",
    "largest_difference",
    "lif",
    "make_alive",
    "per_synapse",
    "twins",
]
