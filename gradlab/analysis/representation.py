"""How alike the hidden activities of networks are that were trained by different rules: linear CKA.

Centred kernel alignment (Kornblith et al. 2019, Similarity of neural network representations revisited,
arXiv:1905.00414) compares two sets of activities on the same inputs. It does not see rotations, a common scale and
shifts of the units, so that two networks whose hidden units mean the same in another order are alike. It does see other
invertible maps.

With few rows and many features the plain (biased) CKA of *unrelated* activities is far above 0: of two Gaussian
matrices of 20 rows and 100 features it is 0.83. The debiased one is about 0 there. It rests on the unbiased estimate of
the Hilbert-Schmidt independence criterion (HSIC) of Song et al. 2012 (Feature selection via dependence maximization,
Journal of Machine Learning Research 13:1393-1434), used for CKA by Nguyen et al. 2021 (arXiv:2010.15327), and takes
rows for independent: the rows of kind "time" are not, for them it removes only part of the bias.

A layer that never changes has no representation: its CKA is undefined, with that reason, and never 0 or 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from gradlab import plan
from gradlab.checks import check
from gradlab.losses import Batch, Loss
from gradlab.modules import is_hashable
from gradlab.network import Network, Params

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KINDS = ("rates", "time")
_ROUNDING = 1e-10


def cka(x: ArrayLike, y: ArrayLike, debiased: bool = False) -> float:
    """Linear CKA of two matrices of activities on the same rows.

        (1)  CKA(x, y) = HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))
        (2)  biased:    HSIC(x, y) = ||xc^T yc||_F^2,                        xc, yc: columns without their means
        (3)  debiased:  HSIC(x, y) = ||xc^T yc||_F^2 - n/(n-2) sum_i a_i b_i + (sum_i a_i)(sum_i b_i) / ((n-1)(n-2)),
                        a_i = ||xc_i||^2,  b_i = ||yc_i||^2,  n: the number of rows

    (3) is n(n-3) times Song et al.'s unbiased estimate, which leaves out the kernel's diagonal. The factors that (2)
    and (3) lack cancel in (1). Products are of size features or of size rows, whichever is smaller.

    Args:
        x, y: [rows, features]; the features may differ in number.
        debiased: use (3) in place of (2).

    Returns:
        A number from 0 to 1; the debiased one from -1 to 1, about 0 for unrelated activities.

    Raises:
        ValueError: matrices that are not finite or have other rows, too few rows (2, 4 if debiased), or no variance.
    """
    pair = []
    for name, matrix in (("x", x), ("y", y)):
        values = np.asarray(matrix, dtype=np.float64)
        if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
            raise ValueError(f"{name} has shape {values.shape}: give finite numbers [rows, features]")
        pair.append(_Activity(values, debiased))
    if pair[0].n != pair[1].n:
        raise ValueError(f"x has {pair[0].n} rows, y {pair[1].n}: CKA compares activities on the same inputs")
    if pair[0].n < (4 if debiased else 2):
        raise ValueError(f"{pair[0].n} rows are too few: CKA needs 2, debiased 4")
    for name, one in zip(("x", "y"), pair, strict=True):
        if one.flag:
            raise ValueError(f"CKA is undefined: {name} {one.flag}")
    return _cka(*pair)


class _Activity:
    """One matrix, prepared once for comparisons with many others."""

    def __init__(self, values: np.ndarray, debiased: bool):
        self.n, self.debiased = len(values), debiased
        self.constant = not np.ptp(values, axis=0).any()
        self.centred = values - values.mean(axis=0)
        self.squares = np.sum(self.centred**2, axis=1)
        self.gram = self.centred @ self.centred.T if self.n < values.shape[1] else None
        self.own = 0.0 if self.constant else self.hsic(self)
        self.flag = self._flag()

    def _flag(self) -> str:
        if self.constant:
            return "does not vary from row to row"
        # Without the diagonal nothing is left if all rows but one are equal; round-off must not stand for it.
        if self.own <= _ROUNDING * self.squares.sum() ** 2 / self.n:
            return "varies in a single row: no pair of rows is left to compare"
        return ""

    def product(self, other: _Activity) -> float:
        """||xc^T yc||_F^2, which is also the sum of the products of the two Gram matrices."""
        if self.gram is not None and other.gram is not None:
            return float(np.sum(self.gram * other.gram))
        return float(np.sum((self.centred.T @ other.centred) ** 2))

    def hsic(self, other: _Activity) -> float:
        total, n = self.product(other), self.n
        if self.debiased and n > 3:
            total -= n / (n - 2) * float(self.squares @ other.squares)
            total += float(self.squares.sum() * other.squares.sum()) / ((n - 1) * (n - 2))
        return total


def _cka(x: _Activity, y: _Activity) -> float:
    return x.hsic(y) / np.sqrt(x.own) / np.sqrt(y.own)


def activity(net: Network, params: Params, batch: Batch, kind: str = "rates") -> dict[str, np.ndarray]:
    """The outputs of every layer on a batch, as matrices for `cka`.

        (1)  kind="rates":  row b is  sum_t mask[t, b] s[t, b] / sum_t mask[t, b],  one row per sample
        (2)  kind="time":   the rows are  s[t, b]  of all t and b with mask[t, b] = 1, step after step

    s is what a layer hands on: spikes, or the membrane potential of a read-out that does not spike. Samples none of
    whose steps count have no row.

    Args:
        net, params: the network and its parameters.
        batch: inputs [time, batch, features...] and perhaps a mask; targets play no part.
        kind: "rates" or "time".

    Returns:
        {layer name: [rows, features]}, float64; axes of convolutional layers are flattened.

    Raises:
        ValueError: an unknown kind, what `gl.gradients` refuses of network and data, a mask that leaves out everything.
    """
    return _activities(net, {"given": params}, batch, kind)["given"]


@dataclasses.dataclass(frozen=True)
class Representations:
    """CKA between all layers of several networks.

    Attributes:
        names: the networks, for example the rules that trained them.
        layers: names of the layers.
        values: [names, names, layers, layers]; values[a, b, i, j] compares layer i of a with layer j of b.
        flags: (name, layer) -> why it has no representation.
        kind, debiased, n_rows: what was compared.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    values: np.ndarray
    flags: Mapping[tuple[str, str], str]
    kind: str
    debiased: bool
    n_rows: int

    def of_layer(self, layer: str) -> np.ndarray:
        """[names, names] of one layer."""
        index = self._index(self.layers, layer, "layer")
        return self.values[:, :, index, index]

    def between(self, name: str, other: str) -> np.ndarray:
        """[layers, layers] between two networks, or of one with itself."""
        return self.values[self._index(self.names, name, "network"), self._index(self.names, other, "network")]

    def to_frame(self) -> pd.DataFrame:
        """A tidy frame: rule, layer, other_rule, other_layer, metric, value, flag, kind, n (rows)."""
        import pandas as pd

        metric = "cka_debiased" if self.debiased else "cka"
        rows = []
        for (a, b, i, j), value in np.ndenumerate(self.values):
            sides = [(self.names[a], self.layers[i]), (self.names[b], self.layers[j])]
            flag = "; ".join(dict.fromkeys(self.flags[side] for side in sides if side in self.flags))
            rows.append((*sides[0], *sides[1], metric, value, flag, self.kind, self.n_rows))
        columns = ["rule", "layer", "other_rule", "other_layer", "metric", "value", "flag", "kind", "n"]
        return pd.DataFrame(rows, columns=columns)

    def plot(self, layer: str | None = None, ax: Axes | None = None) -> Axes:
        """A map of all pairs of networks in one layer, by default the first."""
        from gradlab.report import plots_representation

        chosen = self.layers[self._index(self.layers, self.layers[0] if layer is None else layer, "layer")]
        return plots_representation.networks(self.to_frame(), chosen, ax)

    def plot_layers(self, name: str, other: str, ax: Axes | None = None) -> Axes:
        """A map of the layers of one network by those of another."""
        from gradlab.report import plots_representation

        self.between(name, other)
        return plots_representation.layers(self.to_frame(), name, other, ax)

    def _index(self, known: tuple[str, ...], wanted: str, what: str) -> int:
        if wanted not in known:
            raise ValueError(f"no {what} is named {wanted!r}; there is {', '.join(map(repr, known))}")
        return known.index(wanted)


def compare_representations(
    net: Network, params: Mapping[str, Params], batch: Batch, kind: str = "rates", debiased: bool = True
) -> Representations:
    """CKA between all layers of one network under several sets of parameters, on one batch.

    Args:
        net: the network.
        params: {name: parameters}, for example {rule: run.params_of(0)}.
        batch, kind: as in `activity`. Prefer a held-out batch, and one of more samples than a layer has units.
        debiased: as in `cka`; the metric in the frame says which it was.

    Returns:
        A `Representations`; NaN with a reason where a layer does not vary, a silent one above all.

    Raises:
        ValueError: as `activity`, no parameters, or too few rows (2, debiased 4).
    """
    if not isinstance(params, Mapping) or not params:
        raise ValueError("params hold nothing to compare: give {name: parameters}, one entry per trained network")
    found: dict[tuple[str, str], _Activity] = {}
    flags: dict[tuple[str, str], str] = {}
    for name, activities in _activities(net, params, batch, kind).items():
        for layer, rows in activities.items():
            if len(rows) < (4 if debiased else 2):
                raise ValueError(f"the batch gives {len(rows)} rows, too few for CKA: it needs 2, debiased 4")
            found[name, layer] = one = _Activity(rows, debiased)
            if one.flag:
                silent = "is silent: no unit fired on this batch" if not rows.any() else one.flag
                flags[name, layer] = f"{layer} of {name} {silent}"
    keys = list(found)
    table = np.full((len(keys), len(keys)), np.nan)
    for i, left in enumerate(keys):
        for j, right in enumerate(keys[: i + 1]):
            if left not in flags and right not in flags:
                table[i, j] = table[j, i] = _cka(found[left], found[right])
    shape = (len(params), len(net.layer_names))
    values = table.reshape(*shape, *shape).transpose(0, 2, 1, 3)
    return Representations(tuple(params), net.layer_names, values, flags, kind, debiased, found[keys[0]].n)


class _AnyTargets(Loss):
    """A stand-in for the checks at the door, which look at targets too: here no target has a part."""

    def __call__(self, outputs: Array, batch: Batch) -> Array:
        return jnp.zeros((), outputs.dtype)

    def check(self, output_shape: tuple[int, ...], batch: Batch) -> None:
        pass


def _activities(
    net: Network, params: Mapping[str, Params], batch: Batch, kind: str
) -> dict[str, dict[str, np.ndarray]]:
    """{name: {layer: [rows, features]}}, compiled once for all parameters."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(map(repr, KINDS))}")
    if isinstance(batch, Batch):  # what else it may be, the door refuses
        batch = Batch(batch.inputs, jnp.zeros(()), batch.mask)
    run = partial(_jitted_outputs, net) if is_hashable(net) else jax.jit(partial(_outputs, net))
    found = {}
    for name, given in params.items():
        try:
            own, checked = check(net, given, batch, _AnyTargets(jnp.subtract))
        except ValueError as error:
            error.add_note(f"this is about the parameters {name!r}")
            raise
        counted = _counted(checked)
        outputs = jax.device_get(run(own, checked.inputs))
        found[name] = {layer: _rows(s, counted, kind) for layer, s in zip(net.layer_names, outputs, strict=True)}
    return found


def _counted(batch: Batch) -> np.ndarray:
    """Which steps count, [time, batch] of booleans."""
    shape = batch.inputs.shape[:2]
    if batch.mask is not None and batch.mask.shape != shape:  # the real targets' loss would have looked
        raise ValueError(f"mask has shape {batch.mask.shape}, but [time, batch] is {shape}")
    counted = np.ones(shape, bool) if batch.mask is None else np.asarray(batch.mask) != 0
    if not counted.any():
        raise ValueError("the mask leaves out every step of every sample: no activity is left to look at")
    return counted


def _rows(outputs: np.ndarray, counted: np.ndarray, kind: str) -> np.ndarray:
    flat = outputs.reshape(*outputs.shape[:2], -1)
    if kind == "time":
        return flat[counted].astype(np.float64)
    steps = counted.sum(axis=0)
    sums = np.einsum("tb,tbu->bu", counted.astype(np.float64), flat.astype(np.float64))
    return sums[steps > 0] / steps[steps > 0, None]


def _outputs(net: Network, params: Params, inputs: Any) -> tuple[Array, ...]:
    return tuple(layer.output for layer in plan.run(net, params, inputs)[1])


_jitted_outputs = jax.jit(_outputs, static_argnums=0)
