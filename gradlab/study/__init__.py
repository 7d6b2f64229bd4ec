"""Studies: comparisons of learning rules, written down, run in parallel, stored, resumed and reported."""

from gradlab.study.spec import Cell, LandscapeSpec, SpotCheck, Study, StudyError

__all__ = ["Cell", "LandscapeSpec", "SpotCheck", "Study", "StudyError"]
