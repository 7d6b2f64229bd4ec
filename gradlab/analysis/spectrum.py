"""Eigenvalues, trace and spectral density of a network's second derivative, from products alone.

H is one of the second derivatives of `gradlab.analysis.hessian`, by default the symmetric "surrogate" one; for the
other, "field", everything here is that of its symmetric part (H + H^T) / 2. Each result carries `trust`, which says
how asymmetric the products are and how badly they foretell the gradient's change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from gradlab.analysis.hessian import Derivative, Products, Trust
from gradlab.analysis.objective import LossOfParams
from gradlab.analysis.trees import Params, layer_slices
from gradlab.groups import NETWORK

if TYPE_CHECKING:
    import pandas as pd

Which = Literal["largest", "both"]

_DENSE = 48  # up to this many parameters all columns are cheaper than an iteration

ZERO = "the second derivative is zero here: no gradient passes the network"


class NoConvergence(RuntimeError):
    """An iteration for eigenvalues did not come down to its tolerance."""


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """What `top_eigenvalues` found.

    Attributes:
        largest: [k], the largest first.
        smallest: [k], the smallest first; empty if they were not asked for.
        residuals: {"largest": [k], "smallest": ...}, ||H u - value u|| of the unit eigenvectors u: some eigenvalue
            lies within this distance.
        derivative, trust: of `gradlab.analysis.hessian`.
        flag: "" or why all are zero.
    """

    largest: np.ndarray
    smallest: np.ndarray
    residuals: dict[str, np.ndarray]
    derivative: Derivative
    trust: Trust
    flag: str = ""

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule "", layer "network", metric ("largest_1", ..., "asymmetry", "mismatch"), value, residual,
        flag.
        """
        import pandas as pd  # loaded here: not needed to compute

        rows = [
            ("", NETWORK, f"{end}_{i}", value, residual, self.flag)
            for end, values in (("largest", self.largest), ("smallest", self.smallest))
            for i, (value, residual) in enumerate(zip(values, self.residuals[end], strict=True), start=1)
        ]
        rows += [(*row[:4], np.nan, row[4]) for row in trust_rows(self.trust)]
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "value", "residual", "flag"])

    def plot(self, ax: Any = None) -> Any:
        """Draw them (`gradlab.report.plots_curvature.eigenvalues`); returns the matplotlib Axes."""
        from gradlab.report import plots_curvature  # loaded here: matplotlib is not needed to compute

        return plots_curvature.eigenvalues(self.to_frame(), ax=ax)


@dataclass(frozen=True, eq=False)
class Trace:
    """What `trace` found.

    Attributes:
        values: {"network": tr H, "layer_0": the trace of that layer's block, ...}.
        errors: their standard errors over the draws; NaN with a single draw.
        draws: the number of random vectors.
        derivative, trust: of `gradlab.analysis.hessian`.
    """

    values: dict[str, float]
    errors: dict[str, float]
    draws: int
    derivative: Derivative
    trust: Trust

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule "", layer, metric ("trace", "asymmetry", "mismatch"), value, error, flag."""
        import pandas as pd  # loaded here: not needed to compute

        rows = [("", layer, "trace", value, self.errors[layer], "") for layer, value in self.values.items()]
        rows += [(*row[:4], np.nan, row[4]) for row in trust_rows(self.trust)]
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "value", "error", "flag"])

    def plot(self, ax: Any = None) -> Any:
        """Draw it per layer (`gradlab.report.plots_curvature.trace`); returns the matplotlib Axes."""
        from gradlab.report import plots_curvature  # loaded here: matplotlib is not needed to compute

        return plots_curvature.trace(self.to_frame(), ax=ax)


def top_eigenvalues(
    loss_of_params: LossOfParams,
    params: Params,
    k: int = 1,
    which: Which = "largest",
    seed: int = 0,
    tolerance: float | None = None,
    derivative: Derivative = "surrogate",
) -> Eigenvalues:
    """The k largest eigenvalues of the (symmetric part of the) second derivative, and the k smallest.

    By implicitly restarted Lanczos iterations (ARPACK, through scipy); networks of a few dozen parameters get their
    whole matrix.

    Args:
        loss_of_params: a function from parameters to a scalar; `loss_function(net, batch, loss)` makes one.
        params: the point.
        k: how many at each end.
        which: "largest" (algebraically), or "both" ends.
        seed: of the first vector of the iteration, and of the vectors of `trust`.
        tolerance: residual at which an eigenvalue counts as found, relative to it; None: 1e-6 with 64-bit parameters,
            1e-3 with 32-bit ones, whose products carry round-off.
        derivative: "surrogate" or "field", see `gradlab.analysis.hessian`.

    Raises:
        ValueError: for k or `which` out of range, or a second derivative that is not finite.
        NoConvergence: if the iteration does not come down to the tolerance.
    """
    if which not in get_args(Which):
        raise ValueError(f"which={which!r}: there are 'largest' and 'both'")
    products = Products(loss_of_params, params, derivative)
    ends = 1 if which == "largest" else 2
    if not isinstance(k, int) or not 1 <= k <= products.size // ends:
        raise ValueError(
            f"k={k!r}: give a whole number from 1 to {products.size // ends}, for {products.size} parameters"
        )
    measured = products.trust(seed)
    if np.isnan(measured.asymmetry):
        none = np.zeros(k * (ends - 1))
        return Eigenvalues(np.zeros(k), none, {"largest": np.zeros(k), "smallest": none}, derivative, measured, ZERO)
    low, high = extremes(products, k, ends == 2, seed, tolerance)
    residuals = {"largest": high[1], "smallest": low[1]}
    return Eigenvalues(high[0], low[0], residuals, derivative, measured)


def extremes(
    products: Products, k: int, both: bool, seed: int, tolerance: float | None = None
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(values, residuals) of the k smallest eigenvalues (none unless `both`), and of the k largest."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # loaded here: slow to load

    n = products.size
    if n <= max(_DENSE, 4 * k):
        matrix = np.stack([products.symmetric(column) for column in np.eye(n)], axis=1)
        values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    else:
        operator = LinearOperator((n, n), matvec=lambda v: products.symmetric(np.ravel(v)), dtype=np.float64)
        start = np.random.default_rng(seed).normal(size=n)
        tolerance = (1e-3 if products.epsilon > 1e-10 else 1e-6) if tolerance is None else tolerance
        end, number = ("BE", 2 * k) if both else ("LA", k)
        try:
            values, vectors = eigsh(operator, number, which=end, v0=start, tol=tolerance)
        except ArpackNoConvergence as error:
            raise NoConvergence(
                f"eigenvalues did not converge to the relative residual {tolerance:g} ({len(error.eigenvalues)} of "
                f"{number} did): raise tolerance, or use float64"
            ) from error
    order = np.argsort(values)
    low, high = order[: k * both], order[::-1][:k]
    residuals = {
        i: float(np.linalg.norm(products.symmetric(vectors[:, i]) - values[i] * vectors[:, i])) for i in {*low, *high}
    }
    return (
        (values[low], np.array([residuals[i] for i in low])),
        (values[high], np.array([residuals[i] for i in high])),
    )


def trace(
    loss_of_params: LossOfParams,
    params: Params,
    draws: int | np.ndarray = 30,
    seed: int = 0,
    derivative: Derivative = "surrogate",
) -> Trace:
    """The trace of the second derivative, whole and per layer, from random signs.

        (1)  tr H = E[z^T H z],   z of independent random signs

    (Hutchinson 1990, doi:10.1080/03610919008812866.) The layers' traces come from the same products: the part of
    z^T (H z) that belongs to a layer has the trace of the layer's block as its mean.

    Args:
        loss_of_params, params, derivative: as in `top_eigenvalues`.
        draws: how many random vectors, or the vectors themselves, [draws, n].
        seed: of the vectors.

    Raises:
        ValueError: for fewer than one draw, vectors of another length, or a second derivative that is not finite.
    """
    products = Products(loss_of_params, params, derivative)
    if isinstance(draws, int):
        vectors = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, products.size))
    else:
        vectors = np.asarray(draws, dtype=np.float64)
    if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != products.size:
        raise ValueError(f"draws: at least one vector of {products.size} entries is needed, not {vectors.shape}")
    measured = products.trust(seed)
    parts = layer_slices(products.params)
    entries = np.array([z * products.product(z) for z in vectors])
    found = {NETWORK: entries.sum(axis=1)} | {name: entries[:, where].sum(axis=1) for name, where in parts.items()}
    n = len(vectors)
    errors = {name: float(each.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan") for name, each in found.items()}
    values = {name: float(each.mean()) for name, each in found.items()}
    return Trace(values, errors, n, derivative, measured)


def trust_rows(trust: Trust) -> list[tuple[str, str, str, float, str]]:
    """Rows (rule, layer, metric, value, flag) of a tidy frame that say how far to trust it."""
    flag = ZERO if np.isnan(trust.asymmetry) else ""
    return [("", NETWORK, name, float(getattr(trust, name)), flag) for name in ("asymmetry", "mismatch")]
