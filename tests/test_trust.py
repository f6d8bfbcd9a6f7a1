"""Nothing that is read may run: no pickles, no evaluation of text, in any module of the package."""

import ast
import pathlib
import re

import pytest

import masm_jax

PACKAGE = pathlib.Path(masm_jax.__file__).parent
# Writes a store as nnU-Net does, pickle and all, to time reading it; only files that it has written
# itself in the same call.
OWN_PICKLES = ("benchmark/loaders.py",)
# Python that the user names on the command line: configs, sweeps, descriptions that end in .py.
RUN_BY_NAME = ("config_file.py", "data/description.py")
RUNS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def trees():
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("*.py")]):
        name = path.relative_to(PACKAGE if PACKAGE in path.parents else PACKAGE.parent).as_posix()
        yield name, ast.parse(path.read_text())


def faults(name, tree):
    """What in a module may run something that was read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if MODULES & {one.split(".")[0] for one in names} and name not in OWN_PICKLES:
                yield f"{name}:{node.lineno}: imports {names}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in RUNS:
            yield f"{name}:{node.lineno}: {called}()"
        if called.endswith(("exec_module", "runpy.run_path")) and name not in RUN_BY_NAME:
            yield f"{name}:{node.lineno}: {called}()"
        if given.get("allow_pickle", "False") != "False":
            yield f"{name}:{node.lineno}: allow_pickle={given['allow_pickle']}"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"{name}:{node.lineno}: torch.load without weights_only=True"
        if called.endswith("yaml.load") or given.get("shell") == "True":
            yield f"{name}:{node.lineno}: {called}({given})"


def test_no_module_runs_what_it_reads():
    found = dict(trees())
    assert {"train.py", "eval.py", "data/records.py"} <= found.keys()
    assert [fault for name, tree in found.items() for fault in faults(name, tree)] == []


@pytest.mark.parametrize("text", [
    "import pickle", "from joblib import load", "eval(x)", "exec(x)",
    "np.load(p, allow_pickle=True)", "torch.load(p)", "torch.load(p, weights_only=False)",
    "spec.loader.exec_module(m)",
    "subprocess.run(x, shell=True)",
])  # fmt: skip
def test_the_check_can_fail(text):
    assert list(faults("a.py", ast.parse(text)))


# ---------------------------------------------------------------- dependencies


def pins(text):
    return dict(re.findall(r"^([A-Za-z0-9_-]+)==([^ \\\n;]+)", text.lower(), re.MULTILINE))


def test_the_lock_has_what_is_pinned_with_hashes():
    root = PACKAGE.parent
    asked = pins((root / "requirements.txt").read_text())
    text = (root / "requirements.lock").read_text()
    locked = pins(text)
    assert asked.items() <= locked.items(), "make lock"
    packages = re.findall(r"^[a-z0-9_-]+==.*(?:\n    .*)*", text, re.MULTILINE)
    assert len(packages) >= len(locked) > len(asked)  # one may differ by system
    assert all("--hash=sha256:" in package for package in packages)
