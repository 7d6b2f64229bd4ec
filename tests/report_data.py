"""A small tidy frame of results, for the tests of figures, tables and reports."""

import numpy as np
import pandas as pd

RULES = ("BPTT", "OTTT", "SLTT")
STEPS = (0, 10, 20, 30, 40)
SILENT = "layer_0 is silent"


def results(trained=("BPTT",), seeds=3):
    """layer_0 is silent at steps 10 and 20; SLTT has no direction in layer_1 at 0; its outputs die."""
    rng, rows = np.random.default_rng(0), []
    for train_rule in trained:
        for seed in range(seeds):
            for step in STEPS:
                base = {
                    "study": "s",
                    "cell": train_rule,
                    "network": "n",
                    "train_rule": train_rule,
                    "seed": seed,
                    "step": step,
                }
                for i, rule in enumerate(RULES):
                    for layer in ("network", "layer_0", "layer_1", "layer_0/connection/kernel"):
                        flag = SILENT if layer == "layer_0" and step in (10, 20) else ""
                        flag = "zero gradient" if (rule, layer, step) == ("SLTT", "layer_1", 0) else flag
                        flag = SILENT if layer == "layer_1" and step == 30 and seed == 1 else flag
                        for metric, value in (("cosine", 1 - 0.1 * i), ("norm_ratio", 1 + 0.3 * i)):
                            value = np.nan if flag else value - 0.01 * rng.uniform() * (i > 0)
                            rows.append(
                                {
                                    **base,
                                    "rule": rule,
                                    "layer": layer,
                                    "metric": metric,
                                    "value": value,
                                    "flag": flag,
                                }
                            )
                dead = 2.0 if train_rule == "SLTT" and step >= 20 else 0.0
                for metric, value in (("accuracy", 0.2 + step / 60), ("silent_outputs", dead)):
                    rows.append({**base, "rule": "", "layer": "network", "metric": metric, "value": value, "flag": ""})
                rate = 0.0 if step in (10, 20) else 0.1
                rows.append(
                    {
                        **base,
                        "rule": "",
                        "layer": "layer_0",
                        "metric": "firing_rate",
                        "value": rate,
                        "flag": "",
                    }
                )
    return pd.DataFrame(rows)
