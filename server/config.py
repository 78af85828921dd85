"""The server's configuration: one frozen model, filled from a YAML file, then the environment, then flags.

Every field is a flag of `idefics2-server serve` (`max_num_seqs` is `--max-num-seqs`), an environment variable
(`IDEFICS2_MAX_NUM_SEQS`) and a YAML key. Names are vLLM's where the meaning is the same. Nothing is read at import;
what only the hardware can tell (how many blocks fit) is decided later and never written back here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.errors import ConfigError

ENV_PREFIX = "IDEFICS2_"


class ServerConfig(BaseModel):
    """All settings of a server. Fields without a default in hardware terms are None: chosen at start, and logged."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # What is served.
    model: str | None = Field(None, description="Checkpoint folder or hub id; none: the bundled demo model.")
    served_model_name: list[str] = Field(
        [], description="Names that clients may use; the first is reported. Default: the model as given."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="'dummy' fills the shapes of config.json with random weights."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of dummy weights.")

    # The machine.
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto' takes a GPU when there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="'auto': bfloat16, or float32 on a CPU without bfloat16 instructions."
    )
    quantization: Literal["auto", "none", "fp16", "int8"] = Field(
        "auto",
        description="Weights on a CPU: 'fp16' halves what float32 reads, 'int8' (activations too) quarters it. 'auto': "
        "as dtype says, or fp16 where dtype is 'auto' too and the CPU has no bfloat16 instructions.",
    )
    attention_backend: Literal["auto", "sdpa", "triton"] = Field(
        "auto",
        description="'triton': kernels of ours over the paged cache; 'sdpa': PyTorch's, over gathered blocks. "
        "'auto': triton on CUDA if it agrees with sdpa at the start, else sdpa.",
    )
    cuda_graphs: bool = Field(True, description="Replay recorded steps of decodes on CUDA, with attention by triton.")
    engine_client: Literal["thread", "process"] = Field(
        "process", description="Where the engine runs: beside the API in a thread, or in a process of its own."
    )
    data_parallel_size: int = Field(
        1, ge=1, le=64, description="Engines behind this API, each with the whole model: on CUDA one a device."
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of each engine; default: all cores, shared among the engines."
    )

    # The engine.
    max_model_len: int | None = Field(
        None, ge=16, le=1 << 20, description="Longest prompt plus answer in tokens; default: the model's, if it fits."
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Requests that run at once.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, le=1 << 20, description="Tokens a step may compute; default: 384 on CPU, 4096 on CUDA."
    )
    max_num_batched_pixels: int | None = Field(
        None,
        ge=1,
        le=1 << 30,
        description="Pixels a step may encode; a larger tile takes several steps. Default: 65536 on CPU, five tiles of "
        "980×980 on CUDA.",
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens in a block of the KV cache.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of GPU memory to use in all.")
    kv_cache_memory_gb: float | None = Field(
        None, gt=0, le=4096, description="GiB for the KV cache; default: what is left of the GPU, 4 on CPU."
    )
    encoder_cache_tiles: int = Field(
        128, ge=1, le=65536, description="Embedded tiles to keep for reuse, on the device."
    )
    enable_prefix_caching: bool = Field(True, description="Reuse KV blocks of prompts that begin alike.")
    share_caches_between_keys: bool = Field(
        False, description="Let requests of one API key find what another's have computed; timing then tells of it."
    )
    warm_up: bool = Field(True, description="Run the largest steps once before the server says that it is ready.")
    engine_stall_seconds: float | None = Field(
        None, gt=0, le=3600, description="Silence of a working engine that means it hangs; default: from its own steps."
    )
    max_engine_restarts: int = Field(
        3, ge=0, le=100, description="Restarts of a dead or hung engine within ten minutes before the server gives up."
    )

    # The front end.
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    ssl_keyfile: Path | None = Field(None, description="Private key (PEM); with --ssl-certfile, serve over TLS.")
    ssl_certfile: Path | None = Field(None, description="Certificate chain (PEM).")
    ssl_ca_certs: Path | None = Field(None, description="Authorities (PEM); clients must show a certificate of theirs.")
    allowed_hosts: list[str] = Field([], description="Values of the Host header that are answered; default: any.")
    max_connections: int | None = Field(
        None, ge=1, le=1 << 20, description="Connections at once; more get a 503. Default: what open files allow."
    )
    header_timeout: float = Field(10.0, gt=0, le=600, description="Seconds for the head of a request to arrive.")
    body_timeout: float = Field(30.0, gt=0, le=3600, description="Seconds for the body of a request to arrive.")
    max_body_mb: float = Field(32.0, gt=0, le=1024, description="Largest request body in MiB.")
    keep_alive_seconds: float = Field(15.0, gt=0, le=3600, description="Silence after which a stream gets a comment.")
    inject_tools: bool = Field(
        False, description="Describe a request's tools to the model, as text before the conversation."
    )
    playground: bool = Field(True, description="Serve a page at / on which to try the model.")
    metrics_compat: Literal["vllm", "none"] = Field(
        "vllm", description="Also report under the metric names that vLLM's dashboards and autoscalers read."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines: text, or an object each.")
    shutdown_timeout: float = Field(
        30.0, ge=0, le=3600, description="Seconds that running requests get to finish after SIGTERM."
    )

    # Who may ask, and for how much.
    api_key: list[str] = Field(
        [],
        repr=False,
        description="Keys that clients must show, as 'key' or 'name=key'. Everybody on the machine sees flags: better "
        "in the environment or in --api-key-file.",
    )
    api_key_file: Path | None = Field(
        None, description="File with a key a line: 'key', 'name=key', and after it limits of its own."
    )
    max_reqs_per_key: int | None = Field(
        None, ge=1, le=1 << 20, description="Requests of one key's name at a time; more are answered 429."
    )
    max_tokens_per_minute_per_key: int | None = Field(
        None, ge=1, le=1 << 40, description="Tokens of prompts and answers that one key's name gets in a minute."
    )
    max_num_queued_reqs: int = Field(
        512, ge=1, le=1 << 20, description="Requests held beyond those running; more are answered 429."
    )
    max_num_queued_tokens: int | None = Field(
        None, ge=1, le=1 << 40, description="Prompt tokens that wait to be computed; default: 8 full contexts."
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86400, description="Seconds for a request from its arrival to its last token."
    )

    # Images.
    image_splitting: Literal["auto", "on", "off"] = Field(
        "auto",
        description="What detail 'auto' means: split, whole, or the checkpoint's own setting.",
    )
    allowed_media_domains: list[str] = Field(
        [], description="Domains, with what is below them, that pictures may be fetched from; default: all public ones."
    )
    max_images: int = Field(16, ge=0, le=1024, description="Images in one request, over all its messages.")
    max_image_bytes: int = Field(20 << 20, ge=1024, le=1 << 30, description="Encoded size of one image.")
    max_image_pixels: int = Field(40_000_000, ge=1024, le=1 << 30, description="Width times height of one image.")
    image_fetch_timeout: float = Field(5.0, gt=0, le=120, description="Seconds to download one image in all.")
    image_decode_timeout: float = Field(10.0, gt=0, le=120, description="Seconds to decode and resize one image.")
    image_workers: int = Field(1, ge=1, le=64, description="Processes that decode and resize images.")

    @model_validator(mode="after")
    def _consistent(self) -> ServerConfig:
        budget = self.max_num_batched_tokens
        if budget is not None and budget < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({self.max_num_seqs}): "
                "every running request may need one token a step"
            )
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile go together")
        return self

    def shown(self) -> dict[str, Any]:
        """All settings as they may be logged: what has no place in a repr is masked."""
        secret = {name for name, field in type(self).model_fields.items() if not field.repr}
        values = self.model_dump(mode="json")
        return {name: "***" if name in secret and value else value for name, value in values.items()}


_LISTS = {name for name, field in ServerConfig.model_fields.items() if field.default == []}


def load_config(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> ServerConfig:
    """Merge the three sources, later ones winning, and check the result.

    `flags` holds only what was given on the command line. Raises ConfigError naming the key: unknown in any source,
    of the wrong type, or out of range.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        sources.append((str(file), _read_yaml(file)))
    sources.append(("environment", _read_environment(environ or {})))
    sources.append(("flags", flags or {}))
    for source, given in sources:
        for key, value in given.items():
            if key not in ServerConfig.model_fields:
                raise ConfigError(f"{source}: unknown key {key!r}{_suggest(key)}")
            values[key] = value
            origin[key] = source
    try:
        return ServerConfig(**values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or "config"
        source = origin.get(str(problem["loc"][0]), "config") if problem["loc"] else "config"
        raise ConfigError(f"{source}: {key}: {problem['msg']}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # What the library says of it quotes the file, which may hold keys.
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f": see line {mark.line + 1}"
        raise ConfigError(f"--config: {file} is not YAML{place}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {file} must hold a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """`IDEFICS2_MAX_NUM_SEQS=8` gives {"max_num_seqs": "8"}; lists are separated by commas, empty means unset."""
    found: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX):
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if text:
            found[key] = [part for part in text.split(",") if part] if key in _LISTS else text
    return found


def _suggest(key: str) -> str:
    import difflib

    close = difflib.get_close_matches(key, ServerConfig.model_fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
