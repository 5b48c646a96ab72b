"""Doing something behind another package's import."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_robust.late_registration import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "a_package_of_this_test"
    (tmp_path / f"{name}.py").write_text("value = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


def test_the_action_comes_once_and_behind_the_import(package: str):
    seen = []
    finders = list(sys.meta_path)
    after_import(package, lambda: seen.append(importlib.import_module(package).value))
    assert importlib.util.find_spec(package) is not None  # as libraries ask whether others are installed
    assert seen == [] and package not in sys.modules
    module = importlib.import_module(package)
    assert seen == [1] and sys.meta_path == finders
    importlib.reload(module)
    assert seen == [1]
    assert not type(module.__loader__).__module__.startswith("hf_robust")


def test_a_package_that_is_there_already():
    seen: list[int] = []
    after_import("json", lambda: seen.append(1))
    assert seen == [1]


def test_a_package_that_does_not_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    after_import("no_such_package_at_all", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package_at_all")
