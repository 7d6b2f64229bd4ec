"""How good is the gradient that a learning rule gives a spiking neural network, and does it matter for training?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradlab import rules, tasks
from gradlab.atlas import Atlas, atlas
from gradlab.engine import compare, estimates, evaluate, gradients
from gradlab.factories import Initializer, Optimizer
from gradlab.losses import Accumulated, Accuracy, Batch, PerStep, spike_count_accuracy
from gradlab.network import Network, connect
from gradlab.neurons import ALIF, IF, LI, LIF, CurrentLIF, LeakyRate, Neuron
from gradlab.sharding import Sharded, shard
from gradlab.sparse_products import SparseProducts
from gradlab.spike_products import SpikeProducts
from gradlab.surrogates import Arctan, FastSigmoid, MultiGaussian, Sigmoid, Surrogate, Triangular
from gradlab.tape import Tape, record
from gradlab.training import Run, train

if TYPE_CHECKING:
    from gradlab import analysis, report, study, testing

__version__ = "0.1.0"

# What needs pandas or matplotlib is imported when it is first used.
_LAZY = {
    "Comparison": "gradlab.comparison",
    "LandscapeSpec": "gradlab.study",
    "SpotCheck": "gradlab.study",
    "Study": "gradlab.study",
}
_LAZY_MODULES = ("analysis", "report", "study", "testing")


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"gradlab.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gradlab' has no attribute {name!r}")


__all__ = [
    "ALIF",
    "IF",
    "LI",
    "LIF",
    "Accumulated",
    "Accuracy",
    "Arctan",
    "Atlas",
    "Batch",
    "CurrentLIF",
    "FastSigmoid",
    "Initializer",
    "LeakyRate",
    "MultiGaussian",
    "Network",
    "Neuron",
    "Optimizer",
    "PerStep",
    "Run",
    "Sharded",
    "Sigmoid",
    "SparseProducts",
    "SpikeProducts",
    "Surrogate",
    "Tape",
    "Triangular",
    "analysis",
    "atlas",
    "compare",
    "connect",
    "estimates",
    "evaluate",
    "gradients",
    "record",
    "report",
    "rules",
    "shard",
    "spike_count_accuracy",
    "study",
    "tasks",
    "testing",
    "train",
]
