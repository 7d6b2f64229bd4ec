"""Tasks: pure functions from a random key to a batch."""

from __future__ import annotations

from gradlab.tasks.base import Task
from gradlab.tasks.randman import Randman

__all__ = ["Randman", "Task"]
