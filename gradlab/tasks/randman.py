"""Randman: classes are smooth random manifolds, told as spike counts or as spike times."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gradlab.losses import Batch
from gradlab.tasks.base import check_whole, fixed_uniform, random_times

_PRECISION, _MAX_HARMONICS = 1e-3, 1000  # equation (2)
_POINTS = 1000  # per class, they fix the standardisation: as many as the reference library's data sets have

# Q in sin(2 pi r) = r (1 - 4 r^2) Q(r^2), |r| <= 1/2: Chebyshev interpolation, off by 3.4e-9 before rounding.
# The factor r (1 - 4 r^2) carries the zeros, so that rounding is small where the sine is.
_SINE = (6.28318529, -16.20895571, 16.76915684, -9.62396972, 3.51241596, -0.79040052)


def sine_of_turns(turns: Array) -> Array:
    """sin(2 pi turns) in float32, to 3e-7: more than ten times faster than jnp.sin on a processor.

    Whole turns are taken off exactly, before anything is multiplied by the rounded number 2 pi.
    """
    rest = turns - jnp.round(turns)
    square = rest * rest
    polynomial = jnp.full_like(rest, _SINE[-1])
    for coefficient in reversed(_SINE[:-1]):
        polynomial = polynomial * square + np.float32(coefficient)
    return rest * (1 - 4 * square) * polynomial


@dataclasses.dataclass(frozen=True)
class Randman:
    """Classify points of smooth random manifolds, one manifold per class, from spike counts or spike times.

    A sample of class c has fresh coordinates x ~ U[0, 1]^manifold_dim of its own. Unit i reads

    (1) f_i(x) = prod_d sum_k  A_idk S_k sin(2 pi (k x_d B_idk + C_idk)),   k = 1 ... K - 1
    (2) K      = min(ceil(1e-3^(-1/alpha)), 1000),   A, B, C ~ U[0, 1], drawn once for each class
    (3) S_k    = 1 / ((k + 1)^alpha + 1) for spectrum="reference",   1 / (k + 1)^alpha for spectrum="power"
    (4) yhat_i = clip((f_i(x) - low_i) / (high_i - low_i), 0, 1)

    `manifold_seed` fixes A, B, C and 1000 points of each class; low_i and high_i are the extremes of f_i
    over these points: the map from x to yhat depends on no batch. Larger alpha means smoother manifolds.

    code="rate": the spike count carries the information and the spike times carry none.

    (5) n_i = min_spikes + min(floor(yhat_i R), R - 1),   R = max_spikes - min_spikes + 1

    spikes on a uniformly random subset of the steps, independent for every sample, unit and batch.

    code="time": the spike times carry the information; the count, `spikes` of each unit, carries none.

    (6) t_i = min(floor(yhat_i T), ceil(T) - 1),   T = steps step_frac

    With spikes > 1 each spike has a manifold of its own over the same x. So that no two meet on one step,
    (6) takes T - spikes + 1 for T, the times are sorted and the j-th (from 0) is moved j steps later.

    The defaults are the rate-coded task of Summe, Schaefer & Joshi: a unit spikes 1 to `steps` times, on
    half of the steps on average. Labels are drawn independently and uniformly, as from a shuffled balanced
    data set: a batch is balanced only on average. Every batch is new data; hold out keys, not samples.

    How it differs from public versions. spectrum="reference" and the missing constant k = 0 are the
    reference library's default; its NumPy back end has S_k of "power". Its data sets are standardised
    over the generated samples, so another draw changes the map. One port gives all classes the same x, and
    all units one permutation of time.

    The manifolds are computed in float32 whatever `dtype` says: a float64 proof sees the float32 run's
    spikes. Another compilation or device may round yhat differently by about 1e-6, and then a count or time
    in about 10,000 moves by one. The first batch of a task takes one to three seconds to prepare.

    Args:
        classes: number of classes; fewer classes are the first of more.
        units: input units; fewer units are the first of more.
        steps: time steps.
        manifold_dim: dimension of each manifold.
        alpha: smoothness, the exponent of the spectrum (3), in (0, 10].
        code: "rate" or "time".
        min_spikes: fewest spikes of a unit, code="rate" only.
        max_spikes: most spikes of a unit, code="rate" only; None: `steps`.
        spikes: spikes of each unit, code="time" only.
        step_frac: the share of the steps, from the first on, that may hold spikes, code="time" only.
        spectrum: "reference" or "power", equation (3).
        manifold_seed: seed of the manifolds.
        dtype: type of inputs and targets, "float32" or "float64".

    Raises:
        TypeError, ValueError: a field that cannot be meant, in words with the way out.

    References:
        Zenke & Vogels (2021), Neural Computation 33(4), doi:10.1162/neco_a_01367: manifolds and time code.
        Summe, Schaefer & Joshi (2023), doi:10.48550/arXiv.2311.16151: rate code.
    """

    classes: int = 10
    units: int = 50
    steps: int = 50
    manifold_dim: int = 3
    alpha: float = 1.0
    code: str = "rate"
    min_spikes: int = 1
    max_spikes: int | None = None
    spikes: int = 1
    step_frac: float = 1.0
    spectrum: str = "reference"
    manifold_seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("classes", "units", "steps", "manifold_dim", "spikes"):
            check_whole("Randman", name, getattr(self, name), 1)
        for name in ("min_spikes", "manifold_seed"):
            check_whole("Randman", name, getattr(self, name), 0)
        for name, most in (("alpha", 10), ("step_frac", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Randman({name}={value!r}): give a number")
            if not 0 < value <= most:
                raise ValueError(f"Randman({name}={value}): must lie in (0, {most}]")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are one task: same JSON, same hash
        self._check_choice("code", "rate", "time")
        self._check_choice("spectrum", "reference", "power")
        self._check_choice("dtype", "float32", "float64")
        self._check_counts()

    def _check_choice(self, name: str, *allowed: str) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"Randman({name}={getattr(self, name)!r}): choose one of {', '.join(allowed)}")

    def _check_counts(self) -> None:
        """Refuse fields that the code would ignore, and counts that do not fit into the steps."""
        unused = ("spikes", "step_frac") if self.code == "rate" else ("min_spikes", "max_spikes")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in unused and value != field.default:
                raise ValueError(
                    f'Randman(code="{self.code}", {field.name}={value!r}): this code does not use '
                    f"{field.name}; leave it out or choose the other code"
                )
        if self.max_spikes is not None:
            check_whole("Randman", "max_spikes", self.max_spikes, 1)
        if self.code == "rate" and not self.min_spikes <= self._most_spikes <= self.steps:
            raise ValueError(
                f"Randman(min_spikes={self.min_spikes}, max_spikes={self.max_spikes}, steps={self.steps}): "
                "needs min_spikes <= max_spikes <= steps, because a unit spikes at most once a step"
            )
        if self.code == "time" and self.spikes > self._window:
            raise ValueError(
                f"Randman(spikes={self.spikes}): only {self._window} of {self.steps} steps may hold a spike, "
                "one each; choose fewer spikes, more steps or a larger step_frac"
            )

    @property
    def harmonics(self) -> int:
        """K of equation (2), the constant k = 0, which is left out, counted."""
        if self.alpha <= 1:
            return _MAX_HARMONICS
        return min(math.ceil(_PRECISION ** (-1 / self.alpha)), _MAX_HARMONICS)

    @property
    def _most_spikes(self) -> int:
        return self.steps if self.max_spikes is None else self.max_spikes

    @property
    def _window(self) -> int:
        """ceil(T) of equation (6), rounding taken off: 100 * 0.07 is 7.000000000000001 and means 7 steps."""
        return math.ceil(self.steps * self.step_frac - 1e-9)

    def batch(self, key: Array, size: int) -> Batch:
        """A batch of new samples: pure in `key`, for use inside jax.jit, jax.vmap over keys and lax.scan too.

        Args:
            key: a random key.
            size: number of samples.

        Returns:
            Batch of inputs [steps, size, units], 0 or 1; one-hot targets [size, classes]; no mask.

        Raises:
            TypeError, ValueError: size is no whole number above 0; dtype="float64" in JAX's 32-bit mode.
        """
        check_whole("Randman.batch", "size", size, 1)
        return _batch(self, key, size)

    def values(self, x: Array, labels: Array) -> Array:
        """yhat of equation (4) at given points: float32 [size, spikes, units] in [0, 1].

        Args:
            x: coordinates [size, manifold_dim] in [0, 1].
            labels: the class whose manifold is read, whole numbers [size].

        Raises:
            TypeError, ValueError: shapes that do not fit, labels that are no classes.
        """
        x, labels = jnp.asarray(x, jnp.float32), jnp.asarray(labels)
        if labels.ndim != 1 or x.shape != (len(labels), self.manifold_dim):
            raise ValueError(
                f"Randman.values: x has shape {x.shape} and labels {labels.shape}; "
                f"give x [size, {self.manifold_dim}] and labels [size]"
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"Randman.values: labels are {labels.dtype}; give whole numbers")
        if not isinstance(labels, jax.core.Tracer) and not bool(jnp.all((labels >= 0) & (labels < self.classes))):
            raise ValueError(f"Randman.values: labels must lie in 0 ... {self.classes - 1}")
        return _values(self._manifolds(), x, labels)

    @functools.partial(jax.jit, static_argnums=0)
    def encode(self, key: Array, values: Array) -> Array:
        """Spikes [steps, size, units] for yhat [size, spikes, units], by (5) or (6); (6) ignores the key."""
        if self.dtype == "float64" and jnp.result_type(float) != jnp.float64:
            raise ValueError(
                'Randman(dtype="float64"): JAX is in 32-bit mode; run inside `with jax.enable_x64(True):` or '
                'call jax.config.update("jax_enable_x64", True) first'
            )
        if self.code == "rate":
            span = self._most_spikes - self.min_spikes + 1
            counts = self.min_spikes + jnp.minimum(jnp.floor(values[:, 0] * span), span - 1)
            return random_times(key, counts, self.steps).astype(self.dtype)
        extra = self.spikes - 1
        slots = jnp.floor(values * (self.steps * self.step_frac - extra))
        slots = jnp.minimum(slots, self._window - extra - 1).astype(jnp.int32)
        times = jnp.sort(slots, axis=1) + jnp.arange(self.spikes, dtype=jnp.int32)[:, None]
        return (times == jnp.arange(self.steps)[:, None, None, None]).any(2).astype(self.dtype)

    def draws(self) -> Waves:
        """A, B, C of (1), k = 0 included: float64 [classes, spikes, units, manifold_dim, harmonics]."""
        classes = [_draws(self._manifolds(), c) for c in range(self.classes)]
        return Waves(*(np.stack(parts) for parts in zip(*classes, strict=True)))

    def _manifolds(self) -> _Manifolds:
        sizes = (self.classes, self.spikes, self.units, self.manifold_dim, self.harmonics)
        return _Manifolds(*sizes, self.alpha, self.spectrum, self.manifold_seed)


# Compiled once for each task and size, for those who call a task outside jax.jit.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _batch(task: Randman, key: Array, size: int) -> Batch:
    label_key, point_key, time_key = jax.random.split(key, 3)
    labels = jax.random.randint(label_key, (size,), 0, task.classes, jnp.int32)
    x = jax.random.uniform(point_key, (size, task.manifold_dim), jnp.float32)
    inputs = task.encode(time_key, task.values(x, labels))
    return Batch(inputs, jax.nn.one_hot(labels, task.classes, dtype=inputs.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _values(m: _Manifolds, x: Array, labels: Array) -> Array:
    low, high = (jnp.asarray(bound)[labels] for bound in _bounds(m))
    f = _evaluate(_waves(m), x, labels).reshape(low.shape)
    return jnp.clip((f - low) / (high - low), 0, 1)


class Waves(NamedTuple):
    """Amplitude, frequency (turns per unit of x) and phase (turns) of every sine wave."""

    amplitude: np.ndarray
    frequency: np.ndarray
    phase: np.ndarray


class _Manifolds(NamedTuple):
    """The fields that decide the manifolds, the key of the caches: both codes of one seed share them."""

    classes: int
    copies: int
    units: int
    dim: int
    harmonics: int
    alpha: float
    spectrum: str
    seed: int


def _draws(m: _Manifolds, c: int) -> Waves:
    """A, B, C of class c, float64 [copies, units, dim, harmonics].

    Each class and copy has a stream of its own: more classes or copies leave the first as they are.
    """
    shape = (m.units, m.dim, 3, m.harmonics)
    numbers = np.stack([fixed_uniform(shape, m.seed, c, j + 1) for j in range(m.copies)])
    return Waves(*np.moveaxis(numbers, -2, 0))


@functools.lru_cache(maxsize=8)  # on the host, 12 bytes per wave: 18 MB for the default task
def _waves(m: _Manifolds) -> Waves:
    """A_k S_k, k B_k and C_k of k = 1 ... K - 1 in float32, [K - 1, classes, copies * units * dim]."""
    k = np.arange(1, m.harmonics)
    spectrum = 1 / ((k + 1.0) ** m.alpha + (m.spectrum == "reference"))
    classes = []
    for c in range(m.classes):
        a, b, phase = (part[..., 1:].reshape(-1, len(k)).T for part in _draws(m, c))
        parts = (a * spectrum[:, None], b * k[:, None], phase)
        classes.append([part.astype(np.float32) for part in parts])
    return Waves(*(np.stack(parts, axis=1) for parts in zip(*classes, strict=True)))


@functools.lru_cache(maxsize=8)
def _bounds(m: _Manifolds) -> tuple[np.ndarray, np.ndarray]:
    """low and high of equation (4), [classes, copies, units]."""
    values = []
    with jax.ensure_compile_time_eval():  # numbers, not tracers, also when the first batch is traced
        waves, evaluate = jax.tree.map(jnp.asarray, _waves(m)), jax.jit(_evaluate)
        for c in range(m.classes):
            x = jnp.asarray(fixed_uniform((_POINTS, m.dim), m.seed, c, 0), jnp.float32)
            values.append(np.asarray(evaluate(waves, x, jnp.full(_POINTS, c, jnp.int32))))
    points = np.stack(values).reshape(m.classes, _POINTS, m.copies, m.units)
    low, high = points.min(1), points.max(1)
    if not (high > low).all():
        raise ValueError(f"Randman(manifold_dim={m.dim}): so long a product of sums vanishes in float32; choose less")
    return low, high


def _evaluate(waves: Waves, x: Array, labels: Array) -> Array:
    """f of equation (1), [size, copies * units], harmonic by harmonic: the sums stay in cache."""
    size, dim = x.shape
    tiled = jnp.tile(x, (1, waves.phase.shape[-1] // dim))

    def add(total: Array, wave: Waves) -> tuple[Array, None]:
        amplitude, frequency, phase = (part[labels] for part in wave)
        return total + amplitude * sine_of_turns(frequency * tiled + phase), None

    total, _ = lax.scan(add, jnp.zeros_like(tiled), waves)
    return total.reshape(size, -1, dim).prod(-1)
