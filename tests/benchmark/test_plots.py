"""Pictures show the numbers of the reports."""

import json

import pytest

from masm_jax.benchmark import plots
from masm_jax.benchmark.__main__ import main


def test_bars_add_up_to_the_bytes_of_a_crop(found):
    axes = plots.kinds({"a": found, "b": found}).axes[0]
    widths = sum(bar.get_width() for bar in axes.patches)
    each = found["traffic"]["bytes"] / found["run"]["batch_per_chip"] / 1e9
    assert widths == pytest.approx(2 * each)


def test_lines_are_the_predicted_efficiency(found):
    axes = plots.scaling({"a": found}).axes[0]
    apart = axes.lines[0].get_ydata()
    assert list(apart) == [100 * row["efficiency"] for row in found["scaling"]]


def test_command_writes_every_picture_twice(tmp_path, found):
    (tmp_path / "one.json").write_text(json.dumps(found))
    (tmp_path / "two.json").write_text(json.dumps(found))
    files = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    assert main(["plots", *files, f"--output={tmp_path / 'drawn'}"]) == 0
    drawn = {file.name for file in (tmp_path / "drawn").iterdir()}
    stems = ("bytes", "scaling", "movers_one", "movers_two")
    assert drawn == {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert all(file.stat().st_size > 2000 for file in (tmp_path / "drawn").iterdir())


def test_files_of_one_name_are_refused(tmp_path, found, capsys):
    files = [tmp_path / folder / "one.json" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps(found))
    assert main(["plots", *map(str, files), f"--output={tmp_path / 'drawn'}"]) == 1
    assert "expected files of different names" in capsys.readouterr().err


def test_a_file_with_nothing_to_draw(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"compiled": {"fits": False}}))
    assert main(["plots", str(tmp_path / "a.json"), f"--output={tmp_path}"]) == 1
    assert "its step did not fit into memory" in capsys.readouterr().err


@pytest.mark.parametrize("content, said", [('{"a', "is damaged"), ("[1]", "holds a list")])
def test_a_file_that_is_not_of_it_is_named(tmp_path, capsys, content, said):
    (tmp_path / "a.json").write_text(content)
    assert main(["plots", str(tmp_path / "a.json"), f"--output={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.json" in line and said in line and "benchmark tpu --json" in line
