"""The input of `generate`: prompts of the command line or of a file, and what is wrong with lines that are none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One prompt, or why line `number` (from 1) of the input is not one."""

    number: int
    prompt: str | None
    error: str | None = None
    max_new_tokens: int | None = None  # of this one alone, where not all have the same


def read_requests(prompts: list[str], file: Path | None) -> list[Request]:
    """From --prompt, or a JSONL file of {"prompt": "..."} lines; a bad line becomes a Request with an error."""
    if file is None:
        return [Request(number, prompt) for number, prompt in enumerate(prompts, 1)]
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would cut at a text's U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    return [_read_line(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_line(number: int, line: str) -> Request:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Request(number, None, f"not JSON ({error})")
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"]:
        return Request(number, None, 'needs a non-empty string under "prompt"')
    return Request(number, record["prompt"])
