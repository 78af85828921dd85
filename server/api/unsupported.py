"""What this server does not do, and says so: fields that would change or constrain an answer, were they honoured.

A field that is merely a hint, or that clients send to every server, is ignored instead and does not stand here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from server.errors import ClientError

logger = logging.getLogger(__name__)

# Field → the values that ask for nothing. An explicit null always counts as absent.
_PARAMETERS: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "custom_logit_processor": (),
    "early_stopping": (False,),
    "ebnf": (),
    "function_call": ("none", "auto"),
    "logprob_token_ids": ([],),
    "lora_path": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "moderation": (),
    "prompt_logprobs": (),
    "return_hidden_states": (False,),
    "return_prompt_text": (False,),
    "return_tokens_as_token_ids": (False,),
    "stop_regex": ([],),
    "use_beam_search": (False,),
    "watermark": (False,),
    "web_search_options": (),
}
# Fields of which some values are served: these.
_VALUES: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "echo": (False,),
    "modalities": (["text"],),
    "spaces_between_special_tokens": (True,),
    "typical_p": (1, 1.0),
}
# Fields that are ignored although their senders believe that they work → what they should send.
_MISTAKEN = {"repeat_penalty": "repetition_penalty"}


def refuse_unsupported(body: Mapping[str, Any], *, served: Collection[str] = ()) -> None:
    """Raise ClientError for the first field of a request body that would have to be honoured and is not.

    `served` are those of these fields that the endpoint knows itself what to do with.
    """
    for name, harmless in _PARAMETERS.items():
        if name in body and name not in served and not _is_harmless(body[name], harmless):
            raise unsupported_parameter(name)
    for name, harmless in _VALUES.items():
        if name in body and name not in served and not _is_harmless(body[name], harmless):
            raise unsupported_value(name, f"only {harmless[0]!r} is")
    for name, better in _MISTAKEN.items():
        if body.get(name) is not None:
            logger.warning("the request's %s is ignored: the field is called %s", name, better)


def unsupported_parameter(param: str) -> ClientError:
    return ClientError(f"'{param}' is not supported by this server", param=param, code="unsupported_parameter")


def unsupported_value(param: str, supported: str) -> ClientError:
    """`supported` completes the sentence, for example "only 1 is"."""
    message = f"this value of '{param}' is not supported; {supported}"
    return ClientError(message, param=param, code="unsupported_value")


def _is_harmless(value: object, harmless: tuple[object, ...]) -> bool:
    # True equals 1 in Python, but not in JSON.
    return value is None or any(type(value) is type(good) and value == good for good in harmless)
