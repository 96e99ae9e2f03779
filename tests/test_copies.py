"""Pieces that stand in several model files, marked `# same as FILE.py`, must stay the same code."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(ROOT.glob("*.py"))
MODELS = ("mm_diffusion", "latent_mmdiffusion", "uniform_dit", "syncflow", "proav_dit", "cascade")
MARK = re.compile(r"^# same as (\w+\.py)\n(?:@.*\n)*(?:class|def) (\w+)", re.M)

# What a file may import of the others: sample -> model -> data, metrics; metrics -> data.
OWN = {"data": set(), "metrics": {"data"}, "sample": {"data"}}
OWN |= {name: {"data", "metrics"} for name in MODELS}
PACKAGES = {"data": {"torch", "numpy", "soundfile", "imageio", "imageio_ffmpeg", "tqdm"}}
PACKAGES |= {"sample": {"torch", "numpy", "soundfile", "tqdm"}}


def body(source, name):
    """The code of a top-level def or class without comments, docstrings and layout."""
    node = next((n for n in ast.parse(source).body if getattr(n, "name", None) == name), None)
    assert node is not None, f"there is no top-level {name}"
    for sub in ast.walk(node):
        if isinstance(sub, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(sub) is not None:
            sub.body = sub.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def imports(tree):
    """The top-level names of all modules that any line of a file imports, hidden ones included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_copies_are_the_same():
    count = 0
    for path in FILES:
        for owner, name in MARK.findall(path.read_text()):
            theirs = body((ROOT / owner).read_text(), name)
            assert body(path.read_text(), name) == theirs, f"{path.name}: {name}"
            count += 1
    assert count > 5


def test_the_comparison_sees_drift():
    one = 'def f(x):\n    """Doc."""\n    return x + 1   # why\n'
    assert body(one, "f") == body("def f(x):\n    return (x + 1)\n", "f")
    assert body(one, "f") != body("def f(x):\n    return x + 2\n", "f")
    marked = "# same as mm_diffusion.py\n@torch.no_grad()\ndef f(x):\n"
    assert MARK.findall(marked) == [("mm_diffusion.py", "f")]


def test_every_model_file_trains_with_the_same_loop():
    shared = {"parse", "setup", "precision", "Muon", "build_optimizers", "validate", "fit"}
    for path in FILES:
        if path.stem in MODELS and path.stem != "mm_diffusion":
            assert shared <= {name for _, name in MARK.findall(path.read_text())}, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports(path):
    """Core packages at import, optional ones inside functions, and no arrow that is not wanted."""
    tree = ast.parse(path.read_text())
    everywhere = imports(tree)
    files = {p.stem for p in FILES}
    assert everywhere & files <= OWN[path.stem], path.name
    core = PACKAGES.get(path.stem, {"torch", "numpy", "tqdm"})
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for name in imports(ast.Module(top, [])) - files:
        assert name in core or name in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_metrics_alone():
    """metrics.py works when it is copied alone: it needs data.py for its command only."""
    tree = ast.parse((ROOT / "metrics.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "data" not in imports(ast.Module(top, []))
