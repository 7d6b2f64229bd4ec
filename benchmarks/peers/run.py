"""gradlab beside other libraries: `make bench-peers`, or `python benchmarks/peers/run.py --environments build/peers`.

Every library runs in a process and an environment of its own. All processes are started once and wait; then the driver
lets one after the other do its work, round after round, so that whatever else the machine does slows all of them. What
is told is the median over rounds of the ratio to the floor of the same round: `floor`, the matrix products through JAX
(`common.floor`), and `torch_floor`, the same products through PyTorch. Memory is what one call adds to the resident
memory of a fresh process that gives every larger array back to the system (`serve.added_memory`).

Workloads: `w1`, forward pass and gradient of three Dense layers with LIF neurons (N, N, 10), 500 steps, batch 64;
`w2`, the gradient of one local rule (OSTL here, D-RTRL in braintrace) for three layers of N, 100 steps, batch 32. All
use the same weights, spikes and labels. `rates` says how often each layer fires, `cosine` how like gradlab's BPTT
gradient the peer's one is: BPTT with the same neuron has 1, and notes tell where the neuron is another.

A peer whose environment is missing or whose program fails is told with the reason, and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import jax
import numpy as np

import gradlab as gl
from benchmarks import common, w1

OURS = "gradlab"
# name -> (environment, module, variant); None is this program's own environment.
W1 = {
    "floor": (None, "floor", "-"),
    "torch floor": ("snntorch", "floor_torch", "-"),
    "gradlab BPTT": (None, "gradlab", "BPTT"),
    "gradlab BPTT, sparse": (None, "gradlab", "BPTT, sparse"),
    "Spyx, by layer": ("spyx", "spyx", "layers"),
    "Spyx, by step": ("spyx", "spyx", "steps"),
    "braintrace BPTT": ("braintrace", "braintrace", "BPTT"),
    "snnTorch, by layer": ("snntorch", "snntorch", "layers"),
    "snnTorch, by step": ("snntorch", "snntorch", "steps"),
    "SpikingJelly": ("spikingjelly", "spikingjelly", "layers"),
    "Norse": ("norse", "norse", "layers"),
}
W2 = {
    "floor": (None, "floor", "-"),
    "gradlab BPTT": (None, "gradlab", "BPTT"),
    "gradlab OSTL": (None, "gradlab", "OSTL"),
    "gradlab OSTL, streaming": (None, "gradlab", "OSTL, streaming"),
    "braintrace BPTT": ("braintrace", "braintrace", "BPTT"),
    "braintrace D-RTRL": ("braintrace", "braintrace", "D_RTRL"),
    "braintrace D-RTRL, windows": ("braintrace", "braintrace", "D_RTRL_window"),
}
PROGRAMS = {"w1": W1, "w2": W2}


def write_case(workload: str, width: int, quick: bool, path: Path) -> None:
    """The workload's weights, spikes, labels and BPTT gradient, for every process to read."""
    if workload == "w1":
        net, params, data = w1.case(width, *((12, 8) if quick else (500, 64)))
    else:
        net, params, data = w1.case(width, *((12, 8) if quick else (100, 32)), outputs=width)
    found = gl.gradients(net, params, data, w1.LOSS, [gl.rules.BPTT()], jax.random.key(3))["BPTT"]
    arrays: dict[str, Any] = {"inputs": data.inputs, "labels": data.targets.argmax(1), "layers": len(net.layer_names)}
    arrays |= {"beta": net.neurons[0].beta, "slope": net.neurons[0].surrogate.slope}
    for index, name in enumerate(net.layer_names):
        (own,), (gradient,) = params[name].values(), found[name].values()
        arrays |= {f"kernel_{index}": own["kernel"], f"bias_{index}": own["bias"]}
        arrays[f"reference_{index}"] = gradient["kernel"]
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})


def command(environments: Path, program: tuple[str | None, str, str], case: Path, mode: str) -> list[str]:
    """The command of a peer's process.

    Raises:
        FileNotFoundError: the peer's environment is not there.
    """
    environment, module, variant = program
    python = Path(sys.executable) if environment is None else environments / environment / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"no environment {environments / str(environment)}")
    return [str(python), "-m", f"benchmarks.peers.{module}", str(case), variant, mode]


def started(call: Sequence[str], log: Path, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        call,
        cwd=common.ROOT,
        env={**os.environ, "PYTHONPATH": path, **(variables or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
    )


def answer(process: subprocess.Popen[str], log: Path) -> Any:
    """The next line of a process as JSON.

    Raises:
        RuntimeError: it ended; the last line of its log is in the message.
    """
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("{", "[")) or line[:1].isdigit():  # a library may print lines of its own
            return json.loads(line)
    process.wait()
    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no message"]
    raise RuntimeError(f"ended with {process.returncode}: {lines[-1]}")


@contextmanager
def peers(
    programs: dict[str, Any], environments: Path, case: Path
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, str]]]:
    """Every peer's process, waiting for its turn; what each told of itself; and why the others are missing."""
    processes: dict[str, subprocess.Popen[str]] = {}
    told: dict[str, Any] = {}
    missing: dict[str, str] = {}
    try:
        for name, program in programs.items():
            log = case.with_suffix(f".{name.replace(' ', '_')}.log")
            try:
                processes[name] = started(command(environments, program, case, "time"), log)
                told[name] = answer(processes[name], log)
            except (FileNotFoundError, RuntimeError) as error:
                missing[name] = str(error)
                processes.pop(name, None)
        yield processes, told, missing
    finally:
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def turn(process: subprocess.Popen[str]) -> float:
    """Let a process do its work once; its seconds.

    Raises:
        RuntimeError: it ended instead.
    """
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"ended in its turn with {process.wait()}: {process.args}")
    return float(line)


def memory(environments: Path, program: tuple[str | None, str, str], case: Path) -> float | None:
    """MB that one call adds in a fresh process, whose allocator gives large arrays back to the system."""
    log = case.with_suffix(".memory.log")
    process = started(command(environments, program, case, "memory"), log, common.giving_back())
    found = answer(process, log)["added_MB"]
    process.communicate()
    return found


def measure(workload: str, width: int, options: argparse.Namespace) -> list[common.Row]:
    """One row per program of a workload at one width."""
    case = options.environments / f"case_{workload}_{width}.npz"
    write_case(workload, width, options.quick, case)
    programs = PROGRAMS[workload]
    with peers(programs, options.environments, case) as (processes, told, missing):
        times: dict[str, list[float]] = {name: [] for name in processes}
        for number in range(options.rounds + 1):
            for name, process in processes.items():
                seconds = turn(process)
                time.sleep(0.02)  # threads that wait actively for more work go to sleep
                if number:
                    times[name].append(seconds)
    rows: list[common.Row] = []
    for name in processes:
        row: common.Row = {"workload": workload, "width": width, "program": name, "version": told[name]["version"]}
        row |= {"over_floor": common.ratio(times, name, "floor"), "ms": common.milliseconds(times[name])}
        if "torch floor" in times:
            row["over_torch_floor"] = common.ratio(times, name, "torch floor")
        like = "gradlab OSTL" if "RTRL" in name else "gradlab BPTT"
        row["over_gradlab"] = common.ratio(times, name, like) if like in times else None
        row["added_MB"] = memory(options.environments, programs[name], case)
        rates = told[name].get("rates")
        row["rates"] = rates and " ".join(f"{rate:.3f}" for rate in rates)
        row |= {key: told[name].get(key) for key in ("cosine", "norm_ratio", "note")}
        rows.append(row)
    return rows + [{"workload": workload, "width": width, "program": n, "note": why} for n, why in missing.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=common.ROOT / "build" / "peers")
    parser.add_argument("--workloads", nargs="+", choices=tuple(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="toy sizes: do the programs run?")
    parser.add_argument("--allocator", choices=("kept", "system"), default="kept", help="as in the suite, for all")
    parser.add_argument("--cores", type=int, help="as in the suite, for all")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    common.use_allocator(options.allocator)
    common.use_cores(options.cores)
    options.environments = options.environments.resolve()
    options.environments.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": common.machine(), "quick": options.quick, "peers": []}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for workload in options.workloads:
        for width in options.widths:
            rows = measure(workload, width, options)
            result["peers"] += rows
            print(f"\n{common.table(rows)}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
