from __future__ import annotations

import json
import subprocess
import sys

import pytest

from server import sandbox


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A child as the parents start theirs. Its code finds `sandbox`, and its own end without an error is checked."""
    return subprocess.run(
        [sys.executable, "-c", f"import json, os, resource, signal, sys\nfrom server import sandbox\n{code}"],
        cwd=sandbox.PACKAGE_PARENT,
        env=sandbox.environment(),
        capture_output=True,
        check=True,
        text=True,
        timeout=30,
    )


def test_memory_beyond_the_limit_is_refused() -> None:
    child = run("""
sandbox.limit_memory(128 << 20)
kept = bytearray(32 << 20)
try:
    more = bytearray(256 << 20)
except MemoryError:
    print("refused")
""")
    assert child.stdout == "refused\n"


def test_a_lower_limit_stays_in_force() -> None:
    child = run("""
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
sandbox.limit_memory(1 << 40)
print(resource.getrlimit(resource.RLIMIT_AS) == (1 << 30, 1 << 30))
""")
    assert child.stdout == "True\n"


def test_the_limit_cannot_be_raised_again() -> None:
    child = run("""
sandbox.limit_memory(1 << 30)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
print(soft == hard != resource.RLIM_INFINITY)
""")
    assert child.stdout == "True\n"


def test_a_child_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDEFICS2_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "sk-canary")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    seen = json.loads(run("print(json.dumps(dict(os.environ)))").stdout)
    assert seen["TZ"] == "Asia/Kathmandu"
    assert "sk-canary" not in seen.values()


def test_prints_do_not_enter_the_replies() -> None:
    child = run("""
replies = sandbox.enter()
print("from Python", flush=True)
os.write(1, b"from native code\\n")
os.system("echo from a program")
replies.write(b"reply")
replies.flush()
""")
    assert child.stdout == "reply"
    assert child.stderr == "from Python\nfrom native code\nfrom a program\n"


def test_interrupts_are_the_parents() -> None:
    child = run("""
replies = sandbox.enter()
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), number)
replies.write(b"still here")
replies.flush()
""")
    assert child.stdout == "still here"


def test_no_core_is_dumped() -> None:
    child = run("""
replies = sandbox.enter()
replies.write(json.dumps(resource.getrlimit(resource.RLIMIT_CORE)).encode())
replies.flush()
""")
    assert json.loads(child.stdout) == [0, 0]


def test_it_imports_the_standard_library_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import server.sandbox
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - sys.stdlib_module_names))
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=sandbox.PACKAGE_PARENT, capture_output=True, check=True, text=True
    )
    assert child.stdout == "['server']\n"
