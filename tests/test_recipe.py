"""Recipes: the command line's words in TOML; every mistake a sentence, and no Python before it is allowed."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import pytest

import penjing
from penjing import cli
from penjing.ir.errors import PenjingError
from penjing.recipe import MOST_BYTES, keys, read_recipe
from penjing.runtime.functions import code_files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
TEXT = "m (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1,2,3,4}> { h = Relu (x) y = MatMul (h, w) }"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run ``penjing run`` with arguments; gives exit code and standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(["run", *map(str, arguments)])
        return int(caught.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def folder(tmp_path: Path, parse: Callable[[str], ir.Model], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and Python, apart from the current one."""
    found = tmp_path / "recipes"
    (found / "sub").mkdir(parents=True)
    penjing.save(parse(TEXT), found / "sub" / "m.onnx")
    np.savez(found / "x.npz", x=np.ones((4, 2), np.float32))
    marker = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (found / "code.py").write_text(
        f"{marker}import numpy\ndef score(session): return 1.0\ndef feeds(): yield {{'x': numpy.ones((1, 2), 'f')}}\n"
    )
    here = tmp_path / "here"
    (here / "package").mkdir(parents=True)
    for name in ("__init__", "module"):
        (here / "package" / f"{name}.py").write_text(f"{marker}def score(session): return 1.0\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("package", "package.module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return found


def recipe(folder: Path, text: str, **more: str) -> Path:
    """A recipe that would run, but for ``text``; ``more`` replaces or adds keys."""
    words = {"model": "'sub/m.onnx'", "passes": "'prune-magnitude{sparsity=0.5}'", "output": "'o.onnx'"} | more
    given = {key for key in words if re.search(rf"(?m)^{key} *=", text)}
    lines = [f"{key.replace('_', '-')} = {value}" for key, value in words.items() if key not in given]
    path = folder / "r.toml"
    path.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")
    return path


def test_a_recipe_says_what_the_command_line_says(call: Any, folder: Path) -> None:
    text = """
data = "x.npz"
check-data = "x.npz"
max-error = 1
min-sqnr = -10.5
check = "each"
strict = true
seed = 3
json = "report.json"
[with]
teacher = "sub/m.onnx"
"""
    code, error = call("--recipe", recipe(folder, text))
    assert code == 0, error
    code, error = call(
        folder / "sub" / "m.onnx", "-p", "prune-magnitude{sparsity=0.5}", "-o", folder / "plain.onnx", "--json",
        folder / "plain.json", "--data", folder / "x.npz", "--check-data", folder / "x.npz", "--max-error", 1,
        "--min-sqnr", -10.5, "--check", "each", "--strict", "--seed", 3, "--with", f"teacher={folder / 'sub/m.onnx'}",
    )  # fmt: skip
    assert code == 0, error
    assert (folder / "o.onnx").read_bytes() == (folder / "plain.onnx").read_bytes()
    reports = [re.sub(r'"(?:seconds|\w+_ms|target)": .*', "", (folder / name).read_text()) for name in
               ("report.json", "plain.json")]  # fmt: skip
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "passes",
    ['["clean", "prune-magnitude{sparsity=0.5}"]', '"""\nclean,\n\tprune-magnitude{sparsity=0.5}\n"""',
     '["""clean\n""", "prune-magnitude{\\n sparsity=0.5\\n}"]'],
)  # fmt: skip
def test_passes_are_text_lines_or_a_list(folder: Path, passes: str) -> None:
    found = read_recipe(str(recipe(folder, f"passes = {passes}")), cli.run)["passes"]
    assert str(penjing.Pipeline.parse(found)) == "clean,prune-magnitude{sparsity=0.5}"


def test_the_command_line_goes_first(call: Any, folder: Path) -> None:
    path = recipe(folder, "seed = 1\n[with]\na = 'sub/m.onnx'\nb = 'no.onnx'\n", metric="'code.py:score'")
    out = folder / "other.onnx"
    code, error = call(
        "--recipe", path, "-o", out, "--metric", f"{folder / 'code.py'}:score", "--with", f"b={folder / 'sub/m.onnx'}"
    )
    assert code == 0, error
    assert out.exists()
    assert not (folder / "o.onnx").exists()


def test_keys_are_the_options(folder: Path) -> None:
    command = next(param for param in [cli.run] if isinstance(param, click.Command))
    told = {max(param.opts, key=len).lstrip("-") for param in command.params}
    assert set(keys(command)) == told - {"recipe", "allow-python", "debug"}

    @click.command()
    @click.option("--new-thing", type=click.Path())
    def other() -> None: ...

    path = folder / "new.toml"
    path.write_text("new-thing = 'a/b'")
    assert read_recipe(str(path), other) == {"new_thing": str(folder / "a/b")}


MISTAKES = {
    "modle = 'm.onnx'": "r.toml: there is no key 'modle'. Did you mean 'model'? The keys are model, passes,",
    "max_drop = 1": "there is no key 'max_drop'. Did you mean 'max-drop'?",
    "p = 'clean'": "there is no key 'p'.",
    "debug = true": "--debug is said on the command line, not in a recipe.",
    "allow-python = true": "--allow-python is said on the command line, not in a recipe.",
    "recipe = 'r.toml'": "--recipe is said on the command line, not in a recipe.",
    "[bounds]\nmax-drop = 1": "there is no table 'bounds'. Write max-drop at the top, before any table.",
    "[wiht]\na = 'b'": "there is no table 'wiht'. Did you mean 'with'?",
    "[with]\nmetric = 'code.py:score'": "with holds metric, which is a key of its own; write it at the top,",
    "[with]\na = 1": "with holds 'a', which is 1; it must be the path of a model.",
    "[with]\n'a=b' = 'c'": "with holds the name 'a=b'; a name has no equals sign.",
    "with = 'a=b.onnx'": "with is the text 'a=b.onnx'; it must be a table: a line [with],",
    "model = 3": "model is 3; it must be the text of a path.",
    "model = ''": "model is empty; it must be the text of a path.",
    "passes = [1]": "passes is 1; it must be text, as every part of the list.",
    "passes = []": "passes is an empty list; it must be text, or a list of texts.",
    "passes = 'prune-magnitud'": "Did you mean 'prune-magnitude'?",
    "passes = 'clean{x=" + "(" * 9000 + "'": "nests lists in lists too deeply",
    "data = ['x.npz']": "data is a list; it must be a path or FILE.py:FUNCTION, as text.",
    "strict = 'yes'": "strict is the text 'yes'; it must be true or false.",
    "max-drop = '0.1'": "max-drop is the text '0.1'; it must be a number.",
    "max-drop = true": "max-drop is true; it must be a number.",
    "max-error = nan": "max-error is nan; it must be a number.",
    "max-error = 1" + "0" * 4000: "max-error is a number of many digits; it must be a number.",
    "max-error = 1" + "0" * 5000: "is not TOML: ",
    "max-error = -1": "--max-error is -1",
    "seed = 1.5": "seed is 1.5; it must be a whole number",
    "seed = -1": "seed is not valid: -1 is not in the range",
    "seed = 0x" + "f" * 9000: "seed is a number of many digits",
    "seed = 2026-01-01": "seed is a date or time; it must be a whole number",
    "check = 'ends'": "check is the text 'ends'; it must be one of off, end, each. Did you mean 'end'?",
    'model = "\\u001b[31m.onnx"': "model holds the control character '\\x1b'; leave it out.",
    '"\\u001b[31m" = 1': "there is no key '\\x1b[31m'.",
    "a = " + "[" * 9000: "nests its values too deeply",
    "a = 1\na = 2\n": "is not TOML: Cannot overwrite a value (at line",
    "model\n": "is not TOML: Expected '=' after a key in a key/value pair (at line",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:30])
def test_a_mistake_is_one_sentence(call: Any, folder: Path, text: str) -> None:
    before = sorted(folder.rglob("*"))
    code, error = call("--recipe", recipe(folder, text))
    assert code == 2
    assert MISTAKES[text] in error
    assert "\x1b" not in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(folder.rglob("*")) == sorted({*before, folder / "r.toml"})


def test_what_is_no_recipe(call: Any, tmp_path: Path) -> None:
    files = {"binary": b"\xff\xfe\0", "huge": b"#" * (MOST_BYTES + 1), "keys": b".".join([b"a"] * 8000) + b" = 1"}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "\x1b[2J").write_bytes(b"x")
    sentences = {
        "none": "does not exist; a recipe is a TOML file.",
        "binary": "is not UTF-8 text (byte 0); a recipe is a TOML file.",
        "huge": "is too large; a recipe takes at most",
        "keys": "there is no table 'a'.",
        "pipe": "is not a regular file",
        ".": "is not a regular file",
        "\x1b[2J": "\\x1b[2J is not TOML",
    }
    for name, sentence in sentences.items():
        code, error = call("--recipe", tmp_path / name)
        assert (code, sentence in error, "\x1b" in error) == (2, True, False), error


CODE = {
    "metric = 'code.py:score'": "code.py",
    "data = 'code.py:feeds'": "code.py",
    "check-data = './code.py:feeds'": "code.py",
    "metric = 'package.module:score'": "package/__init__.py",
}


@pytest.mark.parametrize("text", CODE)
def test_python_runs_only_by_permission(call: Any, folder: Path, text: str) -> None:
    ran, path, key = folder.parent / "ran", recipe(folder, text), text.partition(" ")[0]
    file = (folder if CODE[text] == "code.py" else folder.parent / "here") / CODE[text]
    code, error = call("--recipe", path)
    assert code == 2
    assert f"r.toml: {key} = " in error
    assert f"runs Python, {file}" in error
    assert "--allow-python" in error
    assert not ran.exists()
    assert not (folder / "o.onnx").exists()
    code, error = call("--recipe", path, "--allow-python")
    assert code == 0, error
    assert error.startswith(f"penjing: {key} of {path} runs {file}")
    assert ran.exists()


def test_the_path_is_printed_before_the_code_runs(folder: Path) -> None:
    (folder / "code.py").write_text("import sys\nsys.exit('this ran')\n")
    command = [sys.executable, "-m", "penjing", "run", "--allow-python", "--recipe"]
    path = recipe(folder, "metric = 'code.py:score'")
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    printed, _, rest = done.stderr.partition("\n")
    assert printed == f"penjing: metric of {path} runs {folder / 'code.py'}"
    assert "SystemExit: this ran" in rest


def test_names_that_pass_for_files_run_nothing(call: Any, folder: Path) -> None:
    (folder / "code.py:score").write_text("")
    (folder / "code.py:d").mkdir()
    for text in ("metric = 'code.py:score'", "data = 'code.py:d/feeds'", "data = 'code.py:score.x'"):
        code, error = call("--recipe", recipe(folder, text))
        assert code == 2, error
        assert not (folder.parent / "ran").exists()


def test_finding_a_module_imports_nothing(folder: Path) -> None:
    here = folder.parent / "here"
    files = [str(here / "package" / name) for name in ("__init__.py", "module.py")]
    assert code_files("package.module:score", "--metric") == files
    assert code_files("sys:exit", "--metric") == ["built into Python"]
    assert code_files("penjing.models.zoo:accuracy", "--metric")[-1].endswith("zoo.py")
    for spec in ("package.none:score", "no.such.module:score", "..package:score", "package.module.deep:score"):
        with pytest.raises(PenjingError):
            code_files(spec, "--metric")
    assert not (folder.parent / "ran").exists()


def test_nothing_in_the_current_folder_passes_for_a_library(folder: Path) -> None:
    here = Path.cwd()
    for name in itertools.chain(("numpy", "click", "onnx", "rich"), ("evil",)):
        (here / f"{name}.py").write_text("open('imported', 'w').close()\n")
    (here / "evil-1.dist-info").mkdir()
    (here / "evil-1.dist-info" / "METADATA").write_text("Name: evil\nVersion: 1\n")
    (here / "evil-1.dist-info" / "entry_points.txt").write_text("[penjing.passes]\nevil = evil\n")
    path = recipe(folder, "", passes="'evil'")
    command = [sys.executable, "-m", "penjing", "run", "--recipe", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no pass 'evil'." in done.stderr
    assert not (here / "imported").exists()


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_readme(call: Any, tmp_path: Path, snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    name = snippet.partition("\n")[0].lstrip("# ")
    (tmp_path / name).write_text(snippet, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = read_recipe(name, cli.run)
    assert f"penjing run --recipe {name}" in README
    code, error = call("--recipe", name, "--allow-python")
    assert code == 0, error
    assert Path(found["output"]).exists()


def test_the_readme_has_a_recipe() -> None:
    assert SNIPPETS
