"""Whatever the rows: one step is finished, or an error says what is wrong with them."""

from typing import Any

import pytest
from hypothesis import given, reject

from tests.fuzzing.cases import PROFILE, SUBJECTS, Tally, as_dataset, quiet, run_case


@pytest.mark.parametrize("name", SUBJECTS)
def test_rows(name: str, record_property: Any):
    quiet()
    tally = Tally()

    @PROFILE
    @given(SUBJECTS[name].datasets())
    def check(columns: dict[str, dict[str, list[Any]]]) -> None:
        rows = {argument: as_dataset(drawn) for argument, drawn in columns.items()}
        if None in rows.values():
            reject()
        tally.add(run_case(name, rows=rows))

    check()
    record_property("fuzzing", dict(tally))
    assert tally["step"], "nothing but errors: the strategies draw no good rows any more"
    assert tally["refused"], "no errors: the strategies draw no bad rows any more"
