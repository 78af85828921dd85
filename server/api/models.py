"""GET /v1/models and /v1/models/{id}: every name that the one model goes by."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server.api.schemas import error_answers
from server.errors import NotFoundError

if TYPE_CHECKING:
    from server.llm import AsyncLLM


class ModelCard(BaseModel):
    """`root` and `max_model_len` are not OpenAI's; benchmarks read both."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "idefics2-server"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def check_model(name: str, names: Sequence[str]) -> str:
    """`name`, if it is one that the model goes by; NotFoundError otherwise."""
    if name not in names:
        served = ", ".join(f"'{known}'" for known in names)
        raise NotFoundError(
            f"the model that was asked for does not exist; served is {served}", param="model", code="model_not_found"
        )
    return name


def models_router(llm: AsyncLLM) -> APIRouter:
    router = APIRouter(tags=["Models"])
    created = int(time.time())

    def card(name: str) -> ModelCard:
        return ModelCard(id=name, created=created, root=llm.model_root, max_model_len=llm.max_model_len)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[card(name) for name in llm.model_names])

    # A path, because ids of the hub have a slash in them, which clients send as it is or as %2F.
    @router.get("/v1/models/{model_id:path}", responses=error_answers(404))
    async def retrieve_model(model_id: str) -> ModelCard:
        return card(check_model(model_id, llm.model_names))

    return router
