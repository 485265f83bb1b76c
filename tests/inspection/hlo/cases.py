"""Programs written out as HLO text."""

from tpmlp.inspection.hlo.collectives import collectives
from tpmlp.inspection.hlo.text import parse_module

PAIRS = "{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"


def module(*lines, before=""):
    """Return a program of these lines on 8 devices, and of the computations in `before`."""
    entry = "\n".join(f"  {line}" for line in lines)
    head = "HloModule jit_step, is_scheduled=true, num_partitions=8"
    text = f"{head}\n\n{before}\nENTRY %main (p: f32[2,8]) -> f32[2,8] {{\n{entry}\n}}\n"
    return parse_module(text)


def communicating(*lines, before=""):
    """Return the collectives of such a program."""
    return collectives(module(*lines, before=before))
