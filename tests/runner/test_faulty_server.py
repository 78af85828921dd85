"""A real server whose engine has no memory for a while, as its clients see it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.runner import faults
from tests.serving import SMALL, running_server


def test_a_shortage_of_memory_is_a_503_to_try_again_and_passes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shortage = tmp_path / "shortage"
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}

    with (
        running_server(
            tiny_checkpoint, tmp_path / "log", *SMALL, module=faults.__name__, **{faults.FAULT_FILE: str(shortage)}
        ) as server,
        httpx.Client(base_url=server.base_url, timeout=60) as http,
        ThreadPoolExecutor(4) as pool,
    ):

        def ask(**more: object) -> httpx.Response:
            return http.post("/v1/chat/completions", json={**body, **more})

        expected = ask().json()["choices"]
        shortage.touch()
        for response in pool.map(lambda _: ask(), range(8)):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "out_of_memory")
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert ask(stream=True).status_code == 503  # nothing was sent that a status could not follow
        assert http.get("/health").status_code == 200
        shortage.unlink()
        answer = ask()
        assert (answer.status_code, answer.json()["choices"]) == (200, expected)
        server.wait_until_idle()
        assert server.metric("kv_cache_usage_perc") == 0
        assert server.metric("num_preemptions_total") >= 18
        assert server.stop() == 0
    log = (tmp_path / "log").read_text()
    assert "out of memory: request" in log
    assert "Traceback" not in log, "a shortage is no fault of the program's"
