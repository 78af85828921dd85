"""The servers that the conformance cases speak to: real processes, started once and shared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.conformance import sabotage
from tests.conformance.talk import ALIAS, MODEL, Api
from tests.serving import checked_server, running_server

CONTEXT = 4096
SLOTS = 16
FEW_SLOTS = FEW_QUEUED = 4
BODY_MIB = 8
KEY = "sk-conformance-0123456789"
SETTINGS = (
    *("--dtype", "float32", "--kv-cache-memory-gb", "0.25"),
    *("--max-model-len", str(CONTEXT), "--max-body-mb", str(BODY_MIB), "--served-model-name", MODEL, ALIAS),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks back at all cases comes after them."""
    items.sort(key=lambda item: item.path.name == "test_aftermath.py")


@pytest.fixture(scope="session")
def api(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The server of most cases: 16 at a time, 512 in the queue."""
    log = tmp_path_factory.mktemp("conformance") / "log"
    with checked_server(tiny_checkpoint, log, *SETTINGS, "--max-num-seqs", str(SLOTS)) as server:
        made = Api(server)
        yield made
        made.close()


@pytest.fixture(scope="module")
def guarded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server that asks for KEY."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    with running_server(tiny_checkpoint, log, *SETTINGS, IDEFICS2_API_KEY=KEY) as server:
        made = Api(server)
        yield made
        made.close()
        assert server.stop() == 0
    assert KEY not in log.read_text()


@pytest.fixture(scope="session")
def client(api: Api) -> Iterator[openai.OpenAI]:
    """OpenAI's own, which gives up at the first error."""
    with openai.OpenAI(base_url=f"{api.server.base_url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def sabotaged(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server whose engine fails on command, and which may fetch pictures from this machine: see `sabotage`.

    Also the one that is soon full: four at a time and four in the queue, and a comment after a tenth of a second.
    """
    log = tmp_path_factory.mktemp("sabotage") / "log"
    folder = sabotage.poisoned_copy(tiny_checkpoint, log.parent / "poisoned")
    limits = (
        *("--max-num-seqs", str(FEW_SLOTS), "--max-num-queued-reqs", str(FEW_QUEUED), "--keep-alive-seconds", "0.1"),
        *("--max-images", "20", "--image-fetch-timeout", "1", "--max-image-bytes", str(1 << 20)),
    )
    with running_server(folder, log, *SETTINGS, *limits, module=sabotage.__name__) as server:
        made = Api(server)
        yield made
        made.close()
        server.wait_until_idle()
        assert server.stop() == 0


@pytest.fixture(scope="session")
def vocabulary(tiny_checkpoint: Path) -> dict[str, int]:
    """Token ids by piece, `▁` for a space, as the checkpoint's own file has them."""
    content = json.loads((tiny_checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    pieces: dict[str, int] = content["model"]["vocab"]
    return pieces
