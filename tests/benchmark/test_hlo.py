"""The optimised HLO text: sizes in memory, lines, computations, where an operation was traced."""

import pytest

from masm_jax.benchmark import hlo


@pytest.mark.parametrize(
    "text, logical, stored, space",
    [
        # 8 channels in 128 lanes: 16 times the bytes.
        ("bf16[4,64,64,8]{3,2,1,0:T(8,128)(2,1)}", 4 * 64 * 64 * 8 * 2, 4 * 64 * 64 * 128 * 2, 0),
        # The batch in the lanes, 128 of it: nothing is padded.
        ("bf16[128,64,64,8]{0,3,2,1:T(8,128)(2,1)S(1)}", 2**22 * 2, 2**22 * 2, 1),
        ("bf16[4,64,64,24]{2,3,1,0:T(8,128)(2,1)}", 4 * 64 * 64 * 24 * 2, 4 * 64 * 128 * 24 * 2, 0),
        ("f32[130,100]{1,0:T(8,128)}", 130 * 100 * 4, 136 * 128 * 4, 0),
        ("f32[130,100]{0,1:T(8,128)}", 130 * 100 * 4, 256 * 104 * 4, 0),
        ("f32[2,3]{1,0:T(2,128)}", 24, 2 * 128 * 4, 0),
        ("u8[5,128]{1,0:T(32,128)(4,1)}", 640, 32 * 128, 0),
        ("bf16[3]{0:T(256)(128)(2,1)}", 6, 256 * 2, 0),
        ("s32[]{:T(128)S(6)}", 4, 512, 6),
        ("pred[7]{0:T(512)}", 7, 512, 0),
        ("s4[16]{0:T(128)E(4)}", 8, 64, 0),
        ("f32[4,5]", 80, 80, 0),
        ("f32[<=4,5]{1,0}", 80, 80, 0),
    ],
)
def test_size_of_an_array(text, logical, stored, space):
    (array,) = hlo.parse_arrays(text)
    assert (array.logical_bytes, array.bytes, array.space) == (logical, stored, space)


def test_leaves_of_a_nested_tuple_in_order():
    text = "((f32[3,96]{1,0:T(8,128)}), f32[1,96]{1,0:T(1,128)S(1)}, /*index=2*/s32[]{:S(2)})"
    assert [str(array) for array in hlo.parse_arrays(text)] == [
        "f32[3,96]{1,0}", "f32[1,96]{1,0}", "s32[]{}",
    ]  # fmt: skip


def test_lines_and_computations(program):
    module = hlo.parse(program)
    assert module.entry == "main" and module.partitions == 8
    assert list(module.computations) == [
        "add", "fused_convolution", "fused_stencil", "fused_row", "fused_update", "condition",
        "body", "small_branch", "large_branch", "main",
    ]  # fmt: skip
    main = module.computations["main"]
    loop, choice = main["while.1"], main["conditional.1"]
    assert loop.operands == ("start",) and loop.calls == ("condition", "body")
    assert len(loop.arrays) == 3 and loop.arrays[1].dims == (1024, 128)
    assert choice.operands == ("which", "stencil_fusion", "stencil_fusion")
    assert choice.calls == ("small_branch", "large_branch")
    assert main["zero.1"].literal == "0" and main["plane"].literal == "2"
    assert main["tuple.1"].root and not main["copy.1"].root
    assert main["convolution_fusion"].cycles == 1234 and main["copy.1"].cycles == 0
    assert main["all-reduce-start.1"].calls == ("add",)


def test_an_estimate_of_nobody_knows_is_none(program):
    """Of some exchanges over a mesh of two axes the compiler says 2^63 - 1 cycles."""
    unknown = program.replace('"estimated_cycles":"1234"', f'"estimated_cycles":"{2**63 - 1}"')
    assert hlo.parse(unknown).computations["main"]["convolution_fusion"].cycles == 0


def test_where_an_operation_was_traced(program):
    module = hlo.parse(program)
    main = module.computations["main"]
    assert [function for function, _ in module.stack(main["convolution_fusion"])] == [
        "train", "Encoder.__call__", "ConvNorm.__call__",
    ]  # fmt: skip
    assert module.stack(main["convolution_fusion"])[1][1].endswith("models/encoder.py:28")
    assert module.stack(main["copy.1"]) == ()


def test_quotes_in_the_name_of_an_operation():
    text = (
        "HloModule m\n\nENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0), "
        'metadata={op_name="state[\\\'params\\\'][\\"a\\"]"}\n}\n'
    )
    (parameter,) = hlo.parse(text).computations["main"].values()
    assert parameter.op_name == "state[\\'params\\'][\\\"a\\\"]"


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="expected HLO text with an ENTRY computation"):
        hlo.parse("module @jit_step {\n}\n")
