"""Many cases, and what became of them: `python -m tests.fuzzing.run --cases 500 --only cat --kind rows`."""

import argparse
import os
import time
import traceback
from collections import Counter
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"})

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

from tests.fuzzing.cases import SUBJECTS, Defect, Tally, as_dataset, quiet, run_case  # noqa: E402

_ALL = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def _signature(error: Defect) -> str:
    """What makes two defects one: the deepest frames that raised them."""
    cause = error.__cause__
    frames = traceback.extract_tb(cause.__traceback__)[-2:] if cause is not None else []
    return " < ".join(
        f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}" for frame in reversed(frames)
    ) or str(error)


def _sweep(name: str, kind: str, cases: int, start: int, seconds: float) -> Tally:
    """Draw and run; a defect is printed when it is first seen, and how often it was seen at the end."""
    tally, seen = Tally(), Counter[str]()
    strategy = SUBJECTS[name].datasets() if kind == "rows" else SUBJECTS[name].configs()
    end = time.monotonic() + seconds

    @seed(start)
    @settings(_ALL, max_examples=cases)
    @given(strategy)
    def sweep(drawn: dict[str, Any]) -> None:
        if time.monotonic() > end:
            return
        try:
            if kind == "rows":
                rows = {key: as_dataset(columns) for key, columns in drawn.items()}
                outcome = "no dataset" if None in rows.values() else run_case(name, rows=rows)
            else:
                outcome = run_case(name, config=drawn)
            tally.add(outcome)
        except Defect as error:
            tally["defect"] += 1
            signature = _signature(error)
            seen[signature] += 1
            if seen[signature] == 1:
                print(f"  {signature}\n    {error}\n    drawn: {str(drawn)[:400]}", flush=True)

    sweep()
    for signature, count in seen.items():
        print(f"  {count} x {signature}")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="of each trainer and kind")
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--kind", nargs="*", default=["rows", "configs"], choices=["rows", "configs"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each trainer and kind, at most")
    args = parser.parse_args()
    quiet()
    total = Tally()
    for kind in args.kind:
        for name in args.only:
            tally = _sweep(name, kind, args.cases, args.seed, args.seconds)
            total.update(tally)
            print(f"{kind:8}{name:10}{tally}", flush=True)
    print(f"{'all':18}{total}", flush=True)


if __name__ == "__main__":
    main()
