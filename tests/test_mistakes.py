"""What users mistype: a line with the value and the fix, the right exit code, and no traceback."""

import re

import pytest
from absl import flags

from masm_jax import (
    compare,
    config_file,
    diagnose,
    export,
    folds,
    phantom,
    predict,
    prepare,
    runtime,
    score,
    subsets,
    tune,
)
from masm_jax.benchmark.__main__ import main as benchmark
from masm_jax.data.records import Records
from masm_jax.sweep.__main__ import main as sweep_main
from tests.conftest import REPOSITORY
from tests.faults import runs

COMMANDS = {
    module.__name__.split(".")[-1]: module.main
    for module in (
        compare,
        diagnose,
        export,
        folds,
        phantom,
        predict,
        prepare,
        score,
        subsets,
        tune,
    )  # fmt: skip
} | {"sweep": sweep_main, "benchmark": benchmark}
BOTH = "--input=~/raw --output=~/out"  # "I/O" below


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """raw, records, run (without a checkpoint), and a file where a folder is wanted."""
    root = tmp_path_factory.mktemp("mistakes")
    runs.make(root)
    (root / "file").write_text("")
    (root / "empty").mkdir()
    return root


def said(capsys, name, line, root):
    """(exit code, what the command wrote, without the name of the folder)."""
    capsys.readouterr()
    try:
        code = COMMANDS[name](line.replace("I/O", BOTH).replace("~", str(root)).split())
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.err.replace(str(root), "~")


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("prepare", "--inptu=~/raw --output=~/o", "--inptu: no such argument (did you mean"),
        ("prepare", "--input=~/raw", "required: --output"),
        ("prepare", "I/O --spacing=100", "--spacing=100: expected 0.1 to 10 mm"),
        ("prepare", "I/O --spacing=two", "spacing=two: expected a positive float"),
        ("prepare", "I/O --workers=0", "--workers=0: expected a positive int"),
        ("prepare", "I/O --labels=brats2022", "brats2022: expected one of"),
        ("prepare", "~/raw ~/out", "required: --input, --output"),
        ("predict", "--workdri=~/run I/O", "(did you mean --workdir?)"),
        ("predict", "I/O", "one of the arguments --workdir --from_export"),
        ("predict", "--workdir=~/run --output=~/out", "expected --input, or --t1"),
        ("predict", "--workdir=~/run I/O --proba", "--proba: no such argument"),
        ("predict", "--workdir=~/run I/O --checkpoint=bst", "(did you mean best?)"),
        ("tune", "--workdir=~/run --flip", "(did you mean --flips?)"),
        ("tune", "", "required: --workdir"),
        ("folds", "~/run --outptu=~/out", "(did you mean --output?)"),
        ("export", "--workdir=~/run --output=~/o --batch=x", "--batch=x: expected a whole number"),
        ("compare", "~/run ~/run --output=~/out --metric=dice", "(did you mean --metrics?)"),
        ("score", "~/raw --reference=~/raw --outptu=~/o", "(did you mean --output?)"),
        ("sweep", "--config=x.py --workdir=~/out --dryrun", "(did you mean --dry_run?)"),
        ("diagnose", "~/run --split=vla", "--split=vla: expected one of val, test, train, all"),
        ("subsets", "--workdir=~/run --output=~/o --cases=x", "--cases=x: expected a whole number"),
        ("phantom", "--output=~/out --case=1", "--case: no such argument (did you mean --cases?)"),
        ("phantom", "--output=~/out --cases=0", "--cases=0: expected 1 to 100000"),
        ("benchmark", "flop", "flop: expected one of tpu, plots, flops"),
        ("benchmark", "flops --netwroks=x", "(did you mean --networks?)"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(name, line, words, places, capsys):
    code, text = said(capsys, name, line, places)
    assert code == 2 and words in text, text
    assert text.count("\n") == 1 and f"masm_jax.{name}" in text and "--help" in text


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("prepare", "--input=~/records --output=~/out", "~/records: no .nii or .nii.gz below it"),
        ("prepare", "--input=~/empty --output=~/out", "~/empty: no .nii or .nii.gz below it"),
        ("prepare", "--input=~/absent --output=~/out", "~/absent: does not exist"),
        ("prepare", "--input=~/raw --output=~/run", "--output=~/run is a run of train.py"),
        ("prepare", "--input=~/raw --output=~/file", "~/file is a file; name a folder"),
        ("predict", "--workdir=~/run I/O", "holds no complete checkpoint"),
        ("predict", "--workdir=~/records I/O", "--workdir must be a folder"),
        ("predict", "--workdir=~/run --input=~/raw --output=~/file/a", "~/file is a file"),
        ("predict", "--from_export=~/run I/O", "export.json does not exist"),
        ("tune", "--workdir=~/raw", "--workdir must be a folder that train.py has written"),
        ("folds", "~/run --output=~/out", "first: python eval.py --workdir=~/run"),
        ("export", "--workdir=~/run --output=~/raw", "expected an empty folder or an older export"),
        ("export", "--workdir=~/run --output=~/out --platforms=gpu", "'gpu' is none; expected"),
        ("compare", "~/run ~/run --output=~/out", "no metrics.csv in it"),
        ("sweep", "--config=configs/masm_demo.py --workdir=~/out", "has no function get_sweep()"),
        ("diagnose", "~/records", "--workdir must be a folder that train.py has written"),
        ("subsets", "--workdir=~/absent --output=~/out", "~/absent/config.json does not exist"),
        ("benchmark", "input --records=~/raw", "these are scans"),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_named(name, line, words, places, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    code, text = said(capsys, name, line, places)
    assert code == 1 and words in text, text
    assert text.count("\n") == 1 and not (places / "out").exists()


def test_a_misspelt_key_is_said_without_the_config():
    for given, words in (
        ("total_step=5", "did you mean total_steps"),
        ("model.szie=full", "did you mean size"),
        ("optim.learning_rate=fast", "learning_rate"),
    ):
        with pytest.raises(ValueError) as error:
            config_file.load_config(REPOSITORY / "configs/masm_demo.py", [given])
        text = str(error.value)
        assert words in text.lower() and given.split("=")[0] in text and len(text) < 200, text


def test_a_loader_that_is_not_there(places, capsys):
    """As tests.faults.runs calls eval.py: an error becomes what its main() makes of it."""
    assert runs.evaluate(places, places / "evaluated", ["--loader=no.module"]) == 1
    assert "--loader=no.module: No module named 'no'; expected" in capsys.readouterr().err


def test_scans_where_records_are_wanted(places):
    with pytest.raises(ValueError, match=r"these are scans.*prepare --input=\S*raw --output=REC"):
        Records(places / "raw")


def test_a_config_that_is_not_there(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    said = runtime._no_config(["train.py", "--config=configs/masm_dmo.py"])
    assert "configs/masm_dmo.py: no such file (did you mean configs/masm_demo.py?)" in said
    assert runtime._no_config(["train.py", "--config=configs/masm_demo.py"]) == ""


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("workdir", [], "train.py: --workdir is missing"),
        ("steps", ["--workdir=a", "--steps=five"], "train.py: flag --steps=five: expected a whole"),
        ("rate", ["--workdir=a", "--rate=fast"], "train.py: flag --rate=fast: expected a number"),
        ("workdri", ["--workdri=a"], "train.py: Unknown command line flag"),
    ],
)  # fmt: skip
def test_flags_of_train_and_eval(name, words, message, monkeypatch, capsys):
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_integer("steps", 1, "", flag_values=values)
    flags.DEFINE_float("rate", 1.0, "", flag_values=values)
    flags.mark_flag_as_required("workdir", values)
    monkeypatch.setattr(runtime.flags, "FLAGS", values)
    with pytest.raises(SystemExit) as stop:
        runtime.parse_flags(["train.py", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(message) and said.count("\n") == 1, said


def test_train_in_a_file_or_with_a_broken_config(command, places):
    (places / "broken.py").write_text("def get_config(:\n")
    config, file = f"--config={places / 'broken.py'}", f"--workdir={places / 'file'}"
    said = command("train.py", config, file, code=2).stderr
    assert "cannot be run: SyntaxError: invalid syntax (broken.py, line 1)" in said
    said = command("train.py", "--config=configs/masm_demo.py", file, code=1).stderr
    assert f"{file}: {places / 'file'} is a file; name a folder" in said
    assert "Traceback" not in said and said.strip().count("\n") == 0


# ---------------------------------------------------------------- docs/troubleshooting.md


def literals():
    """The code file by file; neighbouring pieces of text, f or not, put together."""
    files = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "masm_jax").rglob("*.py")]
    files.append(REPOSITORY / "Makefile")
    return [normal(re.sub(r'"\s*\n\s*f?"', "", file.read_text())) for file in files]


def normal(text):
    """What is filled in, and what a user has in its place, as one sign."""
    text = re.sub(r"\{[^{}]*\}|\.\.\.|%[\d.]*[sdfge]", "@", text)
    text = re.sub(r"@( @)+", "@", text)
    return " ".join(text.split())


def messages():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    table = page.split("## Messages", 1)[1]
    return re.findall(r"^\| [a-z]+ \| `([^`]+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_every_quoted_message_is_in_the_code(message):
    assert any(normal(message) in text for text in literals())


def test_the_page_cannot_rot():
    assert len(messages()) >= 20
    assert not any(normal("it does not look skull-striped") in text for text in literals())
