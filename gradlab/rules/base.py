"""What every learning rule is: a function from the tape to an estimate of the gradient."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array

from gradlab.losses import Loss
from gradlab.network import Network, Params
from gradlab.tape import Slices, Tape


class Estimate(NamedTuple):
    """A rule's answer: the gradient (a pytree like the parameters), the rule's next state, and diagnostics never
    carried.

    `info["teaches"]` False says of one time step that no update belongs to it: the optimizer does not step there.
    """

    grad: Params
    state: Any = ()
    info: dict[str, Any] = {}  # noqa: RUF012  a NamedTuple default, never mutated


class Shapes(NamedTuple):
    """What `Rule.supports` may know without any value: shapes of one run."""

    n_steps: int
    params: Params
    slices: Slices
    """One step of the tape, [batch, ...]: shapes and dtypes only."""

    @classmethod
    def of(cls, params: Params, tape: Tape) -> Shapes:
        """The shapes of a tape, or of one that `jax.eval_shape` gave."""
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tape.slices)
        return cls(tape.n_steps, jax.eval_shape(lambda p: p, params), first)

    @property
    def batch_size(self) -> int:
        return self.slices.inputs.shape[0]

    @property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """The shape of one sample's output, per layer."""
        return tuple(layer.output.shape[1:] for layer in self.slices.layers)

    @property
    def dtype(self) -> Any:
        return self.slices.inputs.dtype


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """A learning rule: a frozen dataclass of hyper-parameters, hashable and printable; it never holds arrays.

    Write `gradient`, a `reference`, and `supports` where the rule has conditions; give the docstring its equations,
    what it drops
    and when it is exact. Nothing needs to be registered: a user's rule works everywhere that a built-in one does.
    """

    reference: ClassVar[str] = ""
    """Paper and DOI."""
    online: ClassVar[bool] = False
    """True when the rule has a streaming form, so that `train(update="step")` can use it."""
    windowed: ClassVar[bool] = True
    """True when the rule's deferred gradient of a window of steps means something, so that `train(update=10)` can use
    it; the traces of a streaming rule would begin anew in each window.
    """

    @property
    def name(self) -> str:
        """The class's name, with the hyper-parameters that differ from their defaults: "TBPTT(k=1)"."""
        return shown(self)

    def supports(self, net: Network, shapes: Shapes, loss: Loss, online: bool = False) -> str | None:
        """None, or the sentence that says why this rule cannot treat this network and loss, and what to use instead."""
        return None

    def init(self, net: Network, params: Params, shapes: Shapes) -> Any:
        """The rule's state at the start of a run: fixed feedback weights (from the rule's seed and the layer), running
        averages.
        """
        return ()

    @abc.abstractmethod
    def gradient(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        """The gradient of the tape's loss as this rule estimates it; `key` is for the noise of stochastic rules."""

    def by_step(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Params | None:
        """The gradient split by the step at which the weights acted, leaves [time, ...], whose sum over time is
        `gradient`; None for a rule that does not know it.
        """
        return None

    def updated(self, net: Network, params: Params, state: Any) -> Any:
        """The rule's state after the optimizer changed the parameters; most rules keep it as it is."""
        return state

    def refuse(self, reason: str) -> str:
        return f"{self.name}: {reason}"


@dataclasses.dataclass(frozen=True)
class StreamingRule(Rule):
    """A rule that runs forward in time: `start` makes its traces, `step` folds one slice of time into them."""

    online: ClassVar[bool] = True
    windowed: ClassVar[bool] = False

    @abc.abstractmethod
    def start(
        self, net: Network, params: Params, loss: Loss, state: Any, slices: Slices, n_steps: int, key: Array
    ) -> Any:
        """Traces at the start of a sequence; `key` is for the noise of stochastic rules, kept in the trace.

        `slices` (one step, [batch, ...]) gives shapes and dtypes, its values are not used.
        """

    @abc.abstractmethod
    def step(
        self, net: Network, params: Params, loss: Loss, trace: Any, state: Any, slices: Slices
    ) -> tuple[Any, Estimate]:
        """One time step: the new traces, and the gradient that this step contributes."""

    def stream(self, net: Network, params: Params, tape: Tape, state: Any, key: Array) -> Estimate:
        """The streaming form's gradient: the fold of `step` over the tape, summed over time."""
        first = jax.tree.map(lambda leaf: leaf[0], tape.slices)
        zero = jax.tree.map(lambda leaf: leaf * 0, params)

        def advance(carry: Any, now: Slices) -> tuple[Any, None]:
            trace, grad, inner = carry
            trace, estimate = self.step(net, params, tape.loss, trace, inner, now)
            return (trace, jax.tree.map(lambda a, b: a + b, grad, estimate.grad), estimate.state), None

        begin = (self.start(net, params, tape.loss, state, first, tape.n_steps, key), zero, state)
        (_, grad, state), _ = jax.lax.scan(advance, begin, tape.slices)
        return Estimate(grad, state)


def shown(value: Any) -> str:
    """A hyper-parameter in a name; parts of a composed rule show what differs from their defaults."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    changed = [
        f"{field.name}={shown(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(changed)})" if changed else type(value).__name__
