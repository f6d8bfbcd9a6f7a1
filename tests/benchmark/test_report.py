"""The numbers of a report add up, and its words say them."""

import pytest

from masm_jax.benchmark import report

SAID = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (23.30G) exceeds available HBM (15.75G). HLO module: jit_step."
)


def test_groups_add_up(found):
    traffic = found["traffic"]
    assert traffic["bytes"] == traffic["read"] + traffic["written"] > 0
    for key in ("by_kind", "by_part", "by_place"):
        rows = traffic[key].values()
        for name in ("bytes", "padding", "cycles"):
            assert sum(row[name] for row in rows) == traffic[name], (key, name)
    sizes = [mover["bytes"] for mover in traffic["movers"]]
    assert len(sizes) == 5 and sizes == sorted(sizes, reverse=True)
    assert traffic["movers"][0]["padding_factor"] > 1


def test_bounds_come_from_the_counts(found):
    bounds, chip = found["roofline"], found["chip"]
    assert found["flops"] == 2e12  # the compiler's count, larger than the convolutions alone
    assert bounds["compute"] == pytest.approx(2e12 / chip["peak_flops"])
    assert bounds["memory"] == pytest.approx(found["traffic"]["bytes"] / chip["hbm_bandwidth"])
    assert bounds["bound"] == "compute"
    # 416 bytes are summed over all eight chips; neighbours' planes do not grow with the pod.
    assert found["all_reduced_bytes"] == 416
    permute = found["collectives"]["collective-permute"]
    assert (permute["count"], permute["bytes"]) == (1, 128 * 128 * 4)


def test_words(found):
    text = report.words(found, movers=3)
    for said in (
        "2.5 M parameters",
        "4 crops of 256x256x160 per step, volumes cut over 2 chips",
        "Compiled, not run",
        "8.000  of 16.9 that a program may have: 47%",
        "1 loops: 1 counted as often as they run, 0 once; 1 conditionals",
        "all-reduce, 1 of them, among 8 chips",
        "<- bounds the step",
        "16 x 16x16",
    ):
        assert said in text, text


def test_words_of_a_reused_compilation(found):
    again = found | {"compiled": found["compiled"] | {"reused": "/some/where.json.gz"}}
    assert "reused from /some/where.json.gz" in report.words(again, movers=1)


def test_words_where_it_does_not_fit(found):
    text = report.misfit(found | {"compiled": {"fits": False, "message": SAID}})
    assert "it needs 23.30GiB, 15.75GiB are there" in text
    assert "--set accumulate=N" in text


def test_words_where_it_does_not_fit_and_says_so_otherwise(found):
    text = report.misfit(found | {"compiled": {"fits": False, "message": "too much, somehow"}})
    assert "does not fit: too much, somehow" in text
