"""The kinds of diagnostics that a study can ask for: each is a function from a setting to a tidy frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from gradlab.rules import ComposedRule, LocalRule
from gradlab.study.probes import batch_key, make_batch
from gradlab.study.spec import Study

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AFTER_TRAINING", "KINDS", "Setting"]

_METRICS = ("cosine", "norm_ratio", "relative_error", "projection")


@dataclass(frozen=True)
class Setting:
    """One place where diagnostics are measured.

    Args:
        study, network: what was run.
        train_rule: the rule that the parameters were trained with.
        seed, step: of the parameters.
        params: the parameters.
        batch: the data of the seed, the same at every step.
        solutions: training rule -> final parameters of the seed, finite ones only.
    """

    study: Study
    network: str
    train_rule: str
    seed: int
    step: int
    params: Any
    batch: Any
    solutions: dict[str, Any]

    @property
    def net(self) -> Any:
        return self.study.networks[self.network]

    @property
    def key(self) -> jax.Array:
        return batch_key("noise of the diagnostics", self.seed, self.step)

    @property
    def rules(self) -> list[Any]:
        """The named rules that are compared and that the network supports, without the reference."""
        from gradlab.engine import shapes_of

        shapes = shapes_of(self.net, self.params, self.batch, self.study.loss)
        named = [rule for rule in self.study.rules if not isinstance(rule, LocalRule)]
        return [rule for rule in named if rule.supports(self.net, shapes, self.study.loss) is None]

    @property
    def case(self) -> tuple[Any, Any, Any, Any]:
        """What every analysis begins with: network, parameters, batch, loss."""
        return self.net, self.params, self.batch, self.study.loss


def _whole_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Without single parameters, which would make most of the file."""
    return frame[~frame["layer"].str.contains("/", regex=False)]


def attribution(at: Setting) -> pd.DataFrame:
    """The gap between each composed rule and BPTT, by the paths that the rule drops."""
    import pandas as pd

    from gradlab.analysis.attribution import attribute

    frames = []
    for rule in at.rules:
        if not isinstance(rule, ComposedRule):
            continue
        try:
            frames.append(attribute(rule, *at.case, key=at.key).to_frame())
        except (TypeError, ValueError, RuntimeError) as error:  # the other rules' results must not be lost
            row = {"rule": rule.name, "layer": "network", "path": "", "kind": "share", "metric": "share"}
            frames.append(pd.DataFrame([{**row, "value": float("nan"), "flag": str(error)}]))
    return _whole_layers(pd.concat(frames)) if frames else pd.DataFrame(columns=["rule", "layer", "value"])


def lags(at: Setting) -> pd.DataFrame:
    """Credit by the delay between a weight's action and the error."""
    from gradlab.analysis.lags import lag_profile

    return _whole_layers(lag_profile(*at.case, at.rules, at.key, at.study.reference).to_frame())


def timeline(at: Setting) -> pd.DataFrame:
    """Metrics of the gradient at every step of the sequence."""
    from gradlab.analysis.timeline import over_time

    frame = _whole_layers(over_time(*at.case, at.rules, at.key, at.study.reference).to_frame())
    return frame[frame["metric"].isin(_METRICS)]


def noise(at: Setting) -> pd.DataFrame:
    """Bias, variance and signal-to-noise ratio of every rule's gradient, over eight batches."""
    from gradlab.analysis.noise import estimator_noise

    keys = [batch_key("noise batch", at.seed, number) for number in range(8)]
    batches = [make_batch(at.study, at.network, key, at.study.batch_size) for key in keys]
    net, params, _, loss = at.case
    return _whole_layers(
        estimator_noise(net, params, batches, loss, at.rules, at.key, 4, at.study.reference).to_frame()
    )


def descent(at: Setting) -> pd.DataFrame:
    """The decrease of the loss along each rule's step over the reference's, at matched lengths and after the
    optimizer.
    """
    from gradlab.analysis.descent import descent_ratios

    test = make_batch(at.study, at.network, batch_key("test batch", at.seed), at.study.batch_size)
    return descent_ratios(
        *at.case, at.rules, at.key, optimizer=at.study.optimizer, reference=at.study.reference, test_batch=test
    ).to_frame()


def best_steps(at: Setting) -> pd.DataFrame:
    """The loss along each rule's direction, and the best length of step."""
    from gradlab.analysis.descent import best_steps

    return best_steps(*at.case, at.rules, at.key, reference=at.study.reference).to_frame()


def updates(at: Setting) -> pd.DataFrame:
    """Metrics of the optimizer's first updates, in the place of the gradients."""
    from gradlab.analysis.alignment import update_alignment

    found = update_alignment(*at.case, at.rules, at.key, at.study.optimizer, reference=at.study.reference)
    return _whole_layers(found.to_frame())


def health(at: Setting) -> pd.DataFrame:
    """Firing rates, dead and saturated units, surrogate slopes, and the flow of the error."""
    from gradlab.analysis.health import network_health

    return network_health(*at.case).to_frame()


def curvature(at: Setting) -> pd.DataFrame:
    """Curvature of the loss along each rule's direction."""
    from gradlab.analysis.curvature import curvature_along
    from gradlab.analysis.objective import loss_function
    from gradlab.engine import gradients, with_reference

    chosen = with_reference(at.rules, at.study.reference)
    found = gradients(*at.case, chosen, at.key)
    return curvature_along(loss_function(at.net, at.batch, at.study.loss), at.params, found).to_frame()


def spectrum(at: Setting) -> pd.DataFrame:
    """Density of the eigenvalues of the loss's Hessian."""
    from gradlab.analysis.density import spectral_density
    from gradlab.analysis.objective import loss_function

    loss = loss_function(at.net, at.batch, at.study.loss)
    return spectral_density(loss, at.params, steps=50, draws=4, points=512, seed=at.seed).to_frame()


def between(at: Setting) -> pd.DataFrame:
    """The loss on straight lines from the reference's solution to those of the other rules."""
    import pandas as pd

    from gradlab.analysis.between import between

    if len(at.solutions) < 2 or at.train_rule not in at.solutions:
        return pd.DataFrame(columns=["rule", "other", "layer", "metric", "value", "flag", "t"])
    return between(at.net, at.batch, at.study.loss, at.solutions, reference=at.train_rule).to_frame()


def representation(at: Setting) -> pd.DataFrame:
    """Similarity of the hidden activity of networks trained with different rules."""
    import pandas as pd

    from gradlab.analysis.representation import compare_representations

    if len(at.solutions) < 2:
        return pd.DataFrame(columns=["rule", "layer", "other_rule", "other_layer", "metric", "value", "flag"])
    return compare_representations(at.net, at.solutions, at.batch).to_frame()


KINDS: dict[str, Callable[[Setting], pd.DataFrame]] = {
    function.__name__: function
    for function in (
        attribution, lags, timeline, noise, descent, best_steps, updates, health, curvature, spectrum, between,
        representation,
    )
}  # fmt: skip
"""Name -> what measures it."""

AFTER_TRAINING = ("between", "representation")
"""The kinds that compare solutions, and are measured at the end of training only."""
