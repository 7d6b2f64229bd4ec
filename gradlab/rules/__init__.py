"""Learning rules. `ALL` holds a default instance of each; shared tests and listings run over it."""

from gradlab.rules.base import Estimate, Rule, Shapes, StreamingRule
from gradlab.rules.bptt import BPTT, TBPTT
from gradlab.rules.fptt import FPTT
from gradlab.rules.local import ComposedRule, LocalRule
from gradlab.rules.named import OSTL, OTPE, OTTT, SLTT, ApproximateOTPE, EProp, FrontOTPE
from gradlab.rules.rtrl import RTRL
from gradlab.rules.signals import (
    DirectFeedback,
    LeakySum,
    NextLayer,
    Output,
    PredictionFilter,
    ReadoutFilter,
    SpatialBackprop,
)
from gradlab.rules.traces import JacobianTrace, NoTrace, SubthresholdTrace

ALL: tuple[Rule, ...] = (
    BPTT(),
    TBPTT(),
    RTRL(),
    OSTL(),
    OTTT(),
    OTPE(),
    ApproximateOTPE(),
    FrontOTPE(),
    SLTT(),
    EProp(),
    FPTT(),
)

__all__ = [
    "ALL",
    "BPTT",
    "FPTT",
    "OSTL",
    "OTPE",
    "OTTT",
    "RTRL",
    "SLTT",
    "TBPTT",
    "ApproximateOTPE",
    "ComposedRule",
    "DirectFeedback",
    "EProp",
    "Estimate",
    "FrontOTPE",
    "JacobianTrace",
    "LeakySum",
    "LocalRule",
    "NextLayer",
    "NoTrace",
    "Output",
    "PredictionFilter",
    "ReadoutFilter",
    "Rule",
    "Shapes",
    "SpatialBackprop",
    "StreamingRule",
    "SubthresholdTrace",
]
