"""Schedules that several tests run on."""

from hypothesis import strategies as st

from tpmlp.pipeline.generators import SCHEDULES, make_schedule
from tpmlp.pipeline.schedule import Schedule

# p and m of the formulas; m is p, 2p and 4p.
SIZES = tuple((p, factor * p) for p in (2, 4, 8) for factor in (1, 2, 4))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Draw a published schedule of any size, small enough to be checked by hand."""
    name = draw(st.sampled_from(SCHEDULES))
    p = draw(st.integers(1, 5))
    if name == "interleaved":
        return make_schedule(name, p, p * draw(st.integers(1, 3)), draw(st.integers(2, 4)))
    return make_schedule(name, p, draw(st.integers(p if name.startswith("zb") else 1, 3 * p)))


# A table of one's own with something of everything: two stages, two microbatches, B and W apart.
MINE = "F0 F1 . . B0 B1 W0 W1\n. F0 F1 B0 B1 W0 W1 ."
