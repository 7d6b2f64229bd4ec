"""The local rules as explicit loops over synapses in NumPy: an oracle that shares no code with the rules.

It covers feed-forward chains of Dense layers and LIF neurons (and a leaky read-out), with any reset, and follows the
papers' equations on the membrane *before* the reset, while the library carries the membrane after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradlab.neurons import LI, LIF
from gradlab.surrogates import FastSigmoid
from gradlab.testing.networks import Case

Layer = dict[str, Any]
Gradient = dict[str, dict[str, dict[str, np.ndarray]]]


def gradient(case: Case, rule: str, feedback: dict[str, np.ndarray] | None = None) -> Gradient:
    """The gradient of one rule, by name: "OSTL", "OTTT", "SLTT", "OTPE", "ApproximateOTPE", "FrontOTPE" or "EProp".

    `feedback` holds the matrices of e-prop's random feedback, {layer name: [read-out units, units]}; None: symmetric.
    The loss must be softmax cross-entropy per step, mean over time, without a mask.
    """
    layers = [_layer(case, index) for index in range(len(case.net.neurons))]
    n_steps, size = case.batch.inputs.shape[:2]
    found: Gradient = {}
    for sample in range(size):
        signals = _forward(layers, np.asarray(case.batch.inputs[:, sample]))
        target = np.asarray(case.batch.targets[sample])
        one = _sample(rule, layers, signals, target, feedback)
        for index, (kernel, bias) in enumerate(one):
            own = found.setdefault(f"layer_{index}", {"connection": {"kernel": np.zeros(1), "bias": np.zeros(1)}})[
                "connection"
            ]
            own["kernel"] = own["kernel"] + kernel / (n_steps * size)
            own["bias"] = own["bias"] + bias / (n_steps * size)
    return found


def _layer(case: Case, index: int) -> Layer:
    neuron, own = case.net.neurons[index], case.params[f"layer_{index}"]["connection"]
    if isinstance(neuron, LI):
        cell: Layer = {"beta": neuron.beta, "spiking": False}
    elif isinstance(neuron, LIF) and isinstance(neuron.surrogate, FastSigmoid):
        cell = {
            "beta": neuron.beta,
            "spiking": True,
            "reset": neuron.reset,
            "detached": neuron.detach_reset,
            "threshold": neuron.threshold,
            "slope": neuron.surrogate.slope,
        }
    else:
        raise TypeError(f"this oracle knows LIF with a fast sigmoid, and LI; not {neuron}")
    return {**cell, "W": np.asarray(own["kernel"]), "b": np.asarray(own["bias"])}


def _forward(layers: list[Layer], x: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Per layer, for every step: input x, output s, slope psi, and a_t = dv_t / dv_{t-1} on the membrane before the
    reset.
    """
    signals = []
    for layer in layers:
        n_steps, units = x.shape[0], layer["b"].size
        v, s, psi, a = (np.zeros((n_steps, units)) for _ in range(4))
        for t in range(n_steps):
            before = v[t - 1] if t else np.zeros(units)
            carried, a[t] = _after_reset(layer, before, s[t - 1], psi[t - 1]) if t else (before, np.zeros(units))
            v[t] = layer["beta"] * carried + x[t] @ layer["W"] + layer["b"]
            s[t], psi[t] = _spike(layer, v[t])
        signals.append({"x": x, "s": s, "psi": psi, "a": a})
        x = s
    return signals


def _spike(layer: Layer, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not layer["spiking"]:
        return v, np.ones_like(v)
    distance = v - layer["threshold"]
    return (distance >= 0).astype(float), 1.0 / (layer["slope"] * np.abs(distance) + 1.0) ** 2


def _after_reset(layer: Layer, v: np.ndarray, s: np.ndarray, psi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The membrane that is carried to the next step, and a = dv_t / dv_{t-1}."""
    beta = layer["beta"] * np.ones_like(v)
    if not layer["spiking"] or layer["reset"] == "none":
        return v, beta
    if layer["reset"] == "subtract":
        return v - layer["threshold"] * s, beta if layer["detached"] else beta * (1.0 - layer["threshold"] * psi)
    return v * (1.0 - s), beta * (1.0 - s) if layer["detached"] else beta * (1.0 - s - v * psi)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def _sample(
    rule: str, layers: list[Layer], signals: list[dict[str, np.ndarray]], target: np.ndarray, feedback: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """One sample: traces forward in time, one synapse at a time."""
    last, n_steps = len(layers) - 1, signals[0]["x"].shape[0]
    state = [_fresh(layer) for layer in layers]
    grads = [(np.zeros_like(layer["W"]), np.zeros_like(layer["b"])) for layer in layers]
    o = np.zeros_like(layers[last]["b"])
    for t in range(n_steps):
        o = layers[last]["beta"] * o + signals[last]["s"][t]
        L = _softmax(o if rule == "FrontOTPE" else signals[last]["s"][t]) - target
        readout = signals[last]["psi"][t] * L
        for index in range(last, -1, -1):
            layer, now = layers[index], {name: value[t] for name, value in signals[index].items()}
            if rule == "EProp" and index < last:
                B = layers[last]["W"].T if feedback is None else feedback[f"layer_{index}"]
                L = readout @ B
            kappa = layers[last if rule == "EProp" or index == last else index + 1]["beta"]
            plain = index == last and rule != "FrontOTPE"
            q = _synapses(rule, layer, now, state[index], kappa, L, grads[index], plain)
            L = layer["W"] @ q
    return grads


def _fresh(layer: Layer) -> dict[str, Any]:
    m, n = layer["W"].shape
    shape = (m + 1, n)
    return {"E": np.zeros(shape), "R": np.zeros(shape), "g": np.zeros(n), "r": 0.0}


def _synapses(
    rule: str, layer: Layer, now: Layer, state: dict[str, Any], kappa: float, L: np.ndarray, grad: Any, plain: bool
) -> np.ndarray:
    """Advance every synapse (i, j) of a layer by one step, add to the gradient, and return the error q that is
    handed down.
    """
    x = np.append(now["x"], 1.0)  # the bias is an input that is constantly 1
    r_before, state["r"] = state["r"], kappa * state["r"] + 1.0
    state["g"] = (kappa * r_before * state["g"] + now["psi"]) / state["r"]
    mean = rule in ("OTPE", "ApproximateOTPE", "FrontOTPE") and not plain
    slope = state["g"] if mean else now["psi"]
    for i in range(x.size):
        for j in range(L.size):
            decay = {"OTTT": layer["beta"], "ApproximateOTPE": layer["beta"], "SLTT": 0.0, "EProp": layer["beta"]}.get(
                rule, now["a"][j]
            )
            if rule == "EProp" and layer["spiking"] and layer["reset"] == "zero":
                raise ValueError("this oracle writes e-prop for a reset whose cut leaves the leak alone")
            state["E"][i, j] = decay * state["E"][i, j] + x[i]
            e = state["E"][i, j] if rule == "ApproximateOTPE" and mean else now["psi"][j] * state["E"][i, j]
            remembers = not plain and rule in ("OTPE", "ApproximateOTPE", "FrontOTPE", "EProp")
            state["R"][i, j] = (kappa if remembers else 0.0) * state["R"][i, j] + e
            factor = state["g"][j] if rule == "ApproximateOTPE" and mean else 1.0
            contribution = L[j] * factor * state["R"][i, j]
            if i < x.size - 1:
                grad[0][i, j] += contribution
            else:
                grad[1][j] += contribution
    return slope * L
