"""Completions and token endpoints of a real server process, against transformers' own probabilities."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer, Idefics2ForConditionalGeneration

from tests.engines import noise_image, png
from tests.serving import SMALL, Server, checked_server

TOLERANCE = 2e-4
TEXTS = ["Two cats and a dog", "tabs\n\n\tand  spaces ", "naïve café, 数字は三です 🦊", "a"]
# Where the tokenizers differ by intention, and where a text cannot be told from its ids.
ODD_TEXTS = ["</s><image>", "  indented", " "]


class Reference:
    """transformers' model and tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._model = Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Log-probabilities [len(token_ids), vocab] of what follows each id."""
        ids = torch.tensor([token_ids])
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        return logits.float().log_softmax(dim=-1)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text).input_ids
        return ids


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    return Reference(tiny_checkpoint)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with checked_server(tiny_checkpoint, log, *SMALL, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=60) as client:
        yield client


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def complete(http: httpx.Client, prompt: Any, **fields: Any) -> Any:
    return post(http, "/v1/completions", prompt=prompt, temperature=fields.pop("temperature", 0), **fields)


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def close_to(values: list[float]) -> Any:
    return pytest.approx(values, abs=TOLERANCE)


# -- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_are_the_references(http: httpx.Client, reference: Reference, max_tokens: int) -> None:
    """As evaluation harnesses ask: a batch of ids, each a context and a continuation, and the sum over the latter."""
    contexts = [reference.encode(text) for text in TEXTS]
    continuations = [reference.encode(text)[1:] for text in [*TEXTS[1:], TEXTS[0]]]
    # The first is what greedy decoding would say.
    greedy = int(reference.logprobs(contexts[0])[-1].argmax())
    continuations[0] = [greedy]
    prompts = [[*context, *continuation] for context, continuation in zip(contexts, continuations, strict=True)]
    choices = complete(http, prompts, echo=True, logprobs=1, max_tokens=max_tokens, seed=1234)["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(prompts)))
    for choice, context, prompt in zip(choices, contexts, prompts, strict=True):
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(prompt) + max_tokens
        expected = reference.logprobs(prompt)
        values = told["token_logprobs"][len(context) : len(prompt)]
        ids = prompt[len(context) :]
        rows = expected[len(context) - 1 : len(prompt) - 1]
        assert values == close_to([float(row[token_id]) for row, token_id in zip(rows, ids, strict=True)])
        best = [max(top.values()) for top in told["top_logprobs"][len(context) : len(prompt)]]
        assert best == close_to([float(row.max()) for row in rows])
    told = choices[0]["logprobs"]
    place = len(contexts[0])
    assert told["token_logprobs"][place] == max(told["top_logprobs"][place].values())


def test_an_answer_is_the_references(http: httpx.Client, reference: Reference) -> None:
    body = complete(http, TEXTS[0], max_tokens=8, logprobs=3, return_token_ids=True, ignore_eos=True)
    (choice,) = body["choices"]
    prompt = reference.encode(TEXTS[0])
    assert choice["prompt_token_ids"] == prompt
    rows = reference.logprobs([*prompt, *choice["token_ids"]])[len(prompt) - 1 : -1]
    assert choice["token_ids"] == rows.argmax(dim=-1).tolist()
    assert choice["logprobs"]["token_logprobs"] == close_to(rows.max(dim=-1).values.tolist())
    for top, row in zip(choice["logprobs"]["top_logprobs"], rows, strict=True):
        assert sorted(top.values(), reverse=True) == close_to(row.topk(3).values.tolist())
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert body["usage"]["completion_tokens"] == 8


def test_a_cached_prompt_has_the_same_probabilities(http: httpx.Client) -> None:
    text = "The same words, again and again, fill several blocks of the cache. " * 4
    told = [complete(http, text, echo=True, logprobs=2, max_tokens=2)["choices"][0]["logprobs"] for _ in range(3)]
    complete(http, text, max_tokens=1)
    told.append(complete(http, text, echo=True, logprobs=2, max_tokens=2)["choices"][0]["logprobs"])
    for other in told[1:]:
        assert other["tokens"] == told[0]["tokens"]
        assert other["text_offset"] == told[0]["text_offset"]
        assert other["token_logprobs"][1:] == close_to(told[0]["token_logprobs"][1:])


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS + ODD_TEXTS)
def test_echo(http: httpx.Client, reference: Reference, text: str) -> None:
    """The prompt to the letter, then the answer; every token stands where its offset says."""
    (choice,) = complete(http, text, echo=True, logprobs=0, max_tokens=6, ignore_eos=True)["choices"]
    (alone,) = complete(http, text, max_tokens=6, ignore_eos=True)["choices"]
    assert choice["text"] == text + alone["text"]
    told = choice["logprobs"]
    ids = post(http, "/tokenize", prompt=text)["tokens"]
    assert len(told["tokens"]) == len(ids) + 6
    assert told["text_offset"][len(ids)] == len(text)
    for token, start in zip(told["tokens"], told["text_offset"], strict=True):
        special = token in reference.tokenizer.all_special_tokens
        assert special or token.startswith("bytes:") or choice["text"].startswith(token, start)
    shown = [token for token in told["tokens"] if token not in reference.tokenizer.all_special_tokens]
    if not any(token.startswith("bytes:") for token in shown):
        assert "".join(shown) == choice["text"] if text in TEXTS else choice["text"].endswith("".join(shown))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_the_same_prompt(http: httpx.Client, reference: Reference, text: str) -> None:
    told = post(http, "/tokenize", prompt=text, return_token_strs=True)
    assert told["tokens"] == reference.encode(text)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 2048
    by_text, by_ids = (complete(http, prompt, max_tokens=8, echo=True, logprobs=1) for prompt in (text, told["tokens"]))
    assert by_text["choices"] == by_ids["choices"]
    assert by_text["usage"]["prompt_tokens"] == by_ids["usage"]["prompt_tokens"] == told["count"]
    assert post(http, "/detokenize", tokens=told["tokens"][1:]) == {"prompt": text}


def test_without_bos(http: httpx.Client, reference: Reference) -> None:
    ids = reference.encode("Two cats")[1:]
    body = complete(http, "Two cats", add_special_tokens=False, return_token_ids=True, max_tokens=1)
    assert body["choices"][0]["prompt_token_ids"] == ids
    assert post(http, "/tokenize", prompt="Two cats", add_special_tokens=False)["tokens"] == ids


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1, "seed": 5}, {"n": 2, "temperature": 0}])
def test_a_stream_is_the_whole_answer(http: httpx.Client, fields: dict[str, Any]) -> None:
    fields = {"max_tokens": 12, "echo": True, "logprobs": 2, "return_token_ids": True, **fields}
    whole = complete(http, TEXTS[:3], **fields)
    body = {"prompt": TEXTS[:3], "stream": True, "stream_options": {"include_usage": True}, **fields}
    events = http.post("/v1/completions", json=body).text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    *chunks, end = [json.loads(event.removeprefix("data: ")) for event in events]
    assert end["choices"] == []
    counts = ("prompt_tokens", "completion_tokens")
    assert [end["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
    for choice in whole["choices"]:
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert joined(piece["token_ids"] for piece in pieces) == choice["token_ids"]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        for name in ("tokens", "text_offset"):
            assert joined(piece["logprobs"][name] for piece in pieces) == choice["logprobs"][name]
        values = joined(piece["logprobs"]["token_logprobs"] for piece in pieces)
        assert values[1:] == close_to(choice["logprobs"]["token_logprobs"][1:])


def test_many_prompts_and_answers_at_once(http: httpx.Client) -> None:
    """More than run at once. Each prompt's answers are those that it gets alone."""
    prompts = [f"Number {number}:" for number in range(24)]
    body = complete(http, prompts, n=2, temperature=1, seed=3, max_tokens=6)
    assert [choice["index"] for choice in body["choices"]] == list(range(48))
    assert body["usage"]["prompt_tokens"] == sum(post(http, "/tokenize", prompt=prompt)["count"] for prompt in prompts)
    for index in (0, 11, 23):
        alone = complete(http, prompts[index], n=2, temperature=1, seed=3, max_tokens=6)["choices"]
        together = body["choices"][2 * index : 2 * index + 2]
        assert [choice["text"] for choice in alone] == [choice["text"] for choice in together]
        assert alone[0]["text"] != alone[1]["text"]


def test_a_constrained_answer(http: httpx.Client) -> None:
    for name in ("regex", "guided_regex"):
        (choice,) = complete(http, "The date is ", max_tokens=32, **{name: "[0-9]{4}-[0-9]{2}"})["choices"]
        assert re.fullmatch("[0-9]{4}-[0-9]{2}", choice["text"])
        assert choice["finish_reason"] == "stop"


def test_stop_and_truncation(http: httpx.Client) -> None:
    text = "one two three four five six"
    (choice,) = complete(http, text, max_tokens=12, ignore_eos=True)["choices"]
    stop = choice["text"][3:5]
    (stopped,) = complete(http, text, max_tokens=12, ignore_eos=True, stop=stop)["choices"]
    assert stopped["text"] == choice["text"][: choice["text"].index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    body = complete(http, text, truncate_prompt_tokens=2, echo=True, max_tokens=0)
    assert body["choices"][0]["text"] == "five six"
    assert body["usage"]["prompt_tokens"] == 2


# -- conversations and limits ----------------------------------------------------------------------------------------


def picture(seed: int, detail: str) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png(noise_image(60, 40, seed))).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


@pytest.mark.parametrize(
    "content",
    [
        "No picture.",
        [picture(1, "low"), "One."],
        ["Two.", picture(1, "high"), "Not adjacent.", picture(2, "low")],
        [picture(1, "low"), picture(2, "low"), "Adjacent."],
    ],
)
def test_tokenize_counts_what_the_chat_endpoint_counts(http: httpx.Client, content: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    told = post(http, "/tokenize", messages=messages)
    answer = post(http, "/v1/chat/completions", messages=messages, max_tokens=1, return_token_ids=True)
    assert told["tokens"] == answer["prompt_token_ids"]
    assert told["count"] == answer["usage"]["prompt_tokens"]


def test_a_picture_is_not_loaded_to_be_counted(http: httpx.Client) -> None:
    content = [{"type": "image_url", "image_url": {"url": "https://example.invalid/a.png", "detail": "low"}}]
    told = post(http, "/tokenize", messages=[{"role": "user", "content": content}])
    image = max(told["tokens"], key=told["tokens"].count)
    assert told["tokens"].count(image) == 64
    refused = http.post("/v1/completions", json={"prompt": [1, image]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt[1]")
    assert "<image>" in post(http, "/detokenize", tokens=told["tokens"])["prompt"]


def test_the_context_is_limited(http: httpx.Client) -> None:
    for prompt, param in [([5] * 2048, "prompt"), (["a", "b " * 5000], "prompt[1]")]:
        answer = http.post("/v1/completions", json={"prompt": prompt})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    body = complete(http, [5] * 2040, max_tokens=100, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 8


def test_sdk(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as client:
        whole = client.completions.create(model="tiny", prompt="Two cats", max_tokens=8, temperature=0, logprobs=1)
        stream = client.completions.create(model="tiny", prompt="Two cats", max_tokens=8, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        assert whole.choices[0].logprobs is not None
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="a", extra_body={"regex": "(("})
        assert caught.value.param == "regex"


def test_what_load_balancers_ask(http: httpx.Client) -> None:
    assert [http.request(method, "/ping").status_code for method in ("GET", "POST", "HEAD")] == [200, 200, 200]
    assert http.get("/load").json() == {"server_load": 0}
    assert re.match(r"[0-9]", http.get("/version").json()["version"])


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_the_examples_of_the_page_work(http: httpx.Client, path: str) -> None:
    described = http.get("/openapi.json").json()["paths"][path]["post"]
    examples = described["requestBody"]["content"]["application/json"]["examples"]
    for name, example in examples.items():
        answer = http.post(path, json=example["value"])
        assert answer.status_code == 200, (name, answer.text)
        kind = "text/event-stream" if example["value"].get("stream") else "application/json"
        assert answer.headers["content-type"].partition(";")[0] == kind
        assert kind in described["responses"]["200"]["content"]
