"""The load generators that are programs of their own, and the versions of all clients.

Knows where a program may be and what to say when it is nowhere.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving import clean_environment

PACKAGES = {
    "openai": ("openai", "httpx2", "pydantic"),
    "langchain": ("langchain-openai", "langchain-core"),
    "litellm": ("litellm",),
}


@dataclass
class Program:
    """A client that is a program: `name` on PATH, or what the environment `variable` says. `hint` tells what it needs.

    `version` is known once it was asked for.
    """

    name: str
    variable: str
    hint: str
    path: str | None = None
    version: str = "not found"

    def found(self) -> Program:
        """This, with its path and version. Fails the test where the program is not to be found."""
        if self.path is None:
            beside = str(Path(sys.executable).parent)
            wanted = os.environ.get(self.variable) or self.name
            self.path = shutil.which(wanted) or shutil.which(wanted, path=beside)
            if self.path is None:
                pytest.fail(
                    f"{self.name} is not there. {self.hint} Or leave it out: CLIENTS='openai langchain litellm'."
                )
            told = self.run("--version", seconds=120)
            assert told.returncode == 0, told.stderr
            self.version = told.stdout.split()[-1]
        return self

    def run(self, *arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Run it to its end, without a network beyond this machine and without telling anybody."""
        assert self.path is not None
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        return subprocess.run(
            [self.path, *arguments],
            env=clean_environment(**quiet),
            capture_output=True,
            text=True,
            timeout=seconds,
        )


VLLM = Program(
    "vllm",
    "VLLM",
    "Install vLLM 0.32, in the build for this machine, into an environment of its own, and name the program: "
    "VLLM=/path/to/bin/vllm.",
)
GUIDELLM = Program(
    "guidellm",
    "GUIDELLM",
    "tests/clients/requirements.txt has it; or name the program: GUIDELLM=/path/to/bin/guidellm.",
)
SCHEMATHESIS = Program(
    "schemathesis",
    "SCHEMATHESIS",
    "tests/clients/requirements.txt has it; or name the program: SCHEMATHESIS=/path/to/bin/schemathesis.",
)


def version_table(chosen: Sequence[str]) -> list[str]:
    """A line for each package or program of the chosen clients."""
    versions = {
        package: importlib.metadata.version(package) for client in chosen for package in PACKAGES.get(client, ())
    }
    versions |= {program.name: program.version for program in (VLLM, GUIDELLM, SCHEMATHESIS) if program.name in chosen}
    return [f"{name:<18} {version}" for name, version in versions.items()]
