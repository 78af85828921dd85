"""Hostile requests without end, from a server's own OpenAPI page and from what its clients and attackers send.

The n-th request of a seed is always the same. Each carries a canary of its own in its values, which may come back in
its answer, but in no error, in nobody else's answer and in no log.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.campaigns import hostile_http as http
from tests.campaigns import hostile_values as values
from tests.campaigns.hostile_bodies import (
    CHAT,
    COMPANIONS,
    COMPLETIONS,
    DETOKENIZE,
    IMAGE,
    MINIMAL,
    RESPONSES,
    RICH,
    TOKENIZE,
    TOOL,
    Json,
    beyond,
    examples,
    fields,
    leaves,
    put,
)
from tests.campaigns.hostile_values import CANARY, quoted

CANARY_PREFIX = "zqcanary"


@dataclass(frozen=True)
class Hostile:
    """A request as it is sent, in pieces with a pause between them.

    endpoint        for the table
    may_hang_up     it is no HTTP, so that the server may answer with any 400, or with nothing
    leaves_after    seconds after which the client is gone, None: it stays; 0: in the middle of its body
    """

    number: int
    family: str
    endpoint: str
    pieces: tuple[bytes, ...]
    may_hang_up: bool = False
    has_answer_body: bool = True
    leaves_after: float | None = None


class Generator:
    """Requests of a seed. `page` is the server's OpenAPI document."""

    def __init__(self, page: Json, *, seed: int) -> None:
        self._seed = seed
        grid = [
            (endpoint, field, value)
            for endpoint in MINIMAL
            for field, schema in fields(page, endpoint)
            for value in (*values.ANY, *beyond(schema))
        ]
        random.Random(seed).shuffle(grid)
        self._grid = grid
        self._examples = {path: examples(page, path) for path in MINIMAL}

    @property
    def grid_size(self) -> int:
        """Fields times values: so many requests of the family "field" send each value to each field once."""
        return len(self._grid)

    def request(self, number: int) -> Hostile:
        chance = random.Random(f"{self._seed} {number}")
        roll = chance.random()
        families: tuple[tuple[float, Callable[[random.Random, int], Hostile]], ...] = (
            (0.0005, self._slow_grammar),
            (0.001, self._large),
            (0.02, self._picture),
            (0.02, self._grammar),
            (0.05, self._text),
            (0.07, self._bytes),
            (0.07, self._http),
            (0.20, self._mutated),
        )
        for share, make in families:
            if roll < share:
                return make(chance, number)
            roll -= share
        return self._field(chance, number)

    # -- families ------------------------------------------------------------------------------------------------

    def _field(self, chance: random.Random, number: int) -> Hostile:
        """One field of one endpoint with one value, from the list of all of these."""
        endpoint, path, value = self._grid[number % len(self._grid)]
        body = copy.deepcopy(MINIMAL[endpoint])
        top = str(path[0])
        if endpoint == TOKENIZE and top not in ("prompt", "model", "add_special_tokens", "return_token_strs"):
            body = copy.deepcopy(MINIMAL[CHAT])
        body |= copy.deepcopy(COMPANIONS.get(top, {}))
        if len(path) > 1 and top in RICH:
            body[top] = copy.deepcopy(RICH[top])
        if endpoint == RESPONSES and isinstance(body.get("tools"), list):
            body["tools"] = [{"type": "function", **TOOL}]
        hole = "@HOLE@"
        put(body, path, hole)
        return self._post(chance, number, "field", endpoint, json.dumps(body).replace(quoted(hole), value))

    def _mutated(self, chance: random.Random, number: int) -> Hostile:
        """A valid request, some of it replaced, dropped, or sent twice."""
        endpoint = chance.choice(list(MINIMAL))
        body = copy.deepcopy(chance.choice([MINIMAL[endpoint], *self._examples[endpoint]]))
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if name in body:
                body[name] = 2
        for _ in range(chance.randrange(3)):
            name = chance.choice(list(RICH))
            body.setdefault(name, copy.deepcopy(RICH[name]))
        holes: list[str] = []
        for _ in range(chance.randrange(4)):
            path, _ = chance.choice(list(leaves(body)) or [(("x",), None)])
            if chance.random() < 0.2:
                put(body, path, None)
            else:
                holes.append(chance.choice(values.ANY))
                put(body, path, f"@HOLE{len(holes) - 1}@")
        text = json.dumps(body)
        for index, value in enumerate(holes):
            text = text.replace(quoted(f"@HOLE{index}@"), value)
        if chance.random() < 0.2 and body:
            text = f"{{{quoted(chance.choice(list(body)))}:{chance.choice(values.ANY)},{text[1:]}"
        return self._post(chance, number, "mutated", endpoint, text)

    def _text(self, chance: random.Random, number: int) -> Hostile:
        """A valid request whose texts are hostile."""
        endpoint = chance.choice([CHAT, CHAT, COMPLETIONS, RESPONSES, TOKENIZE])
        text = "".join(chance.choices(values.TEXTS, k=chance.randrange(1, 3)))[:2_000]
        body: Json = copy.deepcopy(MINIMAL[CHAT])
        if endpoint == CHAT:
            body["messages"] = [
                {"role": role, "content": text} for role in chance.choices(("system", "user", "assistant", "tool"), k=3)
            ]
            body |= chance.choice([{}, {"stop": [text[:50] or "x"]}, {"cache_salt": chance.choice(values.SALTS)}])
        elif endpoint == RESPONSES:
            body = {"input": text, "instructions": text, "user": text, "metadata": {"a": text[:500]}}
            body["max_output_tokens"] = 2
        else:
            body = {"prompt": text} | ({"max_tokens": 2, "echo": True} if endpoint == COMPLETIONS else {})
        return self._post(chance, number, "text", endpoint, json.dumps(body))

    def _grammar(self, chance: random.Random, number: int) -> Hostile:
        endpoint = chance.choice([CHAT, COMPLETIONS])
        schema = chance.choice(values.SCHEMAS)
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        fields: Json = chance.choice(
            [
                {"guided_json": schema},
                {"structured_outputs": {"json": schema}},
                {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
                {"regex": chance.choice(values.EXPRESSIONS)},
                {"guided_grammar": chance.choice(values.GRAMMARS)},
                {"guided_choice": [CANARY, *values.TEXTS[: chance.randrange(30)]]},
                {"tools": [tool] * chance.randrange(1, 4), "tool_choice": "required"},
            ]
        )
        return self._post(chance, number, "grammar", endpoint, json.dumps(copy.deepcopy(MINIMAL[endpoint]) | fields))

    def _slow_grammar(self, chance: random.Random, number: int) -> Hostile:
        body = copy.deepcopy(MINIMAL[CHAT]) | chance.choice(values.slow_grammars(number))
        return self._post(chance, number, "slow grammar", CHAT, json.dumps(body))

    def _large(self, chance: random.Random, number: int) -> Hostile:
        field, value = values.large_fields(chance)
        owners = {"tokens": DETOKENIZE, "prompt": chance.choice([COMPLETIONS, TOKENIZE]), "input": RESPONSES}
        endpoint = owners.get(field, RESPONSES if field == "metadata" else CHAT)
        body = {name: given for name, given in MINIMAL[endpoint].items() if name != field}
        if field == "tools":
            body["tool_choice"] = "required"
        rest = f",{json.dumps(body)[1:]}" if body else "}"
        return self._post(chance, number, "large", endpoint, f'{{"{field}":{value}{rest}')

    def _picture(self, chance: random.Random, number: int) -> Hostile:
        urls = chance.choices(values.PICTURES, k=1 if chance.random() < 0.9 else 18)
        details = ("auto", "low", "high")
        parts = [{"type": "image_url", "image_url": {"url": url, "detail": chance.choice(details)}} for url in urls]
        body = copy.deepcopy(MINIMAL[CHAT])
        body["messages"] = [{"role": "user", "content": [*parts, {"type": "text", "text": CANARY}]}]
        return self._post(chance, number, "picture", CHAT, json.dumps(body))

    def _bytes(self, chance: random.Random, number: int) -> Hostile:
        """A body that is no JSON, or not said to be any."""
        endpoint = chance.choice(list(MINIMAL))
        body = http.no_json(chance, json.dumps(MINIMAL[endpoint]).encode())
        headers = {"Content-Type": chance.choice(http.CONTENT_TYPES)}
        if chance.random() < 0.2:
            headers["Content-Encoding"] = chance.choice(["gzip", "br", "deflate", CANARY])
        return self._post(chance, number, "bytes", endpoint, body, headers=headers)

    def _http(self, chance: random.Random, number: int) -> Hostile:
        """A strange method, path, query string or header."""
        method, path, headers, is_rude = (
            "POST",
            chance.choice(list(MINIMAL)),
            {"Content-Type": "application/json"},
            False,
        )
        kind = chance.randrange(5)
        if kind == 0:
            method = chance.choice(http.METHODS)
        elif kind == 1:
            path, method = chance.choice(http.PATHS), chance.choice(["GET", "POST"])
        elif kind == 2:
            path += f"?{chance.choice(http.QUERIES)}"
        elif kind == 3:
            given = chance.choice((*http.HEADERS, *http.RUDE_HEADERS))
            headers |= given
            is_rude = given in http.RUDE_HEADERS
        else:
            return Hostile(number, "http", "other", (chance.choice(http.NO_HTTP),), may_hang_up=True, leaves_after=0.5)
        is_usual = method in http.USUAL_METHODS and path.isascii() and path.startswith("/")
        return Hostile(
            number,
            "http",
            path if path in MINIMAL else "other",
            (_named(http.head(method, path, 2, headers) + b"{}", number),),
            may_hang_up=is_rude or not is_usual,
            has_answer_body=method != "HEAD",
            leaves_after=None if is_usual else 2.0,
        )

    # -- the wire ------------------------------------------------------------------------------------------------

    def _post(
        self,
        chance: random.Random,
        number: int,
        family: str,
        endpoint: str,
        body: str | bytes,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Hostile:
        if isinstance(body, str):
            if chance.random() < 0.4 and endpoint in (CHAT, COMPLETIONS, RESPONSES) and body.startswith("{"):
                body = f'{{"stream":true,{body[1:]}' if body != "{}" else body
            # What json.dumps has not written itself may be half of a character.
            body = body.encode("utf-8", "surrogatepass")
        body = _named(body, number)
        head = _named(http.head("POST", endpoint, len(body), headers or {"Content-Type": "application/json"}), number)
        leaves_after = None
        pieces: tuple[bytes, ...] = (head + body,)
        if endpoint in (CHAT, RESPONSES) and b'tokens": 2' not in body and chance.random() < 0.9:
            leaves_after = 0.3  # most of what is answered until the context is full
        elif chance.random() < 0.1:
            leaves_after = chance.choice([0.0, 0.001, 0.005, 0.02, 0.1])
            if not leaves_after:
                pieces = (head + body[: len(body) // 2],)
        elif chance.random() < 0.1:
            cut = chance.randrange(len(head) + len(body))
            pieces = ((head + body)[:cut], (head + body)[cut:])
        return Hostile(number, family, endpoint, pieces, leaves_after=leaves_after)


def harmless_request() -> bytes:
    """A stream of eight tokens about a picture, the same every time."""
    question = [IMAGE, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0, "stream": True}
    content = json.dumps(body | {"ignore_eos": True}).encode()
    return http.head("POST", CHAT, len(content), {"Content-Type": "application/json"}) + content


def _named(data: bytes, number: int) -> bytes:
    """With the request's own canary wherever there is to be one."""
    return data.replace(CANARY.encode(), f"{CANARY_PREFIX}{number:08d}x".encode())
