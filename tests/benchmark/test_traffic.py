"""Bytes that a program moves, worked out by hand from program.hlo."""

import pytest

from masm_jax.benchmark import hlo, traffic

CONV = 16 * 16 * 8 * 128 * 2  # bf16[64,16,16,8], 64 of the batch padded to 128 lanes
COPIED = 64 * 16 * 16 * 128 * 2  # the same, 8 channels padded to 128 lanes
KERNEL = 3 * 3 * 8 * 128 * 2
PLANE, SQUARE, ROWS = 136 * 128 * 4, 128 * 128 * 4, 8 * 128 * 4


@pytest.fixture(scope="module")
def counted(program):
    return traffic.count(hlo.parse(program))


def named(counted, name):
    (move,) = [move for move in counted.moves if move.name == name]
    return move


def test_a_fusion_reads_its_operands_and_not_what_is_inside(counted):
    move = named(counted, "convolution_fusion")
    assert (move.kind, move.read, move.written) == ("convolution", CONV, CONV)
    assert move.padding == CONV  # half of each
    assert move.onchip == KERNEL  # from on-chip memory, where copy-start put it
    assert move.cycles == 1234


def test_a_prefetch_is_read_once(counted):
    move = named(counted, "copy-start")
    assert (move.kind, move.read, move.written, move.onchip) == ("prefetch", KERNEL, 0, KERNEL)
    assert "copy-done" not in {move.name for move in counted.moves}


def test_a_copy_into_a_padded_layout(counted):
    move = named(counted, "copy.1")
    logical = 64 * 16 * 16 * 8 * 2
    assert (move.kind, move.read, move.written) == ("layout", CONV, COPIED)
    assert move.padding == CONV + COPIED - 2 * logical


def test_slices_inside_a_fusion(counted):
    whole = named(counted, "stencil_fusion")  # two slices that take more than the operand
    assert (whole.read, whole.written) == (PLANE, SQUARE)
    part = named(counted, "row_fusion")  # one that takes 8 rows of 1024
    assert (part.read, part.written) == (ROWS, ROWS)


def test_a_loop_counts_as_often_as_it_runs_and_writes_in_place(counted):
    assert [loop.trips for loop in counted.loops] == [5]
    move = named(counted, "update_fusion")
    assert (move.trips, move.written) == (5, 5 * ROWS)
    assert move.read == 5 * (ROWS + 128 * 4)  # the rows and the index


def test_a_loop_of_unknown_length_counts_once(program):
    unknown = program.replace("direction=LT", "direction=NE")
    counted = traffic.count(hlo.parse(unknown))
    assert [loop.trips for loop in counted.loops] == [0]
    assert named(counted, "update_fusion").written == ROWS


def test_of_a_conditional_the_larger_branch(counted):
    assert counted.conditionals == 1
    move = named(counted, "negate.2")
    assert (move.read, move.written, move.kind) == (SQUARE, SQUARE, "elementwise")


def test_collectives_once_by_their_payload(counted):
    reduced, permuted = counted.collectives  # both on channel 1
    assert (reduced.kind, reduced.bytes, reduced.group) == ("all-reduce", (100 + 4) * 4, 8)
    assert (permuted.kind, permuted.bytes) == ("collective-permute", SQUARE)
    move = named(counted, "collective-permute-start.1")
    assert (move.kind, move.read, move.written) == ("collective", SQUARE, SQUARE)


@pytest.mark.parametrize(
    "written, size",
    [
        ("replica_groups={{0,1,2},{3,4,5}}, use_global_device_ids=true", 3),
        ("replica_groups=[4,2]<=[8], to_apply=%add", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add", 4),
        ("replica_groups=mesh['axis_0'=16] {'axis_0'}, to_apply=%add", 16),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}, to_apply=%add", 2),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}, to_apply=%add", 4),
        ("replica_groups={}, to_apply=%add", 32),
    ],
)
def test_size_of_a_group(written, size):
    assert traffic._group(f", channel_id=1, {written}", 32) == size


def test_flops_of_a_convolution_leave_out_padding(counted):
    # Along one axis of 16: 14 places see three taps, two see two.
    along = 14 * 3 + 2 * 2
    assert named(counted, "convolution_fusion").flops == 2 * 64 * along * along * 8 * 8


@pytest.mark.parametrize(
    "window, shapes, labels, expected",
    [
        # A matrix product: 5 x 7 times 7 x 3.
        ("", ("5,7", "7,3", "5,3"), "bf_io->bf", 2 * 5 * 7 * 3),
        # Stride 2, kernel 2: every tap meets the input.
        ("size=2 stride=2", ("4,8,3", "2,3,6", "4,4,6"), "b0f_0io->b0f", 2 * 4 * 4 * 2 * 3 * 6),
        # Its gradient: the input is dilated, half of the taps meet a hole. Output 8, 4 inputs x 2.
        (
            "size=2 pad=1_1 lhs_dilate=2", ("4,4,6", "2,6,3", "4,8,3"), "b0f_0io->b0f",
            2 * 4 * (4 * 2) * 6 * 3,
        ),
    ],
)  # fmt: skip
def test_flops_of_other_convolutions(window, shapes, labels, expected):
    left, kernel, result = shapes
    text = (
        "HloModule m\n\nENTRY %main (a: f32[1]) -> f32[1] {\n"
        f"  %a = f32[{left}] parameter(0)\n  %b = f32[{kernel}] parameter(1)\n"
        f"  ROOT %c = f32[{result}] convolution(%a, %b), window={{{window}}}, "
        f"dim_labels={labels}\n}}\n"
    )
    (move,) = traffic.count(hlo.parse(text)).moves
    assert move.flops == expected


def test_places(counted):
    place = named(counted, "convolution_fusion").place
    assert str(place) == "encoder level 1 ConvNorm backward" and place.line == "layers.py:131"
    # The compiler's own copies are booked on who uses them, or on whose result they move.
    assert str(named(counted, "copy-start").place) == str(place)
    assert str(named(counted, "copy.1").place) == str(place)
    assert str(named(counted, "row_fusion").place) == "unknown"
