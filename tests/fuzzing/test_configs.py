"""Whatever the configuration: one step is finished, or an error says which field is wrong."""

from typing import Any

import pytest
from hypothesis import given

from tests.fuzzing.cases import PROFILE, SUBJECTS, Tally, quiet, run_case


@pytest.mark.parametrize("name", SUBJECTS)
def test_configs(name: str, record_property: Any):
    quiet()
    tally = Tally()

    @PROFILE
    @given(SUBJECTS[name].configs())
    def check(values: dict[str, Any]) -> None:
        tally.add(run_case(name, config=values))

    check()
    record_property("fuzzing", dict(tally))
    assert tally["step"], "nothing but errors: the strategies draw no good values any more"
    assert tally["refused"], "no errors: the strategies draw no bad values any more"
