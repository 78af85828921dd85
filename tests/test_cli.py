"""The command line: every field a flag, flags over the environment over the file, mistakes in one line."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import server.demo.checkpoint
import server.demo.exam
import server.launch
from server import cli
from server.config import ENV_PREFIX, ServerConfig
from server.errors import CheckpointError, ConfigError
from tests.serving import ROOT
from tests.test_config import COMPANIONS, FIELDS, example

Serve = Callable[..., ServerConfig]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Runs `serve` with these arguments up to the point where a server would start: the config it would have."""
    for name in FIELDS:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)

    def run(*arguments: str) -> ServerConfig:
        started: list[ServerConfig] = []

        def fake_serve(config: ServerConfig) -> int:
            started.append(config)
            return 7

        monkeypatch.setattr(server.launch, "serve", fake_serve)
        assert cli.main(["serve", *arguments]) == 7
        (config,) = started
        return config

    return run


def test_without_arguments_all_is_default(serve: Serve) -> None:
    assert serve() == ServerConfig()


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "model"])
def test_every_field_is_a_flag(serve: Serve, name: str) -> None:
    value, text = example(name)
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        arguments = [flag if value else "--no-" + flag[2:]]
    elif isinstance(value, list):
        arguments = [flag, *value]
    else:
        arguments = [flag, text]
    for other, needed in COMPANIONS.get(name, {}).items():
        arguments += ["--" + other.replace("_", "-"), str(needed)]
    assert getattr(serve(*arguments), name) == value


def test_the_model_is_named_without_a_flag(serve: Serve) -> None:
    assert serve("org/model").model == "org/model"
    assert serve("org/model", "--port", "1").port == serve("--port", "1", "org/model").port == 1
    assert serve("--served-model-name", "a", "b", "--port", "1", "org/model").model == "org/model"


def test_switches_go_both_ways(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve().enable_prefix_caching is True
    assert serve("--no-enable-prefix-caching").enable_prefix_caching is False
    monkeypatch.setenv("IDEFICS2_ENABLE_PREFIX_CACHING", "false")
    assert serve().enable_prefix_caching is False
    assert serve("--enable-prefix-caching").enable_prefix_caching is True


def test_file_then_environment_then_flags(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model: from-file\nport: 1\nhost: file\nmax_images: 1\n", encoding="utf-8")
    monkeypatch.setenv("IDEFICS2_HOST", "environment")
    monkeypatch.setenv("IDEFICS2_PORT", "2")
    config = serve("--config", str(file), "--port", "3")
    assert (config.model, config.port, config.host, config.max_images) == ("from-file", 3, "environment", 1)
    assert serve("--config", str(file), "from-flag").model == "from-flag"


def test_help_names_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert name == "model" or "--" + name.replace("_", "-") in text
        first_words = " ".join((field.description or "").split()[:3])
        assert first_words in text, name
    assert "(default: 8000)" in text
    assert "--no-enable-prefix-caching" in text


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "x"], "flags: port: "),
        (["--max-num-seqs", "0"], "flags: max_num_seqs: "),
        (["--config", "/nowhere/server.yaml"], "--config: cannot read /nowhere/server.yaml"),
        (["--max-num-batched-tokens", "1"], "max_num_batched_tokens (1) must be at least max_num_seqs (64)"),
    ],
)
def test_a_bad_configuration_is_one_line_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], serve: Serve
) -> None:
    assert cli.main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("idefics2-server: ")
    assert message in error
    assert error.count("\n") == 1


def test_unknown_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], serve: Serve
) -> None:
    monkeypatch.setenv("IDEFICS2_PROT", "1")
    assert cli.main(["serve"]) == 2
    assert "environment: unknown key 'prot'; did you mean 'port'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serf"],
        ["serve", "--prot", "1"],
        ["serve", "--por", "1"],  # no abbreviations: they would break when a flag is added
        ["serve", "--device", "tpu"],
        ["serve", "--port"],
        ["serve", "a", "b"],
        ["make-demo", "--dtype", "int8"],
    ],
)
def test_unknown_commands_flags_and_choices_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: idefics2-server" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ConfigError("what is wrong"), CheckpointError("what is wrong")])
def test_a_server_that_cannot_start_says_why_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], serve: Serve
) -> None:
    def fail(config: ServerConfig) -> int:
        raise error

    monkeypatch.setattr(server.launch, "serve", fail)
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "idefics2-server: what is wrong\n"


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    def interrupted(config: ServerConfig) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.launch, "serve", interrupted)
    assert cli.main(["serve"]) == 130


# -- make-demo ------------------------------------------------------------------------------------------------------


def test_make_demo_writes_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls: list[tuple[object, ...]] = []

    def write(out: Path, size: str, *, seed: int, dtype: str, text_only: Path | None, weights: bool) -> None:
        assert weights
        calls.append((out, size, seed, dtype, text_only))

    monkeypatch.setattr(server.demo.checkpoint, "write_checkpoint", write)
    monkeypatch.setattr(server.demo.checkpoint, "ensure_demo", lambda: tmp_path / "bundled")
    assert cli.main(["make-demo"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'bundled'}\n"
    out, text = tmp_path / "out", tmp_path / "text"
    assert cli.main(["make-demo", str(out), "--size", "8b", "--seed", "3", "--text-only", str(text)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert calls == [(out, "8b", 3, "float32", text)]


def test_without_a_folder_the_bundled_model_is_examined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[Path, int, int, str]] = []

    def examine(
        folder: Path, *, count: int, seed: int, show: Callable[[str], None], quantization: str
    ) -> dict[str, float]:
        asked.append((folder, count, seed, quantization))
        show("a wrong answer")
        return {"numbers": 0.975, "words": 1.0}

    monkeypatch.setattr(server.demo.exam, "examine_folder", examine)
    monkeypatch.setattr(server.demo.checkpoint, "ensure_demo", lambda: tmp_path / "bundled")
    assert cli.main(["make-demo", "--examine", "40"]) == 0
    table = "| 40 pictures each, seed 0 | right |\n| --- | --- |\n| numbers | 97.5% |\n| words | 100.0% |\n"
    assert capsys.readouterr() == (table, "a wrong answer\n")
    assert cli.main(["make-demo", str(tmp_path), "--examine", "1", "--seed", "2", "--quantization", "int8"]) == 0
    assert capsys.readouterr().out.startswith("| 1 pictures each, seed 2, int8 | right |")
    assert asked == [(tmp_path / "bundled", 40, 0, "none"), (tmp_path, 1, 2, "int8")]


def test_a_demo_of_unknown_size_is_refused(tmp_path: Path) -> None:
    try:
        status = cli.main(["make-demo", str(tmp_path / "out"), "--size", "huge"])
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2
    assert not (tmp_path / "out").exists()


# -- roots of their own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run-batch", "bench", "chat"])
def test_each_root_has_its_own_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: idefics2-server {name}" in shown
    assert "--base-url" in shown


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for name in ("serve", "run-batch", "bench", "chat", "make-demo"):
        assert re.search(rf"\n    {name}\s", shown), name


def test_chat_is_given_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.chat import cli as chat_cli

    given: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        given.append(args)
        return 5

    monkeypatch.setattr(chat_cli, "run", run)
    assert cli.main(["chat", "--once", "bench", "--image", "a", "b", "--temperature", "0.5"]) == 5
    (args,) = given
    assert (args.once, args.image, args.temperature) == ("bench", ["a", "b"], 0.5)


def test_a_chat_that_cannot_begin_says_why_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--base-url", "nowhere", "--once", "a"]) == 2
    assert capsys.readouterr().err == "idefics2-server: --base-url: must be an http(s) URL\n"


def test_a_chat_starts_without_the_model_and_the_load_generator() -> None:
    code = "import sys; from server import cli; cli._parser(['chat']).parse_args(['chat']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "tokenizers", "numpy", "PIL", "fastapi", "uvicorn"} & set(
        loaded.stdout.split()
    )


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--steps", "0"], "--steps must be more than 0, not 0"),
        (["--minutes", "-1"], "--minutes must be more than 0, not -1.0"),
        (["--minutes", "nan"], "--minutes must be more than 0, not nan"),
        (["--drawers", "0"], "--drawers must be more than 0, not 0"),
        (["--device", "cuda"], "training on cuda: there is no such device"),
    ],
)
def test_a_training_that_cannot_be_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    problem: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("server.observability.logs.configure_logging", lambda: None)  # it is the whole process's
    assert cli.main(["make-demo", str(tmp_path / "out"), "--train", *flags]) == 2
    assert problem in capsys.readouterr().err


def test_training_is_planned_for_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr("server.observability.logs.configure_logging", lambda: None)
    monkeypatch.setattr("server.demo.training.train", lambda folder, plan, **options: planned.append((plan, options)))
    out = tmp_path / "out"
    for flags in ([], ["--device", "cuda", "--steps", "50", "--drawers", "3", "--minutes", "2"]):
        assert cli.main(["make-demo", str(out), "--train", "--seed", "4", *flags]) == 0
    (small, usual), (large, told) = planned
    assert (small.pictures, small.seed, large.steps, large.seed) == (64, 4, 50, 4)
    # About as many pictures on either.
    assert 0.5 < (small.steps * small.pictures) / (8_000 * large.pictures) < 2
    assert usual == {"keep": out.with_name("out-training"), "device": "cpu", "num_drawers": 1, "minutes": float("inf")}
    assert told == {"keep": out.with_name("out-training"), "device": "cuda", "num_drawers": 3, "minutes": 2.0}


def test_training_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["make-demo", "--train"]) == 2
    assert "--train needs a folder to write" in capsys.readouterr().err
