"""Nothing that a file or a client says becomes code, and no check is lost when Python optimizes."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import running_server

ROOT = Path(__file__).parent.parent / "server"
FILES = sorted(ROOT.rglob("*.py"))

# Calls that make code or objects out of data, or run a command, by how they are spelled.
CALLS = frozenset(
    {
        *("eval", "exec", "compile", "__import__", "breakpoint", "torch.load", "torch.jit.load", "torch.hub.load"),
        *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "os.system", "os.popen"),
        *("numpy.load", "np.load"),
        *("jinja2.Environment", "jinja2.Template", "importlib.import_module", "runpy.run_path", "runpy.run_module"),
    }
)
# Keywords whose mere truth does so.
KEYWORDS = frozenset({"trust_remote_code", "allow_pickle", "shell"})
MODULES = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "telnetlib", "xmlrpc"})


def complaints(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert, which python -O leaves out"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield f"line {node.lineno}: {name}"
            if name.endswith((".recv", ".send")) and not node.args:
                yield f"line {node.lineno}: {name}, which unpickles"
            for keyword in node.keywords:
                harmless = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in KEYWORDS and not harmless:
                    yield f"line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_data_becomes_code_and_no_check_is_an_assert(file: Path) -> None:
    assert list(complaints(ast.parse(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "x = yaml.load(text)",
        "torch.load(file, weights_only=True)",
        "load(folder, trust_remote_code=True)",
        "load(folder, trust_remote_code=settings.trust)",
        "run(command, shell=True)",
        "assert key == secret",
        "connection.recv()",
    ],
)
def test_what_would_do_so_is_noticed(source: str) -> None:
    assert len(list(complaints(ast.parse(source)))) == 1


def test_all_files_are_looked_at() -> None:
    assert len(FILES) > 100


EVIL = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
class Config: pass
class Model: pass
class Tokenizer: pass
class Processor: pass
"""


@pytest.fixture
def poisoned(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that says of everything that its code is to be loaded from the folder."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "evil.py").write_text(EVIL)
    maps = {
        "config.json": {
            "AutoConfig": "evil.Config",
            "AutoModelForImageTextToText": "evil.Model",
            "AutoModel": "evil.Model",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        "preprocessor_config.json": {"AutoImageProcessor": "evil.Processor", "AutoProcessor": "evil.Processor"},
        "processor_config.json": {"AutoProcessor": "evil.Processor"},
    }
    for name, auto_map in maps.items():
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, "auto_map": auto_map, "trust_remote_code": True}))
    return folder


def test_a_checkpoints_own_code_is_not_loaded_and_an_optimized_server_serves(poisoned: Path, tmp_path: Path) -> None:
    flags = ("--max-model-len", "256", "--engine-client", "thread")  # one process less that compiles every library
    with running_server(poisoned, tmp_path / "log", *flags, PYTHONOPTIMIZE="1") as server:
        command = Path(f"/proc/{server.process.pid}/environ").read_bytes()
        assert b"PYTHONOPTIMIZE=1" in command
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "regex": "[a-z]+"}
        answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        assert httpx.post(f"{server.base_url}/v1/chat/completions", json={**body, "n": 0}).status_code == 400
        assert server.stop() == 0
    assert not (poisoned / "imported").exists()
    assert not list(poisoned.rglob("*.pyc"))
