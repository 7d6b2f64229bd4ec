"""The spectral density of a network's second derivative, by stochastic Lanczos quadrature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlab.analysis.hessian import Derivative, Products, Trust
from gradlab.analysis.objective import LossOfParams
from gradlab.analysis.spectrum import ZERO, trust_rows
from gradlab.analysis.trees import Params
from gradlab.groups import NETWORK

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 1e-5**0.5
"""Width of the smoothing, as a share of the range of the eigenvalues: that of Ghorbani et al. (2019)."""


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """What `spectral_density` found.

    Attributes:
        grid: [points], eigenvalues.
        density: [points], share of the n eigenvalues per unit, which integrates to one.
        nodes, weights: per draw, the eigenvalues of its small matrix and their weights, before smoothing.
        width: standard deviation of the Gaussian that smooths.
        size: n, the number of parameters.
        derivative, trust: of `gradlab.analysis.hessian`.
    """

    grid: np.ndarray
    density: np.ndarray
    nodes: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    width: float
    size: int
    derivative: Derivative
    trust: Trust

    def moment(self, power: int) -> tuple[float, float]:
        """The mean of eigenvalue^power without smoothing, and its standard error over the draws (NaN for one).

        `moment(1)` estimates tr H / n, `moment(2)` ||H||_F^2 / n, each of the symmetric part.
        """
        each = np.array([w @ x**power for x, w in zip(self.nodes, self.weights, strict=True)])
        error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan")
        return float(each.mean()), error

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule "", layer "network", metric, eigenvalue, value, error, flag.

        The metric "density" has a row per eigenvalue of the grid; "mean_eigenvalue", "mean_square_eigenvalue",
        "asymmetry" and "mismatch" have one row, without an eigenvalue.
        """
        import pandas as pd  # loaded here: not needed to compute

        rows: list[tuple[Any, ...]] = [
            ("", NETWORK, "density", x, value, np.nan, "")
            for x, value in zip(self.grid.tolist(), self.density.tolist(), strict=True)
        ]
        for power, name in ((1, "mean_eigenvalue"), (2, "mean_square_eigenvalue")):
            rows.append(("", NETWORK, name, np.nan, *self.moment(power), ""))
        rows += [(*row[:3], np.nan, row[3], np.nan, row[4]) for row in trust_rows(self.trust)]
        return pd.DataFrame(rows, columns=["rule", "layer", "metric", "eigenvalue", "value", "error", "flag"])

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw it (`gradlab.report.plots_curvature.spectral_density`); returns the matplotlib Axes."""
        from gradlab.report import plots_curvature  # loaded here: matplotlib is not needed to compute

        return plots_curvature.spectral_density(self.to_frame(), ax=ax, **options)


def spectral_density(
    loss_of_params: LossOfParams,
    params: Params,
    steps: int = 80,
    draws: int = 8,
    points: int = 1024,
    width: float | None = None,
    seed: int = 0,
    derivative: Derivative = "surrogate",
) -> SpectralDensity:
    """The density of the eigenvalues of the (symmetric part of the) second derivative.

    By stochastic Lanczos quadrature (Ghorbani, Krishnan and Xiao 2019, An Investigation into Neural Net Optimization
    via Hessian Eigenvalue Density, ICML, arXiv:1901.10159). Per draw v (a Gaussian vector scaled to length one)
    `steps` Lanczos steps give a small tridiagonal matrix T = U diag(x) U^T:

        (1)  density(t) = mean over v of  sum_i U_1i^2 N(t; x_i, width^2)

    Each new vector is made orthogonal to all earlier ones, twice: without that, round-off copies eigenvalues.

    Args:
        loss_of_params, params, derivative: as in `gradlab.analysis.spectrum.top_eigenvalues`.
        steps: Lanczos steps per draw, at most the number of parameters.
        draws: random vectors; their scatter gives the errors of `moment`.
        points: of the grid, which reaches five widths beyond all nodes.
        width: of the smoothing, in units of the eigenvalues; None: `WIDTH` times their range.
        seed: of the vectors.

    Raises:
        ValueError: for steps, draws or points below their least, a width that the grid cannot resolve, or a second
            derivative that is not finite or zero.
    """
    for name, value, least in (("steps", steps, 1), ("draws", draws, 1), ("points", points, 16)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number, at least {least}")
    products = Products(loss_of_params, params, derivative)
    measured = products.trust(seed)
    if np.isnan(measured.asymmetry):
        raise ValueError(f"{ZERO}: all eigenvalues are zero, and a density would be a line")
    random = np.random.default_rng(seed)
    pairs = [lanczos(products, random.normal(size=products.size), steps) for _ in range(draws)]
    nodes, weights = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    low, high = min(x.min() for x in nodes), max(x.max() for x in nodes)
    if width is None:
        width = WIDTH * float(high - low) or WIDTH * float(abs(high)) or WIDTH
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    if not 0 < grid[1] - grid[0] <= width:
        raise ValueError(
            f"width={width:g} is too narrow for {points} points between {low:g} and {high:g}: take more points, or a "
            f"width of at least {(high - low) / (points - 11):.3g}"
        )
    density = np.mean([_smoothed(grid, *pair, width) for pair in pairs], axis=0)
    return SpectralDensity(grid, density, nodes, weights, width, products.size, derivative, measured)


def lanczos(products: Products, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and weights of the tridiagonal matrix after so many steps from a vector; fewer if the space ends."""
    from scipy.linalg import eigh_tridiagonal  # loaded here: slow to load

    basis = np.zeros((min(steps, products.size), products.size))
    v, diagonal, beside = start / np.linalg.norm(start), [], []
    for i in range(len(basis)):
        basis[i] = v
        w = products.symmetric(v)
        diagonal.append(float(v @ w))
        for _ in range(2):
            w = w - basis[: i + 1].T @ (basis[: i + 1] @ w)
        beside.append(float(np.linalg.norm(w)))
        # What is left is round-off: the vectors so far span an invariant space, and their matrix is exact.
        if beside[-1] <= 100 * products.epsilon * max(*map(abs, diagonal), *beside):
            break
        v = w / beside[-1]
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside[: len(diagonal) - 1]))
    return values, vectors[0] ** 2


def _smoothed(grid: np.ndarray, nodes: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
    distance = (grid[:, None] - nodes) / width
    return np.exp(-0.5 * distance**2) @ weights / (np.sqrt(2 * np.pi) * width)
