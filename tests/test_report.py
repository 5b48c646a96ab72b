"""Reports: intervals, JSON round trip, table, plot, card."""

import json

import pytest
import yaml

from hf_robust.metrics import wilson_interval
from hf_robust.metrics.proportions import student_quantile
from hf_robust.report import (
    AttackSummary,
    Flag,
    Measurement,
    Report,
    format_table,
    model_card,
    plot_report,
)


@pytest.fixture
def report():
    return Report(
        title="a run",
        method={"name": "CAT", "paper": "arXiv 2405.15589", "citation": "@misc{x}"},
        base_model="base",
        training={"attack_epsilon": 0.3},
        attacks={"GCG": {"class": "GCG", "num_steps": 50}},
        not_run=["BEAST"],
        measurements=[
            Measurement.share("before", "exact", "harmful_held_out", "GCG", 0.5, 24, control=0.0),
            Measurement.share("after", "exact", "harmful_held_out", "GCG", 0.0, 24, control=0.0),
            Measurement.share("before", "utility", "harmless_utility", "none", 1.0, 140),
            Measurement.share("after", "utility", "harmless_utility", "none", 0.99, 140),
        ],
        costs={"seconds": 1.0},
        environment={"packages": {"torch": "2"}, "python": "3.11"},
    )


def test_wilson_interval_against_values_worked_out_by_hand():
    # 5 of 10, z = 1.96: centre (0.5 + 3.8415 / 20) / (1 + 0.38415) = 0.5; half width
    # 1.96 * sqrt(0.25 / 10 + 3.8415 / 400) / 1.38415 = 0.2634
    low, high = wilson_interval(5, 10)
    assert low == pytest.approx(0.5 - 0.2634, abs=1e-4) and high == pytest.approx(0.5 + 0.2634, abs=1e-4)
    # 0 of n: the lower end is 0, the upper end z^2 / (n + z^2)
    assert wilson_interval(0, 24) == pytest.approx((0.0, 3.8415 / (24 + 3.8415)), abs=1e-4)
    assert wilson_interval(24, 24)[1] == 1.0
    narrow, wide = wilson_interval(5, 10, 0.90), wilson_interval(5, 10, 0.99)
    assert wide[0] < low < narrow[0] < narrow[1] < high < wide[1]


def test_student_quantile_against_scipy():
    from scipy.stats import t

    for degrees in (1, 2, 5, 9, 10, 11, 12, 20, 50, 1000):
        assert student_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), abs=2e-4)
    with pytest.raises(ValueError, match="`degrees=0`"):
        student_quantile(0)


@pytest.mark.parametrize(
    ("arguments", "named"), [((1, 0), "count=0"), ((3, 2), "successes=3"), ((1, 2, 0.5), "confidence=0.5")]
)
def test_wilson_interval_refuses_what_has_no_interval(arguments, named):
    with pytest.raises(ValueError, match=named):
        wilson_interval(*arguments)


def test_report_round_trips_through_json(report, tmp_path):
    path = report.save(tmp_path / "deep" / "report.json")
    assert Report.load(path) == report
    assert not [p for p in path.parent.iterdir() if p.name.endswith(".draft")]


def test_report_of_another_schema_or_no_report_is_refused(report, tmp_path):
    path = report.save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99"):
        Report.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a report"):
        Report.load(path)


def test_everything_of_an_evaluation_round_trips_as_it_was(report, tmp_path):
    report.measurements.append(Measurement.scalar("after", "perplexity", "texts", "none", 12.5, 3, "perplexity"))
    report.flags = [Flag("truncated", "GCG", "2 of 24 were cut.", "Raise max_new_tokens."), Flag("x", None, "y", "z")]
    report.runs = [
        AttackSummary(
            name="GCG", settings={"num_steps": 50, "budget": None}, count=24, failures=1, forwards=100, backwards=10,
            seconds=1.5, mean_losses=[2.0, 1.0], success_by_budget=[(5, 0.25), (10, 0.5)], errors=["a: b"],
        )
    ]  # fmt: skip
    report.judge = {"name": "string", "settings": {}}
    loaded = Report.load(report.save(tmp_path / "report.json"))
    assert loaded == report and loaded.schema_version == 2
    assert loaded.runs[0].success_by_budget == [(5, 0.25), (10, 0.5)]
    assert (loaded.measurements[-1].unit, loaded.measurements[-1].low) == ("perplexity", None)
    assert loaded.measurements[0].unit == "share"


def test_a_report_of_schema_version_1_is_read(report, tmp_path):
    content = json.loads(report.save(tmp_path / "report.json").read_text())
    content["schema_version"] = 1
    for name in ("flags", "runs", "judge"):
        del content[name]
    for measurement in content["measurements"]:
        del measurement["unit"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert Report.load(tmp_path / "old.json") == report


@pytest.mark.parametrize("broken", [{"surprise": 1}, {"measurements": [{"value": 1}]}, {"runs": [{"name": "x"}]}])
def test_a_report_with_other_fields_is_refused(report, tmp_path, broken):
    content = json.loads(report.save(tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**content, **broken}))
    with pytest.raises(ValueError, match="not a report"):
        Report.load(tmp_path / "report.json")


def test_a_report_with_nan_is_not_written_over_a_good_one(report, tmp_path):
    path = report.save(tmp_path / "report.json")
    report.costs["seconds"] = float("nan")
    with pytest.raises(ValueError):
        report.save(path)
    assert Report.load(path).costs == {"seconds": 1.0}


def test_table_has_a_line_for_each_figure_and_a_column_for_each_model(report):
    lines = format_table(report).splitlines()
    assert lines[0].split() == ["prompts", "attack", "figure", "n", "before", "after"]
    assert len(lines) == 2 + 2
    assert "0.50 [0.31, 0.69] (control 0.00)" in lines[2] and "GCG" in lines[2] and " 24 " in lines[2]
    markdown = format_table(report, markdown=True, intervals=False).splitlines()
    assert markdown[1] == "|---|---|---|---|---|---|" and "| 1.00 | 0.99 |" in markdown[3]


def test_plot_is_a_picture_with_both_panels(report, tmp_path):
    path = plot_report(report, tmp_path / "plots" / "report.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5_000


def test_card_header_is_valid_and_every_claim_carries_its_attack(report):
    card = model_card(report, plot="report.png")
    _, header, body = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["library_name"] == "peft" and "hf_robust" in metadata["tags"]
    metrics = [m for result in metadata["model-index"][0]["results"] for m in result["metrics"]]
    # Only what was measured after training is a claim of the model
    assert [(m["type"], m["value"]) for m in metrics] == [("exact", 0.0), ("utility", 0.99)]
    assert metrics[0]["args"]["num_steps"] == 50 and metrics[0]["args"]["interval_95"][0] == 0.0
    assert "Not run: BEAST" in body and "](report.png)" in body and "@misc{x}" in body
