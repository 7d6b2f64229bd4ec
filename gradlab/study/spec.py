"""What a study is: frozen dataclasses that say everything and compute nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gradlab.factories import Optimizer
from gradlab.study import canonical
from gradlab.study.checks import check
from gradlab.study.parts import LandscapeSpec, SpotCheck, StudyError, slug

__all__ = ["Cell", "LandscapeSpec", "SpotCheck", "Study", "StudyError"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One unit of work: one network trained with one rule, for all seeds.

    Args:
        index: its place in `study.cells()`.
        network: the name of its network.
        train_rule: the name of the rule that it is trained with.
        folder: its folder, relative to the study's `cells` folder.
    """

    index: int
    network: str
    train_rule: str
    folder: str

    @property
    def name(self) -> str:
        """The cell's name in tables and messages: network/training rule."""
        return f"{self.network}/{self.train_rule}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of learning rules, written down completely.

    Each network is trained with each of the `trained` rules. At each probe of that training, the gradients of
    all `compared` rules are computed at the same parameters on the same batch and compared with the
    reference's.

    Args:
        name: short name: letters, digits, "-" and "_". It names the results folder.
        task: a frozen dataclass with `batch(key, size)`, such as `gl.tasks.Randman()`; or, where networks have tasks of
            their own, a dictionary from the names of all `networks` to tasks.
        networks: name -> `gl.connect(...)`.
        loss: the loss, such as `gl.PerStep(optax.softmax_cross_entropy)`.
        compared: the rules whose gradients are compared.
        trained: the rules to train with.
        reference: the rule that they are compared with.
        optimizer: `gl.Optimizer(name, learning_rate=...)`.
        title: a line for the head of the report.
        seeds: one training run per seed, in each cell. A seed sets the initial weights and all batches.
        iterations: number of training batches.
        batch_size: samples in a training batch, and in the probe batch.
        probes: number of probes, the first before training and the last after it.
        test_size: samples in each seed's held-out batch.
        update: "sequence" (one step of the optimiser per batch), "step" (one per time step) or a whole number (one per
            window of so many time steps).
        spot_checks: rules compared only on a few samples at the first and the last probe.
        landscape: the surface to draw, or None.
        diagnostics: names of further diagnostics, computed after training where it began and where it ended: any of
            `gradlab.study.diagnostic_kinds.KINDS`, such as ("attribution", "lags", "descent").
        profiles: name -> changed fields, such as `{"smoke": {"iterations": 4}}`.
        profile: the profile that is in force; set by `with_profile`.

    Raises:
        StudyError: a field does not make sense; the message names it and the way out.
    """

    name: str
    task: Any
    networks: Mapping[str, Any]
    loss: Any
    compared: tuple[Any, ...]
    trained: tuple[Any, ...]
    reference: Any
    optimizer: Optimizer
    title: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    iterations: int = 300
    batch_size: int = 128
    probes: int = 21
    test_size: int = 1024
    update: str | int = "sequence"
    spot_checks: tuple[SpotCheck, ...] = ()
    landscape: LandscapeSpec | None = None
    diagnostics: tuple[str, ...] = ()
    profiles: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    profile: str = "default"

    def __post_init__(self) -> None:
        check(self)

    def with_profile(self, profile: str) -> Study:
        """Return the study with a profile's changes made, and no profiles left in it.

        Raises:
            StudyError: the study has no such profile (the message lists those that it has).
        """
        if profile == "default":
            return dataclasses.replace(self, profiles={}, profile=profile)
        if profile not in self.profiles:
            known = ", ".join(["default", *sorted(self.profiles)])
            raise StudyError(f"Study {self.name!r} has no profile {profile!r}. It has: {known}.")
        return dataclasses.replace(self, **{**self.profiles[profile], "profiles": {}, "profile": profile})

    @property
    def folder(self) -> str:
        """The name of the study's results folder."""
        return self.name if self.profile == "default" else f"{self.name}-{self.profile}"

    @property
    def probe_every(self) -> int:
        """Training steps between two probes: ceil(iterations / (probes - 1))."""
        return math.ceil(self.iterations / (self.probes - 1))

    @property
    def probe_steps(self) -> tuple[int, ...]:
        """The training steps at which the rules are compared; 0 is before the first update."""
        return (*range(0, self.iterations, self.probe_every), self.iterations)

    @property
    def rules(self) -> tuple[Any, ...]:
        """The compared rules without the reference, which every comparison contains anyway."""
        return tuple(rule for rule in self.compared if rule.name != self.reference.name)

    def task_of(self, network: str) -> Any:
        """The task of a network, by its name."""
        return self.task[network] if isinstance(self.task, Mapping) else self.task

    def cells(self) -> tuple[Cell, ...]:
        """Return the cells, network by network (in alphabetical order), in the order of `trained`."""
        return tuple(
            Cell(index, network, rule.name, f"{slug(network)}/{slug(rule.name)}")
            for index, (network, rule) in enumerate(
                (network, rule) for network in sorted(self.networks) for rule in self.trained
            )
        )

    def only(self, cell: Cell) -> Study:
        """Return the study cut down to what one cell's results depend on: its specification and identity."""
        rule = next(rule for rule in self.trained if rule.name == cell.train_rule)
        own = dataclasses.replace(self, trained=(rule,), landscape=None, diagnostics=(), title="", profiles={})
        return own.with_network(cell.network)

    def with_network(self, network: str) -> Study:
        """Return the study of one of its networks only."""
        networks = {network: self.networks[network]}
        return dataclasses.replace(self, networks=networks, task=self.task_of(network), profiles={})

    def to_json(self) -> str:
        """Return the canonical text, which is the study's identity.

        Raises:
            gradlab.study.canonical.CanonicalError: a field has no canonical form, such as a lambda.
        """
        return canonical.dumps(self, "study")
