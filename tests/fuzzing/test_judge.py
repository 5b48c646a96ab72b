"""The judge of errors and leftovers: what is planted must be found, and what is clear must pass."""

import time
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_robust.data.checks import check_map_style
from hf_robust.sites import EmbeddingSite
from hf_robust.threats import check_at_least, check_choice
from tests.fuzzing import cases
from tests.fuzzing.cases import SUBJECTS, Defect, run_case
from tests.fuzzing.judge import Hang, Snapshot, complaint
from tests.helpers import tiny_batch, tiny_model


def caught(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except (Exception, Hang) as error:
        return error
    raise AssertionError("nothing was raised")


def _inside_a_forward() -> None:
    model = tiny_model()
    model.model.layers[0].register_forward_hook(lambda *_: check_choice("norm", "l3", ("l2",)))
    model(**tiny_batch())


def _with_a_wrong_delta() -> None:
    model = tiny_model()
    with EmbeddingSite(model).add(torch.zeros(1, 2, 3)):
        model(**tiny_batch())


def _bare() -> None:
    raise ValueError("`x=1` is wrong")


@pytest.mark.parametrize(
    ("planted", "wrong"),
    [
        (_inside_a_forward, "hook"),
        (_with_a_wrong_delta, "hook"),
        (lambda: tiny_model()(input_ids=torch.tensor([[99]])), "forward"),
        (lambda: {}["x"], "neither ours"),
        (lambda: Dataset.from_dict({"a": [1]})["b"], "neither ours"),
        (lambda: torch.zeros(2) + torch.zeros(3), "neither ours"),
        (_bare, "neither ours"),
    ],
)  # fmt: skip
def test_planted_errors_are_found(planted: Callable[[], object], wrong: str):
    assert wrong in str(complaint(caught(planted)))


@pytest.mark.parametrize(
    "clear",
    [
        lambda: check_at_least("steps", -1, 0, "Use 0."),
        lambda: check_choice("norm", "l3", ("l2",)),
        lambda: check_map_style([], "train_dataset"),
    ],
)
def test_clear_errors_pass(clear: Callable[[], object]):
    assert complaint(caught(clear)) is None


def test_ours_without_a_name_is_found():
    code = compile("raise ValueError('something is wrong')", check_choice.__code__.co_filename, "exec")
    assert "names no argument" in str(complaint(caught(lambda: exec(code))))


def test_a_hang_is_ended_and_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "DEADLINE", 0.2)
    monkeypatch.setattr(SUBJECTS["texts"], "make", lambda *args, **kwargs: time.sleep(30))
    with pytest.raises(Defect, match="hang"):
        run_case("texts")


@pytest.mark.parametrize("kind", ["hook", "mode", "frozen", "nan"])
def test_leftovers_are_found(kind: str):
    model = tiny_model()
    before = Snapshot(model)
    assert before.leftovers(refused=True) == []
    layer: nn.Module = model.model.layers[0]
    if kind == "hook":
        layer.register_forward_pre_hook(lambda *_: None)
    elif kind == "mode":
        layer.eval()
    elif kind == "frozen":
        next(layer.parameters()).requires_grad_(False)
    else:
        next(layer.parameters()).data[0] = torch.nan
    assert len(before.leftovers(refused=True)) >= 1
    assert bool(before.leftovers(refused=False)) == (kind in ("hook", "nan"))


@pytest.mark.parametrize("name", SUBJECTS)
def test_good_rows_and_defaults_finish_a_step(name: str):
    cases.quiet()
    assert run_case(name) == "step"
