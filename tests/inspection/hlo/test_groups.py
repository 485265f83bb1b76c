"""Every form in which XLA prints groups of devices; a failure means that one is misread."""

import pytest

from tpmlp.inspection.hlo.groups import parse_groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("{{0,2},{2,0}}", ((0, 2), (2, 0))),
        ("{}, to_apply=%add", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0), to_apply=%add", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1), x={}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['data'=2,'x'=2,'y'=2] {'x'}, d={0}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['data'=2,'x'=2,'y'=2] {'data','y'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['data'=1,'x'=4,'y'=2] {'y'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['x'=8,'y'=1] {'x':(2)4}, d={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['x'=8,'y'=1] {'x':(1)2}, d={0}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}, d={0}", ((3, 1), (0, 2))),
    ],
)
def test_replica_groups_are_expanded_from_every_form(text, groups):
    assert parse_groups(text, num_devices=8) == groups


def test_replica_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match=r"replica_groups must be .*got 'ring"):
        parse_groups("ring(8)", num_devices=8)
