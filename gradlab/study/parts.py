"""The small parts of a study, and the error that all of it raises."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

__all__ = ["PLANES", "LandscapeSpec", "SpotCheck", "StudyError", "require", "slug", "whole"]

PLANES = ("pca", "random")


class StudyError(ValueError):
    """A study that cannot be run as it is written; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class SpotCheck:
    """A rule that is too costly for every probe: compared on a few samples, at the first and the last probe
    only.

    Args:
        rule: the rule, such as `gl.rules.RTRL()`.
        samples: how many samples of the probe batch it sees.
    """

    rule: Any
    samples: int = 2

    def __post_init__(self) -> None:
        require(
            whole(self.samples, 1),
            f"SpotCheck.samples is {self.samples!r}: give a whole number, at least 1.",
        )


@dataclasses.dataclass(frozen=True)
class LandscapeSpec:
    """The loss over a plane through parameter space, drawn after training (Li et al. 2018, arXiv 1712.09913).

    Args:
        points: the surface is evaluated at points x points places.
        planes: "pca" (principal components of the training paths about the reference rule's final
            parameters), "random" (two filter-normalised random directions), or both.
        samples: size of the held-out batch on which the loss is evaluated.
        margin: how far the surface goes beyond the paths, as a share of their extent.
    """

    points: int = 31
    planes: tuple[str, ...] = ("pca",)
    samples: int = 256
    margin: float = 0.15

    def __post_init__(self) -> None:
        require(
            whole(self.points, 2),
            f"LandscapeSpec.points is {self.points!r}: give a whole number, at least 2.",
        )
        require(
            whole(self.samples, 1),
            f"LandscapeSpec.samples is {self.samples!r}: give a whole number above 0.",
        )
        unknown = [plane for plane in self.planes if plane not in PLANES]
        require(
            isinstance(self.planes, tuple) and bool(self.planes) and not unknown,
            f"LandscapeSpec.planes is {self.planes!r}: give a tuple of {' and '.join(map(repr, PLANES))}.",
        )
        require(self.margin >= 0, f"LandscapeSpec.margin is {self.margin!r}: it cannot be negative.")


def require(condition: bool, message: str) -> None:
    """Refuse a study with a message unless the condition holds."""
    if not condition:
        raise StudyError(message)


def whole(value: object, least: int) -> bool:
    """Say whether a value is a whole number, at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def slug(name: str) -> str:
    """Return a name that is safe for a folder: all but letters, digits, ".", "=" and "-" becomes "_"."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("_.") or "_"
