"""The one list of `moe-launch generate`'s options: the launcher passes them on, the job reads them.

Nothing heavy is imported here: the launcher needs the list for `--help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...core.cluster import EXPERT_DTYPES
from ...core.errors import ConfigError
from ..options import Parser, whole_number


def _number(least: float, most: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def _some_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text stops nothing")
    return text


_MANY = {"action": "append", "default": []}
_FLAG = {"action": "store_true", "default": False}
_INFINITY = float("inf")

# name -> what argparse needs to know.
OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"metavar": "DIR", "type": Path, "required": True, "help": "checkpoint folder"},
    "--prompt": {"metavar": "TEXT", **_MANY, "help": "a prompt (repeatable)"},
    "--input": {"metavar": "FILE.jsonl", "type": Path, "help": 'prompts, one {"prompt": "..."} a line'},
    "--output": {
        "metavar": "FILE.jsonl",
        "type": Path,
        "help": "where the answers go, one JSON object a line, in the input's order (default: text on stdout)",
    },
    "--resume": {
        **_FLAG,
        "help": "go on with an --output file that an ended run left; give all other options as they were",
    },
    "--max-new-tokens": {
        "metavar": "N",
        "type": whole_number(1),
        "default": 64,
        "help": "tokens to generate for each prompt (default: 64)",
    },
    "--batch-size": {
        "metavar": "N",
        "type": whole_number(1),
        "default": 8,
        "help": "sequences a rank works on at once; a finished one's place is taken by the next prompt (default: 8)",
    },
    "--prefill-chunk": {
        "metavar": "N",
        "type": whole_number(1),
        "default": 512,
        "help": "prompt tokens in one forward pass of a rank, at most: longer prompts take several passes, short ones "
        "share one (default: 512)",
    },
    "--halves": {
        "choices": ("auto", "on", "off"),
        "default": "auto",
        "help": "run a rank's sequences in two halves by turns, one computing while the other's rows travel; auto "
        "measures whether that is faster here (default: auto)",
    },
    "--dtype": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "default": "auto",
        "help": "of the weights; auto: the checkpoint's. float32 gives the same text on any number of ranks and in any "
        "batch; in the others rounding differs with what runs together, and now and then a token with it",
    },
    "--keep-fp8": {**_FLAG, "help": "leave experts stored in FP8 as FP8"},
    "--expert-dtype": {
        "choices": ("auto", *EXPERT_DTYPES),
        "default": "auto",
        "help": "what every rank holds its experts in; auto: as the cluster file says, else 8 bits where memory_gib "
        "asks (default: auto)",
    },
    "--tokenizer": {
        "metavar": "auto|bytes",
        "default": "auto",
        "help": "the checkpoint's tokenizer, or one token per byte",
    },
    "--placement": {
        "metavar": "plan.json",
        "type": Path,
        "help": "which expert lives where, as moe-launch plan writes it",
    },
    "--rebalance": {
        **_FLAG,
        "help": "move experts between ranks while it runs, where that pays (as --runtime rebalance=auto); the gain is "
        "said at the end",
    },
    "--record": {"metavar": "FILE.npz", "type": Path, "help": "write the load trace of this run"},
    "--temperature": {
        "metavar": "X",
        "type": _number(0, _INFINITY, "a number of at least 0"),
        "default": 0.0,
        "help": "0 takes the likeliest token (default); above 0 samples from softmax(logits / X)",
    },
    "--top-k": {
        "metavar": "N",
        "type": whole_number(0),
        "default": 0,
        "help": "sample among the N likeliest tokens (default: 0, all)",
    },
    "--top-p": {
        "metavar": "P",
        "type": _number(1e-9, 1, "a number above 0 and at most 1"),
        "default": 1.0,
        "help": "sample among the likeliest tokens that have P of the probability together (default: 1, all)",
    },
    "--seed": {
        "metavar": "N",
        "type": int,
        "default": 0,
        "help": "of the sampling; a prompt's text follows from it and the prompt's line, not from ranks or batches",
    },
    "--stop": {
        "metavar": "TEXT",
        "type": _some_text,
        **_MANY,
        "help": "end a sequence where TEXT appears; its text ends before it (repeatable)",
    },
    "--logprobs": {
        **_FLAG,
        "help": "also give each new token's log-probability (of the model's own distribution, before temperature)",
    },
    "--timeout-s": {
        "metavar": "SECONDS",
        "type": _number(1e-3, _INFINITY, "a number of seconds above 0"),
        "default": 300.0,
        "help": "deadline of each wait for other ranks (default: 300)",
    },
    "--runtime": {
        "metavar": "KEY=VALUE",
        **_MANY,
        "help": "a runtime setting, such as wire_format=fp8,int8,exact (repeatable)",
    },
    "--json": {**_FLAG, "help": "one JSON object on stdout, everything else on stderr"},
}


def to_pass_on() -> dict[str, dict[str, Any]]:
    """The options as the launcher reads them: checked, and then handed to the job as they were written."""
    passed = {}
    for name, settings in OPTIONS.items():
        kept = {key: value for key, value in settings.items() if key not in ("action", "default")}
        passed[name] = {**kept, "nargs": 0, "default": False} if settings.get("action") == "store_true" else kept
    return passed


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's arguments. Raises ConfigError for what cannot be."""
    parser = Parser(prog="moe-launch generate", description="continue prompts with a sharded model")
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.add_argument("--cluster", help="cluster file")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """What options say together. Raises ConfigError."""
    if bool(arguments.prompt) == bool(arguments.input):
        raise ConfigError("give --prompt (once or more) or --input FILE.jsonl")
    if arguments.resume and not arguments.output:
        raise ConfigError("--resume goes on with a file: give --output too")
    if arguments.temperature == 0 and (arguments.top_k or arguments.top_p < 1):
        raise ConfigError(
            "--top-k and --top-p restrict sampling, and --temperature 0 does not sample: give one above 0"
        )
