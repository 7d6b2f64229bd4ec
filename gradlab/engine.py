"""Many rules on one tape: `estimates`, `gradients`, `compare`, `evaluate`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gradlab import plan
from gradlab.checks import check
from gradlab.losses import Batch, Loss, spike_count_accuracy
from gradlab.modules import is_hashable
from gradlab.network import Network, Params
from gradlab.rules import adjoint
from gradlab.rules.adjoint import Learner
from gradlab.rules.base import Estimate, Rule, Shapes
from gradlab.rules.bptt import BPTT
from gradlab.rules.local import ComposedRule
from gradlab.tape import Tape, jacobians, record

if TYPE_CHECKING:
    from gradlab.comparison import Comparison


def estimates(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    states: dict[str, Any] | None = None,
) -> dict[str, Estimate]:
    """Every rule's estimate on one forward pass of the same network, parameters and batch.

    Args:
        net, params: the network and its parameters.
        batch: inputs [time, batch, features...], targets, and perhaps a mask.
        loss: `gl.PerStep(...)` or `gl.Accumulated(...)`.
        rules: the rules, in the order of the answer; names must differ.
        key: for stochastic rules; each draws from the key and its own position.
        states: rule name -> state of a run; a rule without one begins with its `init`.

    Returns:
        {rule name: Estimate}; each gradient is a pytree like `params`. Works inside `jax.jit`.

    Raises:
        ValueError: inputs, targets or mask that do not fit, NaN in data or parameters (when values are known), two
            rules of one name, a state of no rule, or a rule that does not support the network or the loss, in its own
            words.
    """
    names = rule_names(rules)
    params, batch, held = prepare(net, params, batch, loss, rules, key, states)
    found = compiled(net, loss, tuple(rules))(params, batch, held, key)
    # An ordered dict keeps its order through JAX's own functions; a plain one comes back sorted from a user's jax.jit.
    return OrderedDict(zip(names, found, strict=True))


def prepare(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    states: dict[str, Any] | None = None,
) -> tuple[Params, Batch, tuple[Any, ...]]:
    """Check everything at the door; the parameters and the batch as JAX arrays, and the rules' states.

    Arguments and errors as `estimates`.
    """
    names = rule_names(rules)
    params, batch = check(net, params, batch, loss)
    check_key(key)
    if unknown := sorted(set(states or {}) - set(names)):
        raise ValueError(f"states are given for {unknown}, but the rules are {names}")
    shapes = shapes_of(net, params, batch, loss)
    for rule in rules:
        reason = rule.supports(net, shapes, loss)
        if reason is not None:
            raise ValueError(reason)
    held = tuple(
        (states or {}).get(name, rule.init(net, params, shapes)) for name, rule in zip(names, rules, strict=True)
    )
    return params, batch, held


def with_reference(rules: Sequence[Rule], reference: Rule | None) -> list[Rule]:
    """The rules with the reference (BPTT by default) first; names must differ."""
    rule_names(rules)
    reference = BPTT() if reference is None else reference
    chosen = [reference, *(rule for rule in rules if rule != reference)]
    rule_names(chosen)
    return chosen


def gradients(
    net: Network, params: Params, batch: Batch, loss: Loss, rules: Sequence[Rule], key: Array
) -> dict[str, Params]:
    """The rules' gradients, {name: pytree like params} in the order given; arguments and errors as `estimates`."""
    found = estimates(net, params, batch, loss, rules, key)
    return OrderedDict((name, estimate.grad) for name, estimate in found.items())


def compare(
    net: Network,
    params: Params,
    batch: Batch,
    loss: Loss,
    rules: Sequence[Rule],
    key: Array,
    reference: Rule | None = None,
    skip_unsupported: bool = False,
) -> Comparison:
    """Compare rules with a reference (BPTT by default) on one tape: metrics, Gram matrices and the network's health.

    Args:
        net, params, batch, loss, rules, key: as `estimates`.
        reference: the rule that the others are measured against; it may also stand in `rules`.
        skip_unsupported: record a rule's refusal in `Comparison.refusals` where False raises it.
    """
    from gradlab.comparison import Comparison

    chosen = with_reference(rules, reference)
    params, batch = check(net, params, batch, loss)
    refusals: dict[str, str] = {}
    if skip_unsupported:
        shapes = shapes_of(net, params, batch, loss)
        reasons = {rule.name: rule.supports(net, shapes, loss) for rule in chosen[1:]}
        refusals = {name: reason for name, reason in reasons.items() if reason is not None}
        chosen = [rule for rule in chosen if rule.name not in refusals]
    found = gradients(net, params, batch, loss, chosen, key)
    return Comparison.build(net, jax.device_get(found), evaluate(net, params, batch, loss), refusals)


def evaluate(net: Network, params: Params, batch: Batch, loss: Loss) -> dict[str, Any]:
    """Loss, accuracy and the network's health on a batch, as Python numbers.

    Steps that the mask leaves out count nowhere.

    Returns:
        A dict with "loss"; "accuracy", "silent_outputs", "classes_never_predicted" and "undecided" where the targets
        are classes, that is integer labels or one-hot rows (`spike_count_accuracy`); and per spiking layer,
        {layer: value}: "firing_rate" (mean output per step), "silent_units" and "saturated_units" (shares of units that
        fire in no step, or in every step, of the batch) and "slope" (mean surrogate slope D_t).
    """
    params, batch = check(net, params, batch, loss)
    found = jax.device_get(_evaluation(net, loss, are_classes(net, batch, loss))(params, batch))
    return jax.tree.map(lambda leaf: leaf.item() if hasattr(leaf, "item") else leaf, found)


def check_key(key: Any) -> None:
    """Raise TypeError for what is no random key."""
    typed = isinstance(key, Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, Array | np.ndarray) and key.dtype == jnp.uint32 and key.ndim == 1
    if not typed and not raw:
        raise TypeError(f"key={key!r}: give a random key, jax.random.key(0)")


def rule_names(rules: Sequence[Rule]) -> list[str]:
    """The rules' names; two of the same name are refused, because one result would hide the other."""
    if isinstance(rules, Rule):
        raise TypeError(f"rules is one rule: give a list, [{rules.name}]")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"{rule!r} is not a rule: give instances, gl.rules.OSTL()")
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two rules are named {name!r}: their hyper-parameters are the same, or their classes share a name"
            )
    return names


def shapes_of(net: Network, params: Params, batch: Batch, loss: Loss) -> Shapes:
    """The shapes of one run, without running it."""
    # A compiled function's trace is kept, so that asking again costs nothing.
    recorder = partial(_jitted_record, net, loss) if is_hashable(net, loss) else partial(_record, net, loss)
    tape = jax.eval_shape(recorder, params, batch)
    return Shapes.of(params, tape)


def _record(net: Network, loss: Loss, params: Params, batch: Batch) -> Tape:
    return record(net, params, batch, loss)


_jitted_record = jax.jit(_record, static_argnums=(0, 1))


def _run_rules(
    net: Network, loss: Loss, rules: tuple[Rule, ...], params: Params, batch: Batch, states: Any, key: Array
) -> tuple[Estimate, ...]:
    return on_tape(net, params, record(net, params, batch, loss), rules, states, key)


def on_tape(
    net: Network, params: Params, tape: Tape, rules: Sequence[Rule], states: Sequence[Any], key: Array
) -> tuple[Estimate, ...]:
    """The rules' estimates on a tape that is recorded already, without checks; for use inside `jax.jit`."""
    keys = [jax.random.fold_in(key, position) for position in range(len(rules))]
    # Composed rules share signals and products; a class that writes its own `gradient` is asked for it.
    joint = {
        position: Learner(rule.compose(), state, keys[position])
        for position, (rule, state) in enumerate(zip(rules, states, strict=True))
        if isinstance(rule, ComposedRule) and type(rule).gradient is ComposedRule.gradient
    }
    grads = dict(zip(joint, adjoint.gradients(list(joint.values()), net, params, tape), strict=True)) if joint else {}
    return tuple(
        Estimate(grads[position], state) if position in grads else rule.gradient(net, params, tape, state, own_key)
        for position, (rule, state, own_key) in enumerate(zip(rules, states, keys, strict=True))
    )


_jitted_rules = jax.jit(_run_rules, static_argnums=(0, 1, 2))


def are_classes(net: Network, batch: Batch, loss: Loss) -> bool:
    """True when the targets are classes: integer labels, or rows of one-hot targets. Only known values can tell."""
    targets = batch.targets
    if getattr(loss, "targets_per_step", False):
        return False
    if jnp.issubdtype(targets.dtype, jnp.integer) and targets.ndim == 1:
        return True
    if isinstance(targets, jax.core.Tracer) or targets.ndim != 2 or targets.shape[1] < 2:
        return False
    with jax.ensure_compile_time_eval():
        return bool(((targets == 0) | (targets == 1)).all() & (targets.sum(1) == 1).all())


def _evaluate(net: Network, loss: Loss, classes: bool, params: Params, batch: Batch) -> dict[str, Any]:
    _, layers = plan.run(net, params, batch.inputs)
    output = layers[-1].output
    found: dict[str, Any] = {"loss": loss(output, batch)}
    if classes and output.ndim == 3:
        found |= spike_count_accuracy(output, batch.targets, batch.mask)._asdict()
    counted = jnp.ones(output.shape[:2], output.dtype) if batch.mask is None else batch.mask.astype(output.dtype)
    health: dict[str, dict[str, Array]] = {"firing_rate": {}, "silent_units": {}, "saturated_units": {}, "slope": {}}
    for index, (name, layer) in enumerate(zip(net.layer_names, layers, strict=True)):
        if getattr(net.neurons[index], "spiking", False):
            counts = counted.reshape(*counted.shape, *(1,) * (layer.output.ndim - 2))
            weights = counts / jnp.maximum(counted.sum(), 1.0)
            fired = (layer.output != 0) & (counts > 0)
            health["firing_rate"][name] = (layer.output * weights).sum((0, 1)).mean()
            health["silent_units"][name] = jnp.mean(~jnp.any(fired, axis=(0, 1)))
            health["saturated_units"][name] = jnp.mean(jnp.all(fired | (counts == 0), axis=(0, 1)))
            health["slope"][name] = (jacobians(net, params, index, layer).D * weights).sum((0, 1)).mean()
    return found | health


_jitted_evaluate = jax.jit(_evaluate, static_argnums=(0, 1, 2))


def compiled(net: Network, loss: Loss, rules: tuple[Rule, ...]) -> Any:
    """A compiled function: cached while the network, loss and rules are hashable, closed over them otherwise."""
    if is_hashable(net, loss, rules):
        return partial(_jitted_rules, net, loss, rules)
    return jax.jit(partial(_run_rules, net, loss, rules))


def _evaluation(net: Network, loss: Loss, classes: bool) -> Any:
    if is_hashable(net, loss):
        return partial(_jitted_evaluate, net, loss, classes)
    return jax.jit(partial(_evaluate, net, loss, classes))
