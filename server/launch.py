"""The one place that builds and wires: configuration in, running engine and application out."""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import json
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import uvloop

from server.admission import Admission
from server.api.app import build_app
from server.api.warm_up import warm_up as warm_up_api
from server.config import ServerConfig
from server.connections.listener import open_sockets
from server.connections.server import CUT_SECONDS, DrainingServer
from server.connections.tls import tls_context
from server.demo.checkpoint import ensure_demo, with_processor
from server.engine.client import CoreFactory, ProcessClient, ThreadClient
from server.engine.core import EngineCore, EngineInfo
from server.engine.limits import SchedulerLimits
from server.engine.scheduler import Scheduler
from server.engine.supervisor import EngineSupervisor
from server.engine.warm_up import warm_up
from server.errors import CheckpointError, ConfigError
from server.grammar.checker import GrammarChecker
from server.grammar.compiler import GrammarCompiler
from server.grammar.vocabulary import VocabularySpec
from server.inputs.chat_template import ChatTemplate, read_chat_template
from server.inputs.image_fetch import ImageFetcher
from server.inputs.image_pool import ImagePool
from server.inputs.images import ImageLoader
from server.inputs.processor import InputProcessor
from server.inputs.tokenizer import Tokenizer
from server.keys import NO_KEYS, KeyRing, load_keys
from server.llm import AsyncLLM
from server.model.attention.choose import choose_attention
from server.model.config import ModelConfig, load_model_config
from server.model.idefics2 import Idefics2Model
from server.model.layers.packed import Packing, choose_packing
from server.model.loader import load_model, resolve_model
from server.model.mistral import MistralLayer
from server.model.weight_map import num_parameters
from server.observability.logs import configure_logging
from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import TokenTable
from server.outputs.processor import OutputProcessor
from server.runner.grammars import GrammarBank
from server.runner.hardware import choose_device, choose_dtype, choose_quantization, record_decodes, set_threads
from server.runner.kv_cache import allocate_kv_cache, block_bytes
from server.runner.memory import choose_context, kv_budget_bytes
from server.runner.model_runner import ModelRunner
from server.runner.sampler import Sampler
from server.runner.vision_runner import VisionRunner

logger = logging.getLogger(__name__)

# Tokens and pixels a step takes by default. On CPU a step's time grows with both from the first token on, and running
# streams wait for it; on CUDA they are nearly free until the matrix units are full.
DEFAULT_BUDGETS = {"cpu": (384, 1 << 16), "cuda": (4096, 5 * 980 * 980)}

DRAIN_POLL_SECONDS = 0.05


def resolve_folder(config: ServerConfig) -> Path:
    """The checkpoint's folder, downloaded or written first if need be."""
    if config.model is None:
        return ensure_demo()
    folder = resolve_model(config.model, config.revision, weights=config.load_format == "auto")
    return folder if config.load_format == "auto" else with_processor(folder)


def build_core(config: ServerConfig, folder: Path, *, index: int = 0, pack_weights: bool = True) -> EngineCore:
    """Load the model, put an engine around it and warm it up. Runs in the engine's own thread or process.

    `index` says which of the `data_parallel_size` engines it is. Without `pack_weights` its matrices stay plain: the
    twin that benchmarks and tests compare with.
    """
    started = time.perf_counter()
    set_threads(config)
    device = choose_device(config.device, index)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whatever names no device means this one
    dtype = choose_dtype(config.dtype, device)
    packing = choose_packing(choose_quantization(config, device), device, dtype) if pack_weights else None
    model_config = load_model_config(folder)
    default_tokens, default_pixels = DEFAULT_BUDGETS[device.type]
    max_tokens = config.max_num_batched_tokens or max(default_tokens, config.max_num_seqs)
    max_pixels = config.max_num_batched_pixels or default_pixels
    attention = choose_attention(config.attention_backend, model_config.text, device, dtype)
    model = load_model(
        folder,
        model_config,
        attention=attention,
        device=device,
        dtype=dtype,
        packing=packing,
        load_format=config.load_format,
        seed=config.seed,
        progress=True,
    )
    budget = kv_budget_bytes(
        device=device,
        requested_gib=config.kv_cache_memory_gb,
        gpu_memory_utilization=config.gpu_memory_utilization,
        run_largest_step=functools.partial(_largest_step, model, model_config, max_tokens, max_pixels),
    )
    num_blocks, max_model_len = choose_context(
        budget_bytes=budget,
        block_bytes=block_bytes(model_config, block_size=config.block_size, dtype=dtype),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        requested_len=config.max_model_len,
        model_len=model_config.text.max_position_embeddings,
    )
    runner = ModelRunner(
        model,
        attention=attention,
        caches=allocate_kv_cache(
            model_config, num_blocks=num_blocks, block_size=config.block_size, device=device, dtype=dtype
        ),
        vision=VisionRunner(
            model,
            num_slots=config.encoder_cache_tiles,
            rows_per_tile=model_config.perceiver.num_latents,
            hidden=model_config.text.hidden_size,
            device=device,
        ),
        sampler=Sampler(model_config.suppressed_token_ids, device),
        grammars=GrammarBank(GrammarCompiler(_vocabulary(Tokenizer(folder), model_config))),
        device=device,
    )
    if device.type == "cuda" and config.cuda_graphs:
        record_decodes(runner, max_num_seqs=config.max_num_seqs, max_model_len=max_model_len)
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max_tokens,
        max_num_batched_pixels=max_pixels,
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        num_tile_slots=config.encoder_cache_tiles,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    longest_step_seconds = 0.0
    if config.warm_up:
        longest_step_seconds = warm_up(
            limits, runner, tile_edge=model_config.images.longest_edge, rows_per_tile=model_config.perceiver.num_latents
        )
    info = EngineInfo(
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_size=config.block_size,
        num_tile_slots=config.encoder_cache_tiles,
        device=str(device),
        dtype=_describe(dtype, packing),
        num_parameters=num_parameters(model_config),
        load_seconds=time.perf_counter() - started,
        longest_step_seconds=longest_step_seconds,
    )
    keep_startup_objects()
    return EngineCore(Scheduler(limits), runner, info)


def _describe(dtype: torch.dtype, packing: Packing | None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if packing is None or packing.name == name else f"{name} with {packing.name} weights"


def keep_startup_objects() -> None:
    """Take all that exists now out of garbage collection, which goes through it for a tenth of a second each time."""
    gc.collect()
    gc.freeze()


@torch.inference_mode()
def _largest_step(model: Idefics2Model, config: ModelConfig, max_tokens: int, max_pixels: int) -> None:
    """The memory peak of a step without its KV cache: the widest layer over a full batch, and full-size tiles."""
    device = next(model.parameters()).device
    edge = config.images.longest_edge
    max_tiles = max(max_pixels // edge**2, 1)
    model.encode_tiles(torch.zeros((max_tiles, edge, edge, 3), dtype=torch.uint8, device=device))
    embeddings = model.embed(torch.zeros(max_tokens, dtype=torch.int64, device=device))
    cast(MistralLayer, model.text.layers[0]).mlp(embeddings)
    model.compute_logits(embeddings[: min(max_tokens, 256)])


def _token_table(tokenizer: Tokenizer) -> TokenTable:
    return TokenTable.from_pieces(tokenizer.pieces(), tokenizer.special_tokens.values())


def _vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> VocabularySpec:
    table = _token_table(tokenizer)
    return VocabularySpec(
        token_bytes=table.token_bytes,
        special_token_ids=table.special_ids,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.text.vocab_size,
    )


def build_engines(config: ServerConfig, factories: Sequence[CoreFactory]) -> list[EngineSupervisor]:
    """What starts an engine of each factory whenever there is none."""
    client = ProcessClient if config.engine_client == "process" else ThreadClient
    return [
        EngineSupervisor(
            functools.partial(client, factory),
            stall_seconds=config.engine_stall_seconds,
            max_restarts=config.max_engine_restarts,
        )
        for factory in factories
    ]


def build_inputs(config: ServerConfig, folder: Path, metrics: ServerMetrics) -> InputProcessor:
    """Template, tokenizer and image pipeline of a checkpoint. Raises CheckpointError when they contradict its model."""
    model = load_model_config(folder)
    tokenizer = Tokenizer(folder)
    if tokenizer.image_token_id != model.image_token_id:
        raise CheckpointError(
            f"{folder}: the tokenizer's image token is {tokenizer.image_token_id}, the model's {model.image_token_id}"
        )
    num_pieces = len(tokenizer.pieces())
    if num_pieces > model.text.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {num_pieces - 1}, the model only {model.text.vocab_size} of them"
        )
    return InputProcessor(
        tokenizer=tokenizer,
        template=ChatTemplate(
            read_chat_template(folder, tokenizer.chat_template), special_tokens=tokenizer.special_tokens
        ),
        images=_build_images(config, model, metrics),
        grammars=GrammarChecker(_vocabulary(tokenizer, model)),
        metrics=metrics,
        rows_per_tile=model.perceiver.num_latents,
        eos_token_ids=model.eos_token_ids,
        max_images=config.max_images,
        share_caches_between_keys=config.share_caches_between_keys,
    )


def _build_images(config: ServerConfig, model: ModelConfig, metrics: ServerMetrics) -> ImageLoader:
    try:
        fetcher = ImageFetcher(
            max_bytes=config.max_image_bytes,
            timeout=config.image_fetch_timeout,
            allowed_domains=config.allowed_media_domains,
        )
    except ValueError as error:
        raise ConfigError(f"allowed_media_domains: {error}") from None
    return ImageLoader(
        fetcher,
        ImagePool(
            config.image_workers,
            config.image_decode_timeout,
            max_pixels=config.max_image_pixels,
            settings=model.images,
            metrics=metrics,
        ),
        model.images,
        splitting=config.image_splitting,
        max_bytes=config.max_image_bytes,
        metrics=metrics,
    )


def build_llm(config: ServerConfig, keys: KeyRing = NO_KEYS, *, factory: CoreFactory | None = None) -> AsyncLLM:
    """Everything but HTTP. Fails early, with one line, on a checkpoint or a configuration that cannot work.

    `factory` makes another engine than the checkpoint's.
    """
    folder = resolve_folder(config)
    size = config.data_parallel_size
    choose_device(config.device, size - 1)  # fails now where there are fewer
    factories = [factory or functools.partial(build_core, config, folder, index=index) for index in range(size)]
    model_root = config.model or "idefics2-demo"
    names = tuple(config.served_model_name) or (model_root,)
    metrics = ServerMetrics(names[0], compat=config.metrics_compat)
    inputs = build_inputs(config, folder, metrics)
    numbers = f"{config.dtype} {config.quantization} {config.load_format}"
    described = f"{(folder / 'config.json').read_text(encoding='utf-8')} {numbers}"
    return AsyncLLM(
        admission=Admission(
            max_in_flight=size * config.max_num_seqs + config.max_num_queued_reqs,
            max_queued_tokens=config.max_num_queued_tokens,
            key_limits=keys.limits,
        ),
        engines=build_engines(config, factories),
        inputs=inputs,
        outputs=OutputProcessor(_token_table(inputs.tokenizer), metrics),
        metrics=metrics,
        model_names=names,
        model_root=model_root,
        vocab_size=load_model_config(folder).text.vocab_size,
        fingerprint=hashlib.sha256(described.encode()).hexdigest()[:8],
    )


def serve(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT. Liveness answers while the model loads. Raises ConfigError or CheckpointError."""
    configure_logging(format=config.log_format)
    logger.info("configuration: %s", json.dumps(config.shown()))
    keys = load_keys(config)
    config = config.model_copy(update={"api_key": []})  # from here on, and in the engine's process, nobody needs them
    return run_server(config, build_llm(config, keys), keys)


def run_server(config: ServerConfig, llm: AsyncLLM, keys: KeyRing = NO_KEYS) -> int:
    """Serve an engine that has not been started yet, until SIGTERM or SIGINT. Raises ConfigError."""
    tls = tls_context(config)
    app = build_app(llm, config, keys)
    app.openapi()  # the page and the routes, which else are made by the first request, while others wait
    server = DrainingServer(app, config, metrics=llm.metrics, tls=tls)
    keep_startup_objects()
    sockets = open_sockets(config.host, config.port)

    async def run() -> int:
        await warm_up_api(app)
        return await _serve(llm, server, sockets, config.shutdown_timeout)

    return uvloop.run(run())


async def _serve(llm: AsyncLLM, server: DrainingServer, sockets: list[socket.socket], shutdown_timeout: float) -> int:
    loading = asyncio.create_task(_load(llm, server))
    draining = asyncio.create_task(_drain(llm, server, shutdown_timeout))
    try:
        await server.serve(sockets)
    finally:
        draining.cancel()
        loading.cancel()
        await asyncio.wait([loading])
        await llm.close()
    await loading
    return server.exit_status


async def _drain(llm: AsyncLLM, server: DrainingServer, seconds: float) -> None:
    """From the first signal on: a 503 for what is new, and after `seconds` an error event for what is still running.

    The sockets stay open until nothing is, so that clients are told to come back rather than refused a connection.
    """
    await server.leaving.wait()
    llm.drain()
    logger.info("leaving: %d requests get up to %g s to finish", llm.num_in_flight, seconds)
    deadline = time.monotonic() + seconds
    while llm.num_in_flight and time.monotonic() < deadline and not server.in_haste:  # noqa: ASYNC110 - rare
        await asyncio.sleep(DRAIN_POLL_SECONDS)
    if llm.num_in_flight:
        logger.warning("leaving: %d requests are ended", llm.num_in_flight)
    llm.end_all()
    server.leave(CUT_SECONDS if server.in_haste else max(deadline - time.monotonic(), 0) + CUT_SECONDS)


async def _load(llm: AsyncLLM, server: DrainingServer) -> None:
    """Start the engine; if it cannot start, the server goes too."""
    try:
        info = await llm.start()
    except BaseException:
        if server.leaving.is_set():
            return  # stopped by the operator while loading
        server.leave(CUT_SECONDS)
        raise
    logger.info(
        "ready: %s, %.0f M parameters in %s on %s, %.1f s; context %d, %d KV blocks of %d tokens, %d tile slots",
        ", ".join(llm.model_names),
        info.num_parameters / 1e6,
        info.dtype,
        info.device,
        info.load_seconds,
        info.max_model_len,
        info.num_blocks,
        info.block_size,
        info.num_tile_slots,
    )
