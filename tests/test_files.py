"""Files that are there whole or not at all."""

import os
import threading
import time
from pathlib import Path

import pytest

from hf_robust.files import whole_file


def test_of_two_writers_each_publishes_its_own(tmp_path: Path):
    path = tmp_path / "report.json"
    with whole_file(path) as second:
        with whole_file(path) as first:
            first.write_text("first")
            second.write_text("half of the sec")
        assert path.read_text() == "first"
        second.write_text("second")
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["report.json"]


def test_a_writer_that_fails_takes_nothing_along(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with whole_file(path) as other:
        other.write_text("new")
        with pytest.raises(OSError, match="full"), whole_file(path) as draft:
            draft.write_text("ha")
            raise OSError("full")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["report.json"]


def test_many_writers_at_once(tmp_path: Path):
    path, contents = tmp_path / "report.json", [str(i) * 2000 for i in range(8)]
    seen: list[str] = []

    def write(content: str) -> None:
        for _ in range(5):
            with whole_file(path) as draft:
                draft.write_text(content)
            seen.append(path.read_text())

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40 and set(seen) <= set(contents) and os.listdir(tmp_path) == ["report.json"]


def test_what_a_kill_left_goes_a_day_later(tmp_path: Path):
    """Not earlier: it may be one that is being written."""
    old, named_by_an_older_version, young = (
        tmp_path / name for name in (".a[1].json.0f.draft", ".a[1].json.draft", ".a[1].json.1f.draft")
    )
    others = [tmp_path / name for name in (".b.json.0f.draft", "a[1].json.draft")]
    for path in (old, named_by_an_older_version, young, *others):
        path.write_text("half")
        age = time.time() - (3600 if path is young else 25 * 3600)
        os.utime(path, (age, age))
    with whole_file(tmp_path / "a[1].json") as draft:
        draft.write_text("{}")
    assert set(tmp_path.iterdir()) == {tmp_path / "a[1].json", young, *others}


def test_modes_are_those_of_any_new_file(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    with whole_file(tmp_path / "whole") as draft:
        draft.write_text("")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
