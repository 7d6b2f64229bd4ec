"""Finding study files and reading them."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import gradlab
from gradlab.study.spec import Study, StudyError

__all__ = ["find_study", "known_studies", "load_study"]


def study_folders() -> list[Path]:
    """Return the folders that are searched: `studies` here, and beside the library's source."""
    places = [Path.cwd() / "studies", Path(gradlab.__file__).resolve().parent.parent / "studies"]
    return [place for index, place in enumerate(places) if place.is_dir() and place not in places[:index]]


def known_studies() -> dict[str, tuple[Path, str]]:
    """Return name -> (file, first line of its docstring), without running any of the files."""
    found: dict[str, tuple[Path, str]] = {}
    for folder in study_folders():
        for path in sorted(folder.glob("*.py")):
            if not path.stem.startswith("_") and path.stem not in found:
                found[path.stem] = (path, _description(path))
    return found


def _description(path: Path) -> str:
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"(cannot be read: {error})"
    return text.splitlines()[0] if text else "(no description)"


def find_study(name: str) -> Path:
    """Return the file of a study, given by its name or by the path of its file.

    Raises:
        StudyError: there is none; the message lists the known ones.
    """
    path = Path(name)
    if path.suffix == ".py":
        if path.is_file():
            return path.resolve()
        raise StudyError(f"There is no study file {path}.")
    known = known_studies()
    if name in known:
        return known[name][0]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listing = "\n".join(f"  {key:24} {text}" for key, (_, text) in known.items()) or "  (none)"
    folders = " and ".join(map(str, study_folders())) or "no folder called studies here"
    raise StudyError(
        f"There is no study called {name!r}.{hint} Known studies, from {folders}:\n{listing}\n"
        "A study of your own is given by the path of its file: gradlab study path/to/file.py"
    )


def load_study(path: Path) -> Study:
    """Run a study file and return its STUDY.

    The file's folder is added to the end of the import path, so that a study may use modules beside it and
    classes of its own; the workers inherit that.

    Raises:
        StudyError: the file does not run (the message holds its own traceback) or has no STUDY.
    """
    value = getattr(_import_file(path), "STUDY", None)
    if isinstance(value, Study):
        return value
    if value is None:
        raise StudyError(f"{path} has no STUDY. A study file says: STUDY = gl.Study(name=..., task=..., ...)")
    raise StudyError(f"STUDY in {path} is a {type(value).__name__}; it must be a gl.Study(...).")


def _import_file(path: Path) -> ModuleType:
    name, folder = path.stem, str(path.parent)
    taken = _elsewhere(name, path)
    if taken is not None:
        raise StudyError(f"{path} has the name of another Python module ({taken}): give the file another name.")
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StudyError(f"{path} cannot be read as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise StudyError(f"The study file {path} does not run:\n{_own_traceback(error, path)}") from error
    return module


def _elsewhere(name: str, path: Path) -> str | None:
    """Return where another module of this name lies, if there is one."""
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None)
    else:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None:
            return None
        origin = spec.origin
    if origin is not None and Path(origin).resolve() == path:
        return None
    return origin or f"{name}, built into Python"


def _own_traceback(error: Exception, path: Path) -> str:
    """Return the traceback from the study file on, without the frames that read it."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if Path(frame.filename) == path), len(frames))
    lines: list[Any] = traceback.format_list(frames[first:])
    return "".join([*lines, *traceback.format_exception_only(error)]).rstrip()
