"""The command line: `gradlab study`, `gradlab studies`, `gradlab rerun`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlab.study.spec import Study

__all__ = ["main"]

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `gradlab`; the default is those of this process.

    Returns:
        0 when all went well, 2 when the input or a cell was wrong, 130 when it was interrupted.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in ("jax", "matplotlib", "fontTools", "gradlab.report"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from gradlab.study.canonical import CanonicalError
    from gradlab.study.spec import StudyError

    try:
        return int(options.run(options))
    except (StudyError, CanonicalError) as error:
        print(f"gradlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ngradlab: interrupted. What was computed is kept: run the same command to go on.",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    import gradlab

    parser = argparse.ArgumentParser(
        prog="gradlab", description="Compare the gradients of learning rules for spiking neural networks."
    )
    parser.add_argument("--version", action="version", version=f"gradlab {gradlab.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    study = commands.add_parser("study", help="run a study, or take it up where it stopped, and write its report")
    study.add_argument("study", metavar="NAME|FILE.py", help="a known study (see: gradlab studies), or a study file")
    study.add_argument("--profile", default="default", help="default, or one that the study defines, such as smoke")
    _add_places(study, "results", "figures")
    study.set_defaults(run=_study)
    studies = commands.add_parser("studies", help="list the known studies")
    studies.set_defaults(run=_studies)
    rerun = commands.add_parser("rerun", help="run a stored spec.json again, and say whether the numbers are equal")
    rerun.add_argument("spec", metavar="spec.json", help="of a study or of one of its cells")
    _add_places(rerun, "rerun/results", "rerun/figures")
    rerun.set_defaults(run=_rerun)
    return parser


def _add_places(parser: argparse.ArgumentParser, results: str, figures: str) -> None:
    parser.add_argument("--results", type=Path, default=Path(results), help="folder for numbers (default: %(default)s)")
    parser.add_argument("--figures", type=Path, default=Path(figures), help="folder for figures (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per cell, at most one per processor core)")


def _study(options: argparse.Namespace) -> int:
    from gradlab.study.loading import find_study, load_study

    study = load_study(find_study(options.study)).with_profile(options.profile)
    _run(study, options)
    return 0


def _studies(options: argparse.Namespace) -> int:
    from gradlab.study.loading import known_studies

    known = known_studies()
    for name, (_, description) in known.items():
        print(f"{name:24} {description}")
    if not known:
        print("There is no folder `studies` here. Run a study file by its path: gradlab study path/to/file.py")
    return 0


def _rerun(options: argparse.Namespace) -> int:
    from gradlab.study.cells import study_from_json
    from gradlab.study.rerun import compare_with_stored
    from gradlab.study.spec import StudyError

    path = Path(options.spec)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"{path} cannot be read ({error.strerror}): give the spec.json of a study's results."
        ) from error
    study = study_from_json(text)
    _run(study, options)
    for line in compare_with_stored(path, study, options.results):
        print(line)
    return 0


def _run(study: Study, options: argparse.Namespace) -> None:
    import jax

    from gradlab.study.runner import run_study

    # The workers compute. This process must not open an accelerator: it would keep the workers from its
    # memory.
    jax.config.update("jax_platforms", "cpu")
    logger.info("Study %s, profile %s", study.name, study.profile)
    report = run_study(study, options.results, options.figures, options.workers)
    print(f"results  {(options.results / study.folder).resolve()}")
    print(f"figures  {(options.figures / study.folder).resolve()}")
    print(f"report   {report.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
