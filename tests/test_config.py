"""Three sources, later ones winning, and nothing that is unknown, mistyped or out of range."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from server.config import ENV_PREFIX, ServerConfig, load_config
from server.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FIELDS = ServerConfig.model_fields


def write(folder: Path, text: str) -> Path:
    file = folder / "server.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def example(name: str) -> tuple[Any, str]:
    """A value of a field other than its default, and how one writes it."""
    field = FIELDS[name]
    kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else [field.annotation]
    kind = kinds[0]
    if kind is bool:
        return (not field.default, str(not field.default).lower())
    if typing.get_origin(kind) is Literal:
        value = next(choice for choice in typing.get_args(kind) if choice != field.default)
        return (value, value)
    if kind is str:
        return ("some-text", "some-text")
    if kind is Path:
        return (Path("some/file"), "some/file")
    if kind in (int, float):
        limits = {
            key: getattr(item, key) for item in field.metadata for key in ("ge", "gt", "le") if hasattr(item, key)
        }
        low, high = limits.get("ge", limits.get("gt")), limits["le"]
        value = kind((low + high) / 2) if high <= 1 else kind(min(max(low + 1, 4000), high))
        return (value, str(value))
    return (["one", "two"], "one,two")


# What else must be set for a field to be set to its example.
COMPANIONS: dict[str, dict[str, Any]] = {
    "max_num_batched_tokens": {"max_num_seqs": 1},
    "ssl_keyfile": {"ssl_certfile": "a.pem"},
    "ssl_certfile": {"ssl_keyfile": "a.pem"},
}


# -- each source by itself ------------------------------------------------------------------------------------------


def test_nothing_given_is_all_defaults() -> None:
    assert load_config() == ServerConfig()
    assert load_config(environ={"PATH": "/bin", "IDEFICS": "x"}, flags={}) == ServerConfig()


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_documented_and_read_from_each_source(name: str, tmp_path: Path) -> None:
    value, text = example(name)
    assert value != FIELDS[name].default
    assert (FIELDS[name].description or "").endswith(".")
    base = COMPANIONS.get(name, {})
    shown = text if isinstance(value, Path) else repr(value)
    yaml_text = f"{name}: {shown}\n".replace("True", "true").replace("False", "false")
    for config in (
        load_config(file=write(tmp_path, yaml_text), flags=base),
        load_config(environ={ENV_PREFIX + name.upper(): text}, flags=base),
        load_config(flags={**base, name: value}),
    ):
        assert getattr(config, name) == value
        assert config.model_dump(exclude={name, *base}) == ServerConfig().model_dump(exclude={name, *base})


# -- their order ----------------------------------------------------------------------------------------------------


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nhost: file\nmax_images: 1\nserved_model_name: [a, b]\n")
    environ = {"IDEFICS2_PORT": "2", "IDEFICS2_HOST": "environment"}
    config = load_config(file=file, environ=environ, flags={"port": 3})
    assert (config.port, config.host, config.max_images) == (3, "environment", 1)
    assert config.served_model_name == ["a", "b"]
    assert load_config(environ=environ, flags={"port": 3}).port == 3
    assert load_config(file=file, flags={"port": 3}).port == 3
    assert load_config(file=file, environ=environ).port == 2


def test_empty_variables_are_unset(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\n")
    assert load_config(file=file, environ={"IDEFICS2_PORT": ""}).port == 1


def test_an_empty_list_variable_is_unset_too(tmp_path: Path) -> None:
    file = write(tmp_path, "served_model_name: [a]\n")
    assert load_config(file=file, environ={"IDEFICS2_SERVED_MODEL_NAME": ""}).served_model_name == ["a"]


def test_lists_in_variables_are_separated_by_commas() -> None:
    assert load_config(environ={"IDEFICS2_SERVED_MODEL_NAME": "a,b/c,,"}).served_model_name == ["a", "b/c"]


def test_variables_are_found_in_any_case() -> None:
    assert load_config(environ={"IDEFICS2_port": "7"}).port == 7


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    for text in ("", "# only a comment\n", "{}"):
        assert load_config(file=write(tmp_path, text)) == ServerConfig()


# -- what is refused ------------------------------------------------------------------------------------------------


def test_unknown_keys_are_named_with_their_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.yaml: unknown key 'prot'; did you mean 'port'\?"):
        load_config(file=write(tmp_path, "prot: 1\n"))
    with pytest.raises(ConfigError, match="environment: unknown key 'max_num_seq'; did you mean 'max_num_seqs'"):
        load_config(environ={"IDEFICS2_MAX_NUM_SEQ": "8"})
    with pytest.raises(ConfigError, match=r"flags: unknown key 'zzzzzz'$"):
        load_config(flags={"zzzzzz": 1})


BAD: list[tuple[str, Any]] = [
    ("port", "http"),
    ("port", -1),
    ("port", 65536),
    ("port", 80.5),
    ("max_num_seqs", 0),
    ("max_num_seqs", None),
    ("max_num_batched_tokens", 0),
    ("gpu_memory_utilization", 0),
    ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", "nan"),
    ("kv_cache_memory_gb", 0),
    ("kv_cache_memory_gb", "inf"),
    ("max_body_mb", "nan"),
    ("max_model_len", 15),
    ("seed", -1),
    ("seed", 2**32),
    ("device", "tpu"),
    ("dtype", "int8"),
    ("engine_client", ""),
    ("enable_prefix_caching", "maybe"),
    ("served_model_name", "name"),
    ("served_model_name", [1]),
    ("image_splitting", False),
    ("image_fetch_timeout", 0),
    ("model", 5),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_wrong_types_and_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^flags: {name}"):
        load_config(flags={name: value})


def test_the_source_of_a_bad_value_is_the_one_that_won(tmp_path: Path) -> None:
    file = write(tmp_path, "port: x\nmax_images: 2\n")
    with pytest.raises(ConfigError, match=r"server\.yaml: port: "):
        load_config(file=file, environ={"IDEFICS2_MAX_IMAGES": "3"})
    with pytest.raises(ConfigError, match=r"environment: port: "):
        load_config(file=file, environ={"IDEFICS2_PORT": "y"})
    assert load_config(file=file, flags={"port": 1}).port == 1


def test_a_bad_value_is_not_repeated() -> None:
    """It may be a secret that slipped into the wrong variable."""
    with pytest.raises(ConfigError) as caught:
        load_config(environ={"IDEFICS2_PORT": "sk-secret"})
    assert "sk-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_tokens_a_step_than_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(63\) must be at least max_num_seqs \(64\)"):
        load_config(flags={"max_num_batched_tokens": 63})
    assert load_config(flags={"max_num_batched_tokens": 64}).max_num_batched_tokens == 64


@pytest.mark.parametrize("text", ["- port\n", "port\n", "port: [1\n", "a: b: c\n", "!!python/object:os.system {}\n"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--config: .*server\.yaml"):
        load_config(file=write(tmp_path, text))


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config: cannot read"):
        load_config(file=tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="--config: cannot read"):
        load_config(file=tmp_path)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match="--config"):
        load_config(file=file)


# -- what a config is -----------------------------------------------------------------------------------------------


def test_a_config_cannot_be_changed() -> None:
    config = ServerConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.port = 1
    with pytest.raises(ValidationError, match="Extra inputs"):
        ServerConfig(unknown=1)  # type: ignore[call-arg]


def test_defaults_pass_their_own_checks() -> None:
    assert ServerConfig(**ServerConfig().model_dump()) == ServerConfig()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_config_in_the_repository_loads(file: Path) -> None:
    config = load_config(file=file)
    assert config != ServerConfig()
    assert config.max_model_len is not None


def test_there_are_configs_to_load() -> None:
    assert len(CONFIGS) >= 4
