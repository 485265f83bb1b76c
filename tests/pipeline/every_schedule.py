"""Every schedule on every mesh of at most 8 devices, and every two other choices together.

What tests/pipeline/test_executor.py and test_cost.py claim of a few cases; `make test-all` runs
this. A row that fails here alone needs three values or more to meet.
"""

import pytest

from tests.pairwise import Value, covering
from tests.pipeline.test_cost import check_bytes
from tests.pipeline.test_executor import Case, check_step
from tpmlp.pipeline.generators import SCHEDULES

# (data, stage, x, y): all of 8 devices, and some of 2 to 7.
SIZES = (
    *((1, 2, 4, 1), (1, 2, 1, 4), (1, 2, 2, 2), (2, 2, 2, 1), (2, 2, 1, 2), (4, 2, 1, 1)),
    *((1, 4, 2, 1), (1, 4, 1, 2), (2, 4, 1, 1), (1, 8, 1, 1)),
    *((1, 2, 1, 1), (1, 3, 1, 1), (2, 3, 1, 1), (1, 3, 1, 2), (1, 2, 3, 1), (3, 2, 1, 1)),
    *((1, 5, 1, 1), (1, 6, 1, 1), (1, 7, 1, 1)),
)
FIELDS = {
    "sizes": SIZES,
    "schedule": SCHEDULES,
    "rounds": (1, 2, 3),
    "more_layers": (0, 1, 2, 5),
    "layout": ("auto", "column", "row", "alternate"),
    "keep": (("shard", None), ("gathered", None), ("recompute", None), ("recompute", 2)),
    "shard_weights": (False, True),
    "loss": ("cross_entropy", "mse", "logistic", "output"),
    "bias": (True, False),
}


def compatible(a: Value, b: Value) -> bool:
    """Return whether two choices may meet: words that do not alternate need one tensor axis."""
    values = dict((a, b))
    if "sizes" not in values:
        return True
    data, _, x, y = values["sizes"]
    if values.get("layout") in ("column", "row") and min(x, y) > 1:
        return False
    return not (values.get("shard_weights") and data == 1)


def case_of(row: dict) -> Case:
    """Return a case: as many rounds of microbatches as there are stages, some layers to spare."""
    stage, schedule = row["sizes"][1], row["schedule"]
    chunks = {"interleaved": 2}.get(schedule, 1)
    virtual = stage * (2 if schedule == "zb-v" else chunks)
    keep, keep_every = row["keep"]
    return Case(
        sizes=row["sizes"],
        schedule=schedule,
        microbatches=stage * row["rounds"],
        num_layers=max(2, virtual) + row["more_layers"],
        chunks=chunks,
        layout=row["layout"],
        bias=row["bias"],
        loss=row["loss"],
        keep=keep,
        keep_every=keep_every,
        shard_weights=row["shard_weights"],
    )


CASES = [case_of(row) for row in covering(FIELDS, compatible)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_reference_and_moves_what_is_predicted(case):
    check_step(case)
    check_bytes(case)
