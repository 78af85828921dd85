"""The checkpoint's tokenizer, with one promise: text from a user never becomes a special token.

Knows nothing of templates or pictures. Safe to use from several threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoTokenizer

from server.errors import CheckpointError

FAKE_TOKEN = "<fake_token_around_image>"
IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"


class Tokenizer:
    """Encodes runs of text between special tokens, exactly as the checkpoint's own tokenizer would in place.

    special_tokens     text → id of every special token
    bos_token_ids      what the tokenizer puts before a prompt: [1], or [] where `add_bos_token` is off
    """

    def __init__(self, folder: Path) -> None:
        try:
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            backend: BackendTokenizer = loaded.backend_tokenizer
        except Exception as error:
            # transformers raises whatever it stumbled over; the operator needs the folder and one line.
            raise CheckpointError(f"{folder}: cannot load the tokenizer: {str(error).splitlines()[0]}") from error
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in loaded.added_tokens_decoder.items() if token.special
        }
        for token in (FAKE_TOKEN, IMAGE_TOKEN, END_OF_UTTERANCE):
            if token not in self.special_tokens:
                raise CheckpointError(f"{folder}: the tokenizer has no special token {token}")
        self.bos_token_ids: list[int] = loaded("").input_ids
        self.chat_template: str | None = loaded.chat_template if isinstance(loaded.chat_template, str) else None
        self._first, self._next = _plain_text_copies(backend)
        self._pieces = {token_id: piece for piece, token_id in backend.get_vocab(with_added_tokens=True).items()}
        self._longest_piece = max(len(piece) for piece in self._pieces.values())

    @property
    def fake_token_id(self) -> int:
        return self.special_tokens[FAKE_TOKEN]

    @property
    def image_token_id(self) -> int:
        return self.special_tokens[IMAGE_TOKEN]

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of a run of text; `first` when no special token stands before it but BOS.

        Names of special tokens in `text` are plain characters here.
        """
        tokenizer = self._first if first else self._next
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names; ids beyond the vocabulary add nothing."""
        text: str = self._next.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Vocabulary piece of each id; empty for ids that have none."""
        return [self._pieces.get(token_id, "") for token_id in token_ids]

    def min_tokens(self, num_characters: int) -> int:
        """A lower bound on the ids of a text, known without encoding it."""
        return num_characters // self._longest_piece

    def pieces(self) -> Sequence[str | None]:
        """Vocabulary piece of each id, None where there is none."""
        return [self._pieces.get(token_id) for token_id in range(max(self._pieces) + 1)]


def _plain_text_copies(backend: BackendTokenizer) -> tuple[BackendTokenizer, BackendTokenizer]:
    """Copies that take special tokens' names for plain text: for the first run of a prompt, and for later ones.

    With `legacy: true` a `▁` starts every run of text, so a run encodes alike wherever it stands, and both are one.
    Without it (prepend_scheme "first") only the first run gets one, and a copy for later runs must not add it.
    """
    serialized = backend.to_str()
    first: BackendTokenizer = BackendTokenizer.from_str(serialized)
    first.encode_special_tokens = True
    scheme = first.pre_tokenizer
    if not isinstance(scheme, Metaspace) or scheme.prepend_scheme != "first":
        return first, first
    later: BackendTokenizer = BackendTokenizer.from_str(serialized)
    later.encode_special_tokens = True
    later.pre_tokenizer = Metaspace(scheme.replacement, prepend_scheme="never", split=scheme.split)
    return first, later
