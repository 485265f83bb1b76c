"""Seconds of products and collectives, by hand; a failure means that a plan ranks by wrong ones."""

import json
from dataclasses import replace

import pytest

from tpmlp.planner.chips import CHIPS, H100_COLLECTIVES
from tpmlp.planner.hardware import Hardware, Level, Span, get_hardware

NODE = Level(name="node", devices=4, bytes_per_s=100.0, latency_s=0.5)
BETWEEN = Level(name="between", devices=None, bytes_per_s=10.0, latency_s=2.0)
MINE = Hardware(
    name="mine",
    platform="gpu",
    flops_per_s={"float32": 1000.0},
    memory_bytes=1e6,
    memory_bytes_per_s=1e6,
    products=((10.0, 0.25), (1000.0, 0.75)),
    levels=(NODE, BETWEEN),
)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_chip_says_where_its_numbers_are_from_and_what_is_assumed(chip):
    assert len(chip.sources) >= 2
    assert any(source.startswith("assumed") for source in chip.sources)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_larger_products_take_longer_at_a_rate_that_is_no_lower(chip):
    sides = [2**i for i in range(4, 15)]
    seconds = [chip.product_s(side, side, side, "bfloat16") for side in sides]
    assert seconds == sorted(seconds)
    rates = [2 * side**3 / s for side, s in zip(sides, seconds, strict=True)]
    assert rates == pytest.approx(sorted(rates))
    assert max(rates) <= chip.flops_per_s["bfloat16"]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
def test_more_bytes_and_more_nodes_take_longer(chip, kind):
    by_size = [chip.collective_s(kind, 2**i, Span(4, 1, 4)) for i in range(20, 33)]
    assert by_size == sorted(by_size)
    far = chip.levels[0].devices or 1
    assert chip.collective_s(kind, 2**28, Span(4, far, 4 * far)) > by_size[8]


def test_h100_reaches_what_was_measured():
    h100 = get_hardware("h100")
    for side, tflops in ((1024, 253), (2048, 641), (4096, 780)):
        rate = 2 * side**3 / h100.product_s(side, side, side, "bfloat16")
        assert rate / 1e12 == pytest.approx(tflops, rel=2e-3)
    for rows, tflops in ((256, 418), (1024, 752)):
        rate = 2 * rows * 4096**2 / h100.product_s(4096, rows, 4096, "bfloat16")
        assert rate / 1e12 == pytest.approx(tflops, rel=2e-3)
    for kind, groups in H100_COLLECTIVES.items():
        for size, curve in groups.items():
            for num_bytes, seconds in curve:
                predicted = h100.collective_s(kind, num_bytes, Span(size, 1, size))
                assert predicted == pytest.approx(seconds)


def test_a_group_of_another_size_takes_what_the_nearest_does_for_the_bytes_it_receives():
    h100 = get_hardware("h100")
    # 7/8 of V received by each of 8 is 3/4 of 7/6 V received by each of 4.
    of_8 = h100.collective_s("all_gather", 6e8, Span(8, 1, 8))
    assert of_8 == pytest.approx(h100.collective_s("all_gather", 7e8, Span(4, 1, 8)))


def test_shares_of_the_peak_are_interpolated_by_the_logarithm_of_the_side():
    # 100 is half way from 10 to 1000: half of the peak.
    assert MINE.product_s(100, 100, 100, "float32") == pytest.approx(2e6 / 500)
    assert MINE.product_s(5, 5, 5, "float32") == pytest.approx(250 / 125)
    assert MINE.product_s(2000, 2000, 2000, "float32") == pytest.approx(16e9 / 750)


def test_a_thin_product_takes_what_its_bytes_take():
    slow = replace(MINE, memory_bytes_per_s=10.0)
    assert slow.product_s(100, 1, 100, "float32") == pytest.approx((100 + 10000 + 100) * 4 / 10)


def test_a_collective_inside_a_node_is_a_ring():
    # Three steps of 0.5 s, and 3/4 of 400 bytes at 100 bytes a second; twice that for all-reduce.
    assert MINE.collective_s("all_gather", 400.0, Span(4, 1, 8)) == 1.5 + 3.0
    assert MINE.collective_s("all_reduce", 400.0, Span(4, 1, 8)) == 2 * (1.5 + 3.0)


def test_a_collective_over_nodes_does_a_part_on_each_level():
    # 800 bytes over 2 in a node and 4 nodes, as neighbours are 2 apart: 400 between the nodes.
    inside, between = 0.5 + 400 / 100, 3 * 2.0 + 300 / 10
    assert MINE.collective_s("all_gather", 800.0, Span(8, 2, 16)) == inside + between


def test_bytes_received_on_all_levels_are_those_of_one_ring():
    free = {"latency_s": 0.0, "bytes_per_s": 1.0}
    flat = replace(MINE, levels=(replace(NODE, **free), replace(BETWEEN, **free)))
    for size, stride in ((8, 1), (8, 2), (12, 1), (6, 4), (16, 2)):
        received = 960.0 * (size - 1) / size
        assert flat.collective_s("all_gather", 960.0, Span(size, stride, 48)) == pytest.approx(
            received
        )


@pytest.mark.parametrize(
    ("span", "parts"),
    [
        (Span(8, 1, 8), [("node", 4), ("between", 2)]),
        (Span(6, 1, 6), [("node", 2), ("between", 3)]),
        # Three in a node are neighbours; of six, the second three are in two nodes.
        (Span(3, 1, 3), [("node", 3)]),
        (Span(3, 1, 6), [("between", 3)]),
        (Span(2, 4, 8), [("between", 2)]),
        (Span(1, 1, 8), []),
    ],
)
def test_what_a_node_does_not_divide_is_between_nodes(span, parts):
    assert [(level.name, there) for level, there in MINE.groups(span)] == parts


def test_messages_take_what_the_slowest_of_them_does():
    assert MINE.message_s(100.0, Span(4, 1, 8)) == 0.5 + 1.0
    assert MINE.message_s(100.0, Span(8, 1, 8)) == 2.0 + 10.0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_what_a_file_says_is_what_was_written(chip, tmp_path):
    chip.to_json(tmp_path / "chip.json")
    again = Hardware.from_json(tmp_path / "chip.json")
    given = ("all_gather", 3e8, Span(8, 1, 64))
    assert again.collective_s(*given) == chip.collective_s(*given)
    again.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "chip.json").read_text()


@pytest.mark.parametrize("said", [{}, {"levels": []}, {"levels": [{"name": "x"}]}, [1]])
def test_a_file_of_something_else_is_refused(said, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"path must be of a file|levels must end"):
        Hardware.from_json(path)


def test_names_are_found_in_any_case_and_without_the_maker():
    assert get_hardware("H100") is get_hardware("h100")
    assert get_hardware("v5p") is get_hardware("TPU-v5p")
    assert get_hardware(MINE) is MINE


@pytest.mark.parametrize(
    ("name", "near"), [("h10", "'h100' or"), ("tpu-v6", "'tpu-v6e'"), ("v5", "'v5"), (8, "Descr")]
)
def test_an_unknown_chip_is_refused_with_the_nearest_names(name, near):
    with pytest.raises(
        ValueError, match=rf"hardware must be one of.*got hardware={name!r}.*{near}"
    ):
        get_hardware(name)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"memory_bytes": 0}, "memory_bytes must be a positive number: got memory_bytes=0"),
        ({"memory_bytes_per_s": -1.0}, "memory_bytes_per_s=-1.0"),
        ({"platform": "npu"}, "platform must be one of.*'npu'"),
        ({"flops_per_s": {}}, "flops_per_s must be"),
        ({"flops_per_s": {"int8": 1.0}}, "flops_per_s must be.*int8"),
        ({"flops_per_s": {"float32": float("nan")}}, r"flops_per_s\['float32'\].*nan"),
        ({"products": ((10.0, 0.5), (5.0, 0.6))}, "products must be rows"),
        ({"products": ((10.0, 1.5),)}, "products must be rows"),
        ({"levels": ()}, "levels must end"),
        ({"levels": (NODE,)}, "levels must end"),
        ({"levels": (NODE, replace(NODE, devices=6), BETWEEN)}, "levels must each join a multiple"),
    ],
)
def test_numbers_that_describe_no_hardware_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(MINE, **wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"bytes_per_s": 0.0}, "bytes_per_s=0.0"),
        ({"latency_s": -1.0}, "latency_s must be.*-1.0"),
        ({"devices": 0}, "devices=0"),
        ({"measured": {"gather": {2: ((1, 1), (2, 2))}}}, "measured must have kinds.*'gather'"),
        ({"measured": {"all_gather": {2: ((2, 1), (1, 2))}}}, "measured must have two rows"),
        ({"measured": {"all_gather": {1: ((1, 1), (2, 2))}}}, "measured must have two rows"),
    ],
)
def test_numbers_that_describe_no_links_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(NODE, **wrong)


def test_a_type_that_a_chip_does_not_compute_in_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one that tpu-v5e computes in.*float64"):
        get_hardware("v5e").product_s(8, 8, 8, "float64")
