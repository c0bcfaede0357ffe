"""Tokenizers for the jobs: a checkpoint's own, or bytes.

The byte-level one is an ordinary Hugging Face tokenizer whose 256 tokens are the 256 bytes (id = byte value), so a
checkpoint trained with it is complete for plain transformers too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError, ConfigError

END_OF_TEXT, PADDING = 256, 257
BYTE_VOCABULARY = 258


def byte_tokenizer() -> Any:
    """A PreTrainedTokenizerFast over bytes: ids 0..255 are byte values, 256 ends a text, 257 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    assert fast.eos_token_id == END_OF_TEXT and fast.pad_token_id == PADDING
    return fast


def load_tokenizer(kind: str, model: Path) -> Any:
    """kind "auto": the checkpoint's own tokenizer. kind "bytes": the byte-level one."""
    if kind == "bytes":
        return byte_tokenizer()
    if kind != "auto":
        raise ConfigError(f"--tokenizer must be auto or bytes, got {kind!r}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{model}: no tokenizer that transformers can read ({str(error).splitlines()[0]}); "
            "copy the tokenizer's files there, or give --tokenizer bytes"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in characters]
    characters |= {byte: chr(256 + position) for position, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]
