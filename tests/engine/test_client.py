"""Both clients carry the same messages to the same end."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Sequence
from queue import SimpleQueue

import pytest

from server.engine.client import EngineClient, ProcessClient, ThreadClient
from server.engine.core import AbortRequests, EngineCore
from server.errors import ConfigError, EngineDeadError
from server.types import EngineOutput, EngineOutputs, EngineRequest
from tests.factories import core_factory, expected_answer, make_core, make_request

CLIENTS = [ThreadClient, ProcessClient]


class Listener:
    def __init__(self) -> None:
        self.outputs: SimpleQueue[EngineOutput] = SimpleQueue()
        self.died = threading.Event()

    def on_outputs(self, batch: EngineOutputs) -> None:
        for output in batch.outputs:
            self.outputs.put(output)

    def on_death(self) -> None:
        self.died.set()

    def answers(self, requests: Sequence[EngineRequest]) -> dict[str, list[int]]:
        """The whole answers to these requests, and what came of others meanwhile."""
        awaited = {request.request_id for request in requests}
        answers: dict[str, list[int]] = {}
        while awaited:
            output = self.outputs.get(timeout=20)
            answers.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                awaited.discard(output.request_id)
        return answers


@pytest.mark.parametrize("client_type", CLIENTS)
def test_requests_with_pictures_come_back_answered(client_type: type[ThreadClient] | type[ProcessClient]) -> None:
    client: EngineClient = client_type(core_factory)
    listener = Listener()
    info = client.start(listener.on_outputs, listener.on_death)
    try:
        assert info.num_blocks == 64
        assert (client.resident_bytes() > 1 << 20) is (client_type is ProcessClient)
        aborted = make_request(30, max_tokens=90)
        client.submit(aborted)
        client.submit(AbortRequests([aborted.request_id]))
        requests = [make_request(range(i, i + 20), tiles=["a", "b"], max_tokens=5) for i in range(6)]
        for request in requests:
            client.submit(request)
        answers = listener.answers(requests)
        for request in requests:
            assert answers[request.request_id] == expected_answer(request)
    finally:
        client.close()
    assert not listener.died.is_set()
    with pytest.raises(EngineDeadError):
        client.submit(make_request(4))


def failing_factory() -> EngineCore:
    raise ConfigError("max_model_len 99 is more than fits")


def crashing_factory() -> EngineCore:
    os._exit(3)


def test_a_start_that_fails_says_why_in_one_line() -> None:
    listener = Listener()
    client = ProcessClient(failing_factory)
    with pytest.raises(ConfigError, match="max_model_len 99"):
        client.start(listener.on_outputs, listener.on_death)
    client.close()
    crashed = ProcessClient(crashing_factory)
    with pytest.raises(ConfigError, match="ended before it was ready"):
        crashed.start(listener.on_outputs, listener.on_death)
    crashed.close()


def test_death_of_the_process_is_noticed() -> None:
    listener = Listener()
    client = ProcessClient(functools.partial(make_core))
    client.start(listener.on_outputs, listener.on_death)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    assert listener.died.wait(20)
    with pytest.raises(EngineDeadError):
        client.submit(make_request(4))
    assert client.close() == "SIGKILL ended it"
    assert client.resident_bytes() == 0
