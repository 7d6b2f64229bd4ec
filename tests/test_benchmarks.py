"""The benchmarks: every workload runs, the floor holds the products that it should, ratios are of one round."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import common, model, suite, w1, w2, w5, w6
from benchmarks.peers import gradlab as ours
from benchmarks.peers import install, run
from benchmarks.peers.serve import Case, facts

QUICK = common.Options(quick=True, rounds=1)


def in_this_process(module: str, *arguments: str, environment: object = None) -> object:
    """What `common.fresh` gives, without starting Python and JAX again for each number."""
    numbers = [int(a) if a.isdigit() else a for a in arguments]
    return {"benchmarks.w5": w5.one, "benchmarks.w6": w6.one}[module](*numbers)


def numbers(rows: list[common.Row]) -> list[float]:
    return [value for row in rows for value in row.values() if isinstance(value, float)]


# The column that says what the workload is about, and how many rows have it at toy size.
ABOUT = {
    "w1": ("over_floor", 5),
    "w2": ("over_bptt", 2),
    "w4": ("over_floor", 2),
    "w5": ("over_scan", 4),
    "w6": ("temporary_MB", 3),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("w4", "w5") else name for name in ABOUT]
)
def test_every_workload_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(common, "fresh", in_this_process)
    path = tmp_path / "numbers.json"
    suite.suite([name], QUICK, path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = stored["workloads"][name]
    column, count = ABOUT[name]
    values = [row[column] for row in rows if row.get(column) is not None]
    assert len(values) == count
    assert all(math.isfinite(value) for value in numbers(rows))
    assert all(value > 0 for value in values)
    assert stored["machine"]["jax"] == jax.__version__
    assert column in capsys.readouterr().out


def test_the_cost_model_counts_as_by_hand() -> None:
    rows = [
        {"width": width, "program": "tape", "over_floor": over, "floor_ms": floor}
        for width, over, floor in ((20, 2.0, 10.0), (40, 1.5, 30.0))
    ]
    narrow, wide = model.times([*rows, {"width": 20, "program": "scan", "over_floor": 9.0, "floor_ms": 1.0}])
    # 500 steps, 64 samples: 20 + 20 + 10 units take 10 ms above the floor, 40 + 40 + 10 units 18 ms.
    assert narrow["ns_per_neuron_step"] == pytest.approx(10e6 / (32_000 * 50))
    assert narrow["predicted_over_floor"] == pytest.approx(2.0)
    assert wide["predicted_over_floor"] == pytest.approx(1 + 18 / 30)
    products = 32_000 * (2 * (40 * 40 + 40 * 40 + 40 * 10) + 40 * 40 + 40 * 10)
    assert wide["billion_multiply_adds_per_s"] == pytest.approx(products / 30e-3 / 1e9)
    kept = {"width": 40, "steps": 100, "program": "OSTL", "temporary_MB": 1.0}
    assert model.memory([kept])[0]["predicted_MB"] == pytest.approx(4 * 100 * w6.BATCH * 90 / 1e6)


def test_an_unknown_workload_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"no workload 'w9'.*'w1'"):
        suite.measure("w9", QUICK)
    with pytest.raises(SystemExit):
        suite.main(["w9"])
    assert "no workload ['w9']" in capsys.readouterr().err


def test_a_rule_without_a_deferred_gradient_is_told() -> None:
    net, params, data = w1.case(8, 12, 8)
    assert w2.why_not(gl_rule("RTRL"), net, params, data) == "carries an influence forwards in time"
    assert w2.why_not(gl_rule("OSTL"), net, params, data) is None


def gl_rule(name: str) -> object:
    return getattr(w2.rules, name)()


# --- the floor ---


def test_multiply_adds_by_hand() -> None:
    """Layers 4-5, 5-6, 6-2 with 7 rows. Forward 20 + 30 + 12, back 30 + 12 (not to the data), weights 20 + 30 + 12."""
    assert common.multiply_adds([(4, 5), (5, 6), (6, 2)], 7) == 7 * (62 + 42 + 62)


def shapes(sizes: common.Sizes, rows: int) -> tuple[list, list, list]:
    def spec(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "float32")

    return [spec(rows, a) for a, _ in sizes], [spec(*s) for s in sizes], [spec(rows, b) for _, b in sizes]


def test_the_floor_holds_these_products_and_no_others() -> None:
    """The compiler counts two operations per multiply-add. A floor without the error to layer 1 would have fewer."""
    sizes, rows = [(32, 48), (48, 40), (40, 16)], 64
    counted = jax.jit(common.products).lower(*shapes(sizes, rows)).compile().cost_analysis()["flops"]
    wanted = 2 * common.multiply_adds(sizes, rows)
    assert counted == pytest.approx(wanted, rel=0.02)
    assert counted != pytest.approx(wanted - 2 * rows * 48 * 40, rel=0.02)


def test_the_floor_of_w1_is_what_its_gradient_needs() -> None:
    """Unrolled, without a loop that the compiler would count once, BPTT has the floor's products and nothing bigger."""
    steps, batch, width = 3, 8, 64
    net, params, data = w1.case(width, 12, batch)
    data = data._replace(inputs=data.inputs[:steps])

    def loss(p: object) -> object:
        state, outputs = net.initial_state(p, data.inputs), []
        for x in data.inputs:
            state, _, spikes = net.step(p, state, x)
            outputs.append(spikes[-1])
        return w1.LOSS(jax.numpy.stack(outputs), data)

    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    floor = 2 * common.multiply_adds(w1.layer_sizes(width), steps * batch)
    # Elementwise work is a few dozen operations per unit and step; no error reaches layer 1 at the last step's output.
    assert floor < counted < floor + 100 * steps * batch * (2 * width + w1.CLASSES)


# --- timing ---


def test_a_ratio_is_the_median_within_rounds() -> None:
    """2/1, 9/3, 4/4: median 2; the ratio of the medians would be 4/3, and less `c` it is the median of 1, 2, 0."""
    times = {"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0], "c": [1.0, 3.0, 4.0]}
    assert common.ratio(times, "a", "b") == 2.0
    assert common.ratio(times, "a", "b", less="c") == 1.0


def test_actions_take_turns() -> None:
    order: list[str] = []
    times = common.interleaved({name: (lambda n=name: order.append(n)) for name in "ab"}, rounds=2, warm=1)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_a_process_of_its_own() -> None:
    with pytest.raises(RuntimeError, match=r"no_such_module"):
        common.fresh("no_such_module")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_added_memory_is_that_of_the_call() -> None:
    """64 MB that are freed again, and nothing; half of it would be wrong, twice it too."""
    assert common.added_memory(lambda: float(np.ones(8_000_000).sum())) == pytest.approx(64, rel=0.1)
    assert common.added_memory(lambda: 0.0) < 1


def test_the_table_has_a_column_for_every_key() -> None:
    lines = common.table([{"program": "one", "ratio": 1.234}, {"program": "two", "note": "left out"}]).splitlines()
    assert lines == ["program  ratio  note", "one       1.23  -", "two          -  left out"]


# --- beside other libraries ---


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "case.npz"
    run.write_case("w1", 8, True, path)
    return path


def test_all_processes_get_the_same_work(case: Path) -> None:
    """gradlab, built from the stored case alone, gives the stored gradient; from other weights it does not."""
    stored = Case.load(str(case))
    told = facts(ours.build(stored, "BPTT"), stored)
    assert told["cosine"] == pytest.approx(1, abs=1e-6)
    assert told["norm_ratio"] == pytest.approx(1, abs=1e-6)
    assert all(0.03 < rate < 0.2 for rate in told["rates"])
    assert stored.sizes == w1.layer_sizes(8)
    wrong = {**vars(stored), "kernels": tuple(1.5 * kernel for kernel in stored.kernels)}
    assert facts(ours.build(Case(**wrong), "BPTT"), stored)["cosine"] < 0.999


def test_a_missing_peer_is_told_and_left_out(case: Path, tmp_path: Path) -> None:
    with run.peers({"Norse": run.W1["Norse"]}, tmp_path, case) as (processes, told, missing):
        assert (processes, told) == ({}, {})
    assert missing == {"Norse": f"no environment {tmp_path / 'norse'}"}


def test_every_peer_has_a_program_and_an_environment() -> None:
    folder = Path(run.__file__).parent
    for environment, module, _ in [*run.W1.values(), *run.W2.values()]:
        assert (folder / f"{module}.py").exists()
        assert environment is None or environment in install.PEERS
    assert sys.executable in run.command(folder, run.W1["floor"], folder / "case.npz", "time")
