"""Storing and running: files whole or absent, failing and killed workers, any executor."""

from __future__ import annotations

import dataclasses
import logging
import os

import numpy as np
import pytest
from study_parts import fails, killed_once, tiny, writes

from gradlab.study import StudyError, runner
from gradlab.study.rows import read_rows, rows_to_csv
from gradlab.study.store import Folder, check_writable, load_arrays, locked, write_bytes, write_npz


def _interrupt(*_):
    raise KeyboardInterrupt


class TestStore:
    def test_a_file_is_whole_or_absent(self, tmp_path, monkeypatch):
        path = tmp_path / "file"
        write_bytes(path, b"old")
        monkeypatch.setattr(os, "replace", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(path, b"new")
        assert path.read_bytes() == b"old"

    def test_equal_arrays_give_equal_bytes(self, tmp_path):
        arrays = {"b/c": np.arange(3.0), "a": np.array(["x", "yz"])}
        write_npz(tmp_path / "1.npz", arrays)
        write_npz(tmp_path / "2.npz", dict(reversed(arrays.items())))
        assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
        assert np.array_equal(load_arrays(tmp_path / "1.npz")["b/c"], arrays["b/c"])

    def test_objects_are_never_pickled(self, tmp_path):
        with pytest.raises(ValueError, match=r"[Oo]bject"):
            write_npz(tmp_path / "x.npz", {"x": np.array([{}], dtype=object)})

    def test_numbers_survive_the_csv_exactly(self, tmp_path):
        place = dict.fromkeys(("study", "cell", "network", "train_rule"), "s") | {"seed": 0, "step": 0}
        row = {**place, "rule": "None", "layer": "network", "metric": "cosine"}
        values = [0.1 + 0.2, 1e-310, -0.0, float("nan")]
        flags = ["", "", 'a "quoted", line', "NA"]
        rows = [{**row, "value": value, "flag": flag} for value, flag in zip(values, flags, strict=True)]
        (tmp_path / "m.csv").write_bytes(rows_to_csv(rows, header=True))
        frame = read_rows([tmp_path / "m.csv"])
        assert [repr(value) for value in frame["value"]] == [repr(value) for value in values]
        assert list(frame["flag"]) == flags
        assert set(frame["rule"]) == {"None"}

    def test_a_second_process_waits_then_says_so(self, tmp_path):
        folder = Folder(tmp_path, "cells/a", "x")
        with locked(folder), pytest.raises(StudyError, match="Another process"), locked(folder, patience=0.3):
            pass
        with locked(folder, patience=0.3):
            pass

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StudyError, match=r"Nothing was computed.*--results"):
            check_writable(tmp_path / "file", "results", "--results")


class TestRunner:
    def job(self, tmp_path, name, function, *arguments):
        return runner.Job(name, function, arguments, Folder(tmp_path, f"cells/{name}", "x"))

    def test_a_failing_cell_does_not_lose_the_others(self, tmp_path):
        jobs = [
            self.job(tmp_path, "bad", fails, "no luck"),
            *[self.job(tmp_path, f"good{i}", writes, str(tmp_path / f"good{i}")) for i in range(2)],
        ]
        (failure,) = runner._run_missing(jobs, "Cells", 2, None, tmp_path)
        assert failure.startswith("bad failed: RuntimeError: no luck")
        assert (tmp_path / "good0").exists() and (tmp_path / "good1").exists()
        assert "raise RuntimeError(message)" in (tmp_path / "errors/cells__bad.txt").read_text()

    def test_a_killed_worker_is_replaced(self, tmp_path, caplog):
        jobs = [self.job(tmp_path, "victim", killed_once, str(tmp_path / "marker"), "ok")]
        with caplog.at_level(logging.WARNING):
            assert runner._run_missing(jobs, "Cells", 1, None, tmp_path) == []
        assert "killed" in caplog.text

    def test_any_executor_with_submit_will_do(self, tmp_path):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as executor:
            jobs = [self.job(tmp_path, "one", writes, str(tmp_path / "one"))]
            assert runner._run_missing(jobs, "Cells", None, executor, tmp_path) == []
        assert (tmp_path / "one").exists()

    def test_number_of_workers(self, monkeypatch):
        monkeypatch.setattr(runner, "visible_cores", lambda: 4)
        monkeypatch.setattr(runner, "_accelerator", lambda: False)
        assert [runner._workers(None, jobs, 0) for jobs in (1, 3, 9)] == [1, 3, 4]
        assert [runner._workers(None, 9, attempt) for attempt in (1, 2)] == [2, 1]
        assert runner._workers(8, 9, 0) == 8
        monkeypatch.setattr(runner, "_accelerator", lambda: True)
        assert runner._workers(None, 9, 0) == 1

    def test_a_study_that_changes_itself_is_refused(self):
        study = tiny()
        object.__setattr__(study, "seeds", (np.int64(3), 4))  # reads back as plain numbers: still the same text
        assert runner._specification(study)
        assert tiny(loss=Restless(2)).to_json()
        with pytest.raises(StudyError, match="read back"):
            runner._specification(tiny(loss=Restless(2)))


@dataclasses.dataclass(frozen=True)
class Restless:
    """A dataclass that is another one after a round trip."""

    number: int

    def __post_init__(self):
        object.__setattr__(self, "number", self.number + 1)
