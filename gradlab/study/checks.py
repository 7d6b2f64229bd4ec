"""What is refused when a study is written: each message names the field and the way out."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradlab.factories import Optimizer
from gradlab.study.parts import LandscapeSpec, SpotCheck, require, slug, whole

if TYPE_CHECKING:
    from gradlab.study.spec import Study

__all__ = ["check"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check(study: Study) -> None:
    """Refuse a study that does not make sense.

    Raises:
        StudyError: the message names the field and the way out.
    """
    _check_names(study)
    _check_numbers(study)
    _check_rules(study)
    _check_diagnostics(study)
    _check_profiles(study)


def _check_names(study: Study) -> None:
    good = isinstance(study.name, str) and _NAME.fullmatch(study.name)
    require(bool(good), f"Study.name is {study.name!r}: use letters, digits, '-' and '_' only; it names a folder.")
    require(
        isinstance(study.networks, Mapping)
        and bool(study.networks)
        and all(isinstance(n, str) for n in study.networks),
        f"Study.networks is {study.networks!r}: give a dictionary from names to networks, such as "
        '{"lif": gl.connect([...])}.',
    )
    folders = [slug(name) for name in study.networks]
    require(len(set(folders)) == len(folders), f"Two names of Study.networks give the same folder: {folders}.")
    tasks = study.task if isinstance(study.task, Mapping) else {name: study.task for name in study.networks}
    require(
        set(tasks) == set(study.networks),
        f"Study.task has tasks for {sorted(tasks)}, Study.networks is {sorted(study.networks)}: name a task for each.",
    )
    for task in tasks.values():
        require(
            callable(getattr(task, "batch", None)),
            f"Study.task is {task!r}: give an object with batch(key, size), such as gl.tasks.Randman().",
        )
    require(
        isinstance(study.optimizer, Optimizer),
        f"Study.optimizer is {study.optimizer!r}: an optax transformation cannot be stored; give "
        'gl.Optimizer("adamax", learning_rate=1e-3).',
    )


def _check_numbers(study: Study) -> None:
    for name, least in (("iterations", 1), ("batch_size", 1), ("probes", 2), ("test_size", 1)):
        value = getattr(study, name)
        require(whole(value, least), f"Study.{name} is {value!r}: give a whole number, at least {least}.")
    seeds = study.seeds
    good = isinstance(seeds, tuple) and bool(seeds) and all(whole(seed, 0) and seed < 2**32 for seed in seeds)
    require(
        good,
        f"Study.seeds is {seeds!r}: give a tuple of whole numbers, from 0 to 2**32 - 1, such as (0, 1, 2).",
    )
    require(len(set(seeds)) == len(seeds), f"Study.seeds is {seeds!r}: a seed stands there twice.")
    require(
        study.update in ("sequence", "step") or whole(study.update, 1),
        f'Study.update is {study.update!r}: "sequence", "step", or a whole number of steps between two updates.',
    )
    require(
        study.landscape is None or isinstance(study.landscape, LandscapeSpec),
        f"Study.landscape is {study.landscape!r}: give gl.LandscapeSpec(...) or None.",
    )


def _check_rules(study: Study) -> None:
    for field in ("compared", "trained", "spot_checks"):
        value = getattr(study, field)
        require(isinstance(value, tuple), f"Study.{field} is a {type(value).__name__}: give a tuple.")
    require(bool(study.compared), "Study.compared is empty: name at least one rule, such as gl.rules.OSTL().")
    require(bool(study.trained), "Study.trained is empty: name at least one rule, such as gl.rules.BPTT().")
    for check in study.spot_checks:
        require(isinstance(check, SpotCheck), f"Study.spot_checks holds {check!r}: give gl.SpotCheck(rule).")
    for field, rules in _rule_fields(study):
        for rule in rules:
            require(
                isinstance(getattr(rule, "name", None), str) and not isinstance(rule, type),
                f"Study.{field} holds {rule!r}: give a rule, such as gl.rules.BPTT() (with the brackets).",
            )
        names = [slug(rule.name) for rule in rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"Study.{field} holds {', '.join(twice)} more than once.")


def _rule_fields(study: Study) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "compared", study.compared
    yield "trained", study.trained
    yield "reference", (study.reference,)
    yield "spot_checks", tuple(check.rule for check in study.spot_checks)


def _check_diagnostics(study: Study) -> None:
    from gradlab.study.diagnostic_kinds import KINDS  # loaded here: it needs the study

    value = study.diagnostics
    require(isinstance(value, tuple), f"Study.diagnostics is {value!r}: give a tuple of names, such as ('lags',).")
    unknown = [kind for kind in value if kind not in KINDS]
    require(not unknown, f"Study.diagnostics holds {', '.join(map(repr, unknown))}: choose from {', '.join(KINDS)}.")
    require(len(set(value)) == len(value), f"Study.diagnostics is {value!r}: a name stands there twice.")


def _check_profiles(study: Study) -> None:
    fixed = ("name", "profiles", "profile")
    allowed = [field.name for field in dataclasses.fields(study) if field.name not in fixed]
    for profile, changes in study.profiles.items():
        good = isinstance(profile, str) and _NAME.fullmatch(profile) and profile != "default"
        require(bool(good), f"Study.profiles: {profile!r} is no good name for a profile; 'default' is taken.")
        for field in changes:
            near = difflib.get_close_matches(str(field), allowed, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"A profile may change: {', '.join(allowed)}."
            require(field in allowed, f"Study.profiles[{profile!r}] changes {field!r}, which it cannot. {hint}")
        # A profile that makes no sense is found here, not after the default one has been computed.
        dataclasses.replace(study, **{**changes, "profiles": {}, "profile": profile})
