"""Make one environment per peer under build/peers: `python benchmarks/peers/install.py --torch torch==2.13.0`.

What is there already is kept; what does not install is told with the reason and left out. `--torch` is the requirement
for PyTorch: plain `torch` may bring gigabytes of CUDA packages.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# peer -> what is installed for it; "torch" stands for the requirement that --torch names.
PEERS = {
    "spyx": ("spyx",),
    "braintrace": ("braintrace",),
    "snntorch": ("torch", "snntorch", "numpy"),
    "spikingjelly": ("torch", "spikingjelly", "numpy"),
    "norse": ("torch", "norse", "numpy"),
}


def installed(folder: Path, requirements: Sequence[str]) -> str | None:
    """Make an environment with these packages, unless it is there; None, or why it could not be made."""
    stamp, wanted = folder / "requirements.txt", "\n".join(requirements) + "\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return None
    stamp.unlink(missing_ok=True)
    make = [sys.executable, "-m", "venv", "--clear", str(folder)]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *requirements]
    for command in (make, pip):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr + done.stdout).strip().splitlines() or [f"{command[2]} ended with {done.returncode}"]
            return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    stamp.write_text(wanted, encoding="utf-8")  # last: an interrupted installation is done again
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="peer", help=", ".join(PEERS))
    parser.add_argument("--torch", default="torch", help="requirement for PyTorch")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "peers")
    options = parser.parse_args()
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"no peer {unknown}; there are {list(PEERS)}")
    if sys.platform == "win32":
        parser.error("the peers' environments are made on Linux and macOS only")
    for name in options.peers or PEERS:
        requirements = [options.torch if package == "torch" else package for package in PEERS[name]]
        reason = installed(options.environments / name, requirements)
        print(f"{name}: {'ready' if reason is None else f'left out, {reason}'}", flush=True)


if __name__ == "__main__":
    main()
