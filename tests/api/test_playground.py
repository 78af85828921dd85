"""The playground's files: who gets them, with which headers, and that the page is made of nothing else.

What the page does in a browser is tests/web's.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import pytest
from PIL import Image

from server.api.chat.protocol import ChatCompletionRequest
from server.api.playground import FOLDER, PREFIX, assets
from tests.api.scripted_llm import ScriptedLLM, serving
from tests.api.spellings import ask
from tests.listening import wait_until

ROOT = Path(__file__).parents[2]
KEY = "sk-alice-canary-1234"
PATHS = sorted(assets())
TEXT_FILES = sorted(file for file in FOLDER.rglob("*") if file.suffix in (".html", ".css", ".js", ".svg", ".json"))
SCRIPTS = [file for file in TEXT_FILES if file.suffix == ".js"]

OTHERS = (  # nothing is served there, however it is spelled
    *("/index.html", "/playground", "/playground/", "/playground/index.html", "/playground/samples", "/style.css"),
    *("/playground/samples/", "/playground/style.css/", "//playground/style.css", "/playground/./style.css/.."),
    *("/playground/../config.py", "/playground/../../pyproject.toml", "/playground/%2e%2e/config.py"),
    *(
        "/playground//style.css",
        "/playground/..%2fconfig.py",
        "/playground/..%5cconfig.py",
        "/playground/....//config.py",
    ),
    *("/playground//etc/passwd", "/playground/%2fetc%2fpasswd", "/playground/style.css%00.png"),
    *("/playground/STYLE.CSS", "/playground/style", "/playground/server/config.py", "/playground/samples/../../llm.py"),
)


@pytest.fixture(scope="module")
def keyed_url() -> Iterator[str]:
    with serving(ScriptedLLM(), api_key=[KEY]) as address:
        yield address


@pytest.fixture(scope="module")
def off_url() -> Iterator[str]:
    with serving(ScriptedLLM(), playground=False) as address:
        yield address


class Page(HTMLParser):
    """All elements of the page, each a name and its attributes, and the text within scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.code = ""
        self.feed((FOLDER / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style"):
            self.code += data.strip()


PAGE = Page()


# -- who gets what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_file_is_served_as_what_it_is(url: str, path: str) -> None:
    kinds = {
        "": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".svg": "image/svg+xml",
        ".png": "image/png",
    }
    file = FOLDER / ("index.html" if path == "/" else path.removeprefix(PREFIX))
    answer = httpx.get(url + path)
    assert (answer.status_code, answer.content) == (200, file.read_bytes())
    assert answer.headers["content-type"] == kinds[PurePosixPath(path).suffix]
    head = httpx.head(url + path)
    assert (head.status_code, head.content) == (200, b"")
    told = ("content-type", "content-length", "etag", "content-security-policy")
    assert {name: head.headers[name] for name in told} == {name: answer.headers[name] for name in told}


def test_what_browsers_are_told(url: str) -> None:
    for path in ("/", f"{PREFIX}app.js"):
        headers = httpx.get(url + path).headers
        policy = dict(part.partition(" ")[::2] for part in headers["content-security-policy"].split("; "))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self' data: blob:",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
            "require-trusted-types-for": "'script'",
            "trusted-types": "'none'",
        }
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
        assert headers["cache-control"] == "no-cache"
        assert "set-cookie" not in headers


def test_what_a_browser_has_is_not_sent_again(url: str) -> None:
    for path in PATHS:
        first = httpx.get(url + path)
        tag = first.headers["etag"]
        for condition in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = httpx.get(url + path, headers={"if-none-match": condition})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
            assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
        for condition in ('"other"', tag.strip('"'), ""):
            assert httpx.get(url + path, headers={"if-none-match": condition}).status_code == 200
    assert len({asset.etag for asset in assets().values()}) == len(assets())


def test_the_page_needs_no_key_and_opens_nothing_else(keyed_url: str) -> None:
    for path in PATHS:
        for method in ("GET", "HEAD"):
            assert httpx.request(method, keyed_url + path).status_code == 200, path
            wrong = httpx.request(method, keyed_url + path, headers={"authorization": "Bearer wrong"})
            assert wrong.status_code == 200
        for method in ("POST", "PUT", "DELETE"):
            assert httpx.request(method, keyed_url + path).status_code == 401
    for target in OTHERS:
        assert ask(keyed_url, f"GET {target}")[0] == 401, target
    assert httpx.get(f"{keyed_url}/v1/models").status_code == 401


@pytest.mark.parametrize("target", OTHERS)
def test_only_files_of_the_page_are_found(url: str, target: str) -> None:
    status, body = ask(url, f"GET {target}")
    assert status == 404
    assert json.loads(body)["error"]["code"] == "not_found"


def test_the_page_answers_no_other_methods(url: str) -> None:
    for path in ("/", f"{PREFIX}app.js"):
        answer = httpx.post(url + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_without_the_page_there_is_nothing(off_url: str) -> None:
    for path in PATHS:
        assert httpx.get(off_url + path).status_code == httpx.head(off_url + path).status_code == 404
    with serving(ScriptedLLM(), playground=False, api_key=[KEY]) as address:
        for path in PATHS:
            assert httpx.get(address + path).status_code == 401


def test_the_page_is_shown_under_names_of_the_server_only() -> None:
    """Else a page from elsewhere whose name points here would be the same origin as this one."""
    with serving(ScriptedLLM(), allowed_hosts=["api.example.com"]) as address:
        assert httpx.get(address).status_code == 400
        assert httpx.get(address, headers={"host": "api.example.com"}).status_code == 200


def test_metrics_have_one_name_for_all_files(url: str, llm: ScriptedLLM) -> None:
    for path in (*PATHS, f"{PREFIX}nothing"):
        httpx.get(url + path)
    template = PREFIX + "{name:path}"
    wait_until(lambda: llm.http_count(handler=template, method="GET", status="404") >= 1)
    assert llm.http_count(handler="/", method="GET", status="200") >= 1
    assert llm.http_count(handler=template, method="GET", status="200") >= len(PATHS) - 1


def test_the_page_is_no_part_of_the_api(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert not [path for path in described if path == "/" or path.startswith(PREFIX)]


# -- what the files are ---------------------------------------------------------------------------------------------


def references() -> Iterator[tuple[Path, str]]:
    """Every file that a file of the page asks for, and who does."""
    page = FOLDER / "index.html"
    for _, attributes in PAGE.elements:
        for name in ("src", "href"):
            if attributes.get(name):
                yield page, str(attributes[name]).removeprefix("playground/")
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        for found in re.findall(r'from "\./([^"]+)"|new URL\("([^"]+)", import\.meta\.url\)', text):
            yield script, "".join(found)
    for sample in json.loads((FOLDER / "samples" / "index.json").read_text(encoding="utf-8")):
        yield FOLDER / "samples" / "index.json", f"samples/{sample['file']}"


def test_every_file_that_is_asked_for_exists_and_no_other() -> None:
    asked = {name for _, name in references()} - {"docs"}  # the API's own page
    there = {file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*") if file.is_file()}
    assert asked == there - {"index.html"}


def test_every_module_is_asked_for_at_once() -> None:
    """Else a browser finds one after the other, each a round trip later."""
    preloaded = {str(a["href"]) for _, a in PAGE.elements if a.get("rel") == "modulepreload"}
    assert preloaded == {f"playground/{script.name}" for script in SCRIPTS} - {"playground/app.js"}


def test_a_proxy_may_put_a_path_before_all_of_it() -> None:
    for file, name in references():
        assert not name.startswith(("/", "http:", "https:", "//")), (file, name)
    for script in SCRIPTS:
        assert not re.search(r'(fetch|URL)\(\s*["`]/', script.read_text(encoding="utf-8")), script


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    assert PAGE.code == ""
    for tag, attributes in PAGE.elements:
        assert tag not in ("style", "iframe", "object", "embed", "base")
        assert tag != "script" or attributes["src"]
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
    for file in TEXT_FILES:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        found = re.search(r"https?://[a-z0-9]|@import|\burl\(", text)
        assert found is None, (file, found)


def test_no_text_ever_becomes_markup_or_code() -> None:
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|document\.write|DOMParser"
    forbidden = rf"{markup}|\beval\(|Function\("
    for script in SCRIPTS:
        assert not re.search(forbidden, script.read_text(encoding="utf-8")), script


def test_what_scripts_look_for_is_on_the_page() -> None:
    ids = [str(attributes["id"]) for _, attributes in PAGE.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for script in SCRIPTS:
        for name in re.findall(r'(?:byId|clone)\("([^"]+)"\)', script.read_text(encoding="utf-8")):
            assert name in ids, (script, name)
    for _, attributes in PAGE.elements:
        for name in ("aria-controls", "aria-labelledby", "for"):
            assert attributes.get(name) in (None, *ids)


def test_settings_are_fields_of_the_api_with_its_bounds() -> None:
    fields = {str(a["name"]): a for tag, a in PAGE.elements if tag == "input" and "name" in a}
    assert {"temperature", "top_p", "max_tokens", "seed", "repetition_penalty"} <= set(fields)
    for name, attributes in fields.items():
        bounds: dict[str, Any] = {}
        for item in ChatCompletionRequest.model_fields[name].metadata:
            bounds |= {key: getattr(item, key) for key in ("ge", "le") if hasattr(item, key)}
        low, high = float(str(attributes["min"])), float(str(attributes["max"]))
        if name in ("seed", "top_k"):  # numbers that JavaScript can count to; off has a name of its own
            assert bounds["ge"] <= low < high <= bounds["le"]
        else:
            assert (low, high) == (bounds["ge"], bounds["le"]), name


def test_samples_are_small_and_described() -> None:
    samples = json.loads((FOLDER / "samples" / "index.json").read_text(encoding="utf-8"))
    assert len(samples) >= 4
    for sample in samples:
        assert set(sample) == {"file", "title", "alt", "questions", "answers"}
        assert len(sample["questions"]) == len(sample["answers"])
        assert sample["title"]
        assert sample["alt"]
        assert sample["questions"]
        assert all(question.strip() == question != "" for question in sample["questions"])
        file = FOLDER / "samples" / sample["file"]
        assert file.stat().st_size < 64 << 10
        with Image.open(file) as picture:
            picture.load()
            assert picture.width * 2 == picture.height * 3  # else its card would show a part of it


def test_the_page_is_small() -> None:
    sizes = {file.name: file.stat().st_size for file in TEXT_FILES}
    assert sum(sizes.values()) < 80 << 10, sizes
    for script in SCRIPTS:
        assert script.read_text(encoding="utf-8").count("\n") < 300


def test_an_installed_server_has_all_of_it() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["server"]
    packed = {found for pattern in patterns for found in (ROOT / "server").glob(pattern) if found.is_file()}
    assert {file for file in FOLDER.rglob("*") if file.is_file()} <= packed
