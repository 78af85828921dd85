"""The demo model's own vocabulary, loaded once for all tests of this package."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.demo.checkpoint import END_OF_UTTERANCE_ID, EOS_ID, VOCAB_SIZE, write_checkpoint
from server.grammar.compiler import GrammarCompiler
from server.inputs.tokenizer import Tokenizer
from server.outputs.detokenizer import TokenTable
from tests.grammar.walks import Model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_checkpoint(folder, "tiny", weights=False)
    tokenizer = Tokenizer(folder)
    table = TokenTable.from_pieces(tokenizer.pieces(), tokenizer.special_tokens.values())
    # As in a checkpoint whose logits are padded: 61 ids more than the tokenizer has.
    return Model(table, eos_token_ids=(EOS_ID, END_OF_UTTERANCE_ID), vocab_size=VOCAB_SIZE + 61)


@pytest.fixture(scope="session")
def compiler(model: Model) -> GrammarCompiler:
    return GrammarCompiler(model.vocabulary)
