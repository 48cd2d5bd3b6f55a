"""No code of ours can unpickle anything: not in the package, not in benchmarks, not in training."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("src", "benchmarks", "training") for path in (ROOT / folder).rglob("*.py"))

# modules that pickle, and calls of others that read or write pickles
MODULES = {"pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {
    *("torch.load", "torch.save", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.jit.load"),
    *("torch.package.PackageImporter", "torch.utils.model_zoo.load_url", "torch.distributed.checkpoint.load"),
    *("pandas.read_pickle", "numpy.lib.format.read_array", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}
SETTINGS = {"allow_pickle", "weights_only", "use_safetensors"}  # where these are True, False and False


def faults(tree: ast.AST) -> list[str]:
    """What in a module could read or write a pickle, with its line."""
    names: dict[str, str] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                found += [f"{node.lineno}: import {alias.name}"] * (alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = full
                found += [f"{node.lineno}: from {full}"] * (node.module.partition(".")[0] in MODULES or full in CALLS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += _call_faults(node, names)
    return found


def _call_faults(node: ast.Call, names: dict[str, str]) -> list[str]:
    called = ast.unparse(node.func)
    first, dot, rest = called.partition(".")
    full = names.get(first, first) + dot + rest
    wrong = [f"{node.lineno}: {full}()"] if full.replace("np.", "numpy.") in CALLS else []
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg in SETTINGS and value is (keyword.arg == "allow_pickle"):
            wrong.append(f"{node.lineno}: {keyword.arg}={value}")
    if full in ("importlib.import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        wrong += [f"{node.lineno}: {full}({node.args[0].value!r})"] * (node.args[0].value in MODULES)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle(path):
    assert faults(ast.parse(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "def f():\n    import dill",
        "from joblib import load",
        "import torch\ntorch.load('a')",
        "import torch as t\nt.load('a')",
        "from torch import load",
        "from torch import load as read\nread('a')",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "import torch\nprint(torch.save)\ntorch.save(1, 'a')",
        "pipe.from_pretrained('a', use_safetensors=False)",
        "__import__('pickle')",
        "import importlib\nimportlib.import_module('marshal')",
    ],
)
def test_the_check_can_fail(text):
    assert faults(ast.parse(text))


def test_every_folder_is_looked_at():
    folders = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert folders == {"src", "benchmarks", "training"}
