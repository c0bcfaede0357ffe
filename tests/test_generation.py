"""The inference job: a running batch refilled as sequences end, the same text on any number of ranks, a file to resume.

The oracle is transformers' own model and `generate`, one prompt at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, reference_model
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankFailed, run_ranks

from moe_runtime.errors import ConfigError
from moe_runtime.launch import cli
from moe_runtime.launch.bench.generate_ranks import fixed_batches
from moe_runtime.launch.generation import gain, options
from moe_runtime.launch.generation.batch import RunningBatch, Settings, together
from moe_runtime.launch.generation.output import Sink, take_up
from moe_runtime.launch.generation.requests import Request, read_requests
from moe_runtime.launch.generation.sampling import Sampling, choose, gumbel
from moe_runtime.launch.generation.serve import deal
from moe_runtime.launch.jobs import generate as job
from moe_runtime.launch.tokenizers import byte_tokenizer

ENDS = [17, 99, 130, 201, 222, 254]  # with random weights one in 43 sampled tokens, so that lengths differ
LENGTHS = (1, 3, 8, 20, 37)


def some_prompts(count: int, seed: int = 0) -> list[str]:
    pick = random.Random(seed)
    return ["".join(chr(pick.randint(97, 122)) for _ in range(pick.choice(LENGTHS))) for _ in range(count)]


def small_model(family: str = "deepseek_v3"):
    # V3.2 selects by scores that are exactly 0 where no head finds anything; with 4 heads such ties are common, and how
    # topk resolves them depends on the padding.
    changes = {"index_n_heads": 16} if family == "deepseek_v32" else {}
    return reference_model(family, vocab_size=258, pad_token_id=257, **changes)


def alone(model, prompt: str, new_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt.encode())])
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()


def run_batch(model, prompts: list[str], limits: list[int] | None = None, **changes) -> list:
    """Each prompt's Sequence, in their order."""
    batch = RunningBatch(model, byte_tokenizer(), Settings(**changes))
    for number, prompt in enumerate(prompts):
        batch.add(number, prompt, limits[number] if limits else None)
    with torch.inference_mode():
        return sorted(batch.run(100_000), key=lambda sequence: sequence.number)


@pytest.fixture(scope="module")
def v3():
    return small_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, v3) -> Path:
    """A checkpoint whose sequences end at unequal lengths, and a file of 17 prompts."""
    folder = tmp_path_factory.mktemp("generation")
    v3.save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS, "pad_token_id": 257}))
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in some_prompts(17)))
    return folder


def words(folder: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", folder / "model", "--tokenizer", "bytes", "--input", folder / "in.jsonl", "--output", output]
    return [*map(str, given), "--max-new-tokens", "40", "--batch-size", "3", *more]


SAMPLED = ["--temperature", "0.9", "--top-k", "200", "--top-p", "0.98", "--seed", "7", "--logprobs"]


# ---- the running batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refilled_batch_gives_each_prompt_what_it_gets_alone(family):
    model, prompts = small_model(family), some_prompts(11)
    limits = [random.Random(1 + at).randint(1, 24) for at in range(len(prompts))]
    expected = [alone(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    for chunk in (512, 5):  # prompts that share a prefill, and prompts that take several
        sequences = run_batch(model, prompts, limits, batch_size=4, prefill_chunk=chunk)
        assert [sequence.tokens for sequence in sequences] == expected


def test_a_finished_sequences_place_is_taken_at_once(v3):
    class Counted(RunningBatch):
        def _take_tokens(self, sequences, logits):
            sizes.append(len(sequences))
            return super()._take_tokens(sequences, logits)

    sizes: list[int] = []
    batch = Counted(v3, byte_tokenizer(), Settings(batch_size=4))
    for number, limit in enumerate([30, 30, 30] + [5] * 6):
        batch.add(number, "abcd", limit)
    with torch.inference_mode():
        batch.run(100_000)
    assert sizes.count(1) == 5  # each prefill after the first lets in the one prompt that there is room for
    assert sizes.count(4) == 1 + 6 * 4  # one prefill for the first four; 5 tokens of six sequences beside the long ones


def test_padding_that_no_sequence_needs_any_more_is_given_back(v3):
    batch = RunningBatch(v3, byte_tokenizer(), Settings(batch_size=2))
    batch.add(0, "a" * 30, 5)
    batch.add(1, "b" * 20, 12)
    with torch.inference_mode():
        batch.run(4)
        assert batch._running.mask.shape == (2, 33) and batch._running.cache.get_seq_length() == 33
        batch.run(1)
    assert batch._running.mask.shape == (1, 24) and batch._running.cache.get_seq_length() == 24


def test_families_that_cannot_be_refilled_say_so(v3):
    fixed = RunningBatch(small_model("deepseek_v4"), byte_tokenizer(), Settings()).describe()[0]
    assert "fixed" in fixed and "deepseek_v4" in fixed
    assert "refilled" in RunningBatch(v3, byte_tokenizer(), Settings()).describe()[0]


def test_what_a_checkpoint_asks_for_and_is_not_done_is_said(v3):
    v3.generation_config.repetition_penalty = 1.2
    try:
        assert "repetition_penalty not applied" in RunningBatch(v3, byte_tokenizer(), Settings()).describe()[1]
    finally:
        v3.generation_config.repetition_penalty = None


def test_stop_strings_end_a_sequence_across_tokens_and_are_not_part_of_the_text(v3):
    prompts = some_prompts(6)
    whole = run_batch(v3, prompts, max_new_tokens=30)
    stop = next(s.text[at : at + 2] for s in whole for at in range(8, 28) if s.text[at : at + 2].isprintable())
    assert len(stop) == 2  # two tokens of the byte tokenizer at least
    stopped = run_batch(v3, prompts, max_new_tokens=30, stop=("never there", stop))
    assert any(stop in sequence.text for sequence in whole)
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert before.tokens[: len(after.tokens)] == after.tokens
        if stop in before.text:
            decoded = byte_tokenizer().decode(after.tokens)
            assert decoded == after.text + stop  # it ends with the token that completes the stop string


def test_log_probabilities_are_those_of_plain_transformers(v3):
    for temperature in (0.0, 0.8):
        sampling = Sampling(temperature, top_k=9)
        for sequence in run_batch(v3, some_prompts(5), max_new_tokens=7, logprobs=True, sampling=sampling):
            ids = torch.tensor([sequence.ids + sequence.tokens])
            with torch.no_grad():
                logits = v3(ids).logits[0, len(sequence.ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence.tokens).view(-1, 1)).view(-1)
            torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_prompts_share_a_prefill_while_they_fit_and_are_no_more_than_half_padding():
    assert together([5, 5, 5, 5], room=3, tokens=100) == [0, 1, 2]
    assert together([5, 5, 5, 5], room=4, tokens=14) == [0, 1]
    assert together([30, 2, 28, 2], room=4, tokens=100) == [
        0,
        1,
        2,
    ]  # 90 columns for 60 tokens; 120 for 62 are too many
    assert together([600, 5], room=2, tokens=512) == [0]
    assert together([4, 5, 4], room=3, tokens=1, padding=False) == [0, 2]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 40), st.integers(1, 8))
def test_requests_go_to_the_ranks_that_have_the_fewest(held, waiting, room):
    ranks = deal(waiting, held, room)
    after = [count + ranks.count(rank) for rank, count in enumerate(held)]
    assert len(ranks) == min(waiting, sum(max(0, room - count) for count in held))
    given = [after[rank] for rank in set(ranks)]
    assert all(count <= room for count in given) and (not given or max(given) <= min(after) + 1)


def test_the_gain_of_a_placement_is_counted_from_what_was_computed():
    load_RLE = np.zeros((2, 1, 4), dtype=np.int64)
    load_RLE[0, 0, [0, 2]], load_RLE[1, 0, [1, 3]] = (40, 10), (40, 10)  # an even split would have 80 and 20
    assert gain.busiest(load_RLE, [1.0, 1.0]) == (50.0, 80.0)
    assert gain.busiest(load_RLE, [2.0, 1.0]) == (50.0, 40.0)
    assert "1.60 times as many" in gain.describe(load_RLE, [1.0, 1.0])
    assert "nothing was computed" in gain.describe(load_RLE * 0, [1.0, 1.0])


# ---- sampling -------------------------------------------------------------------------------------------------------


def kept_by_hand(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities [V] that top-k, then top-p leave, straight from their definitions."""
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    kept = order[: sampling.top_k or len(order)]
    p = np.exp(scores[kept] - scores[kept].max())
    p /= p.sum()
    before = np.cumsum(p) - p  # of all that are likelier
    kept, p = kept[before < sampling.top_p], p[before < sampling.top_p]
    whole = np.zeros(len(logits))
    whole[kept] = p / p.sum()
    return whole


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, 8, 0.7), Sampling(2.0, 0, 0.9)]
)
def test_tokens_come_as_often_as_top_k_and_top_p_define(sampling):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    draws = 4000
    tokens = choose(logits.expand(draws, -1), sampling, [(5, index) for index in range(draws)])
    expected = kept_by_hand(logits[0].numpy(), sampling)
    seen = np.bincount(tokens.numpy(), minlength=12) / draws
    assert not seen[expected == 0].any()
    np.testing.assert_allclose(seen, expected, atol=4 * (0.25 / draws) ** 0.5)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**31), st.integers(-(2**63), 2**63 - 1), st.floats(0.1, 3), st.integers(0, 9), st.floats(0.05, 1)
)
def test_a_token_depends_on_seed_line_and_index_alone_and_is_one_of_those_kept(drawn, seed, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p, seed)
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(drawn))
    keys = [(drawn % 1000, 0), (2, 3), (2, 4)]
    together = choose(logits, sampling, keys).tolist()
    assert together == [choose(logits[row : row + 1], sampling, [key]).item() for row, key in enumerate(keys)]
    for row, token in enumerate(together):
        assert kept_by_hand(logits[row].numpy(), Sampling(temperature, top_k, min(1, top_p + 1e-5)))[token] > 0


def test_the_noise_is_the_same_on_every_machine_and_differs_for_every_token():
    np.testing.assert_allclose(gumbel(7, 3, 2, 3), PINNED, rtol=1e-12)
    others = {gumbel(seed, line, index, 1)[0] for seed in (0, 1, -1) for line in (1, 2) for index in (0, 1, 2)}
    assert len(others) == 18


PINNED = [-0.0235406246037214, -0.37618718900032283, -0.39176650724440304]


# ---- ranks, output, resuming ----------------------------------------------------------------------------------------


def run_job(arguments: list[str]) -> int:
    return job.main(arguments)


def answers(folder: Path, name: str, ranks: int, *more: str) -> str:
    output = folder / f"{name}.jsonl"
    run_ranks(run_job, ranks, words(folder, output, *more))
    return output.read_text()


@pytest.fixture(scope="module")
def sampled(folder) -> str:
    """What one rank writes."""
    return answers(folder, "one", 1, *SAMPLED)


def without_logprobs(text: str) -> list[dict]:
    return [{key: value for key, value in json.loads(line).items() if key != "logprobs"} for line in text.splitlines()]


@pytest.mark.parametrize(("ranks", "more"), [
    (2, []), (3, []), (1, ["--batch-size", "1"]), (2, ["--prefill-chunk", "7"]), (2, ["--halves", "on"]),
    (3, ["--halves", "on", "--batch-size", "5"]), (1, ["--halves", "on"]), (3, ["--halves", "off"]),
])  # fmt: skip
def test_a_seed_gives_the_same_text_on_any_number_of_ranks_and_in_any_batch(folder, sampled, ranks, more):
    found = answers(folder, f"{ranks}{''.join(more)}", ranks, *SAMPLED, *more)
    assert without_logprobs(found) == without_logprobs(sampled)
    for line, other in zip(found.splitlines(), sampled.splitlines(), strict=True):
        np.testing.assert_allclose(json.loads(line)["logprobs"], json.loads(other)["logprobs"], rtol=1e-4, atol=1e-4)


def what_job_says(arguments: list[str]) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        job.main(arguments)
    return said.getvalue()


def test_whether_halves_pay_is_measured_and_said(folder):
    said = [run_ranks(what_job_says, ranks, words(folder, folder / "said.jsonl"))[0] for ranks in (1, 2)]
    assert "halves: off, rows do not travel" in said[0]
    measured = r"pass of \d+ tokens \d+\.\d ms at once and \d+\.\d ms"
    assert re.search(rf"halves: (on|off), measured by turns: decode {measured}, prefill {measured}", said[1])


def test_answers_are_in_the_inputs_order_and_of_unequal_length(folder, sampled):
    records = [json.loads(line) for line in sampled.splitlines()]
    assert [record["line"] for record in records] == list(range(1, 18))
    assert [record["prompt"] for record in records] == some_prompts(17)
    assert len({record["tokens"] for record in records}) > 5
    assert all(len(record["logprobs"]) == record["tokens"] for record in records)


def test_another_seed_gives_another_text(folder, sampled):
    other = without_logprobs(answers(folder, "other", 1, *SAMPLED, "--seed", "8"))
    assert sum(a["text"] == b["text"] for a, b in zip(other, without_logprobs(sampled), strict=True)) < 3


def test_ranks_without_a_prompt_take_part(folder):
    arguments = ["--model", str(folder / "model"), "--tokenizer", "bytes", "--prompt", "abc", "--max-new-tokens", "3"]
    run_ranks(run_job, 3, [*arguments, "--output", str(folder / "few.jsonl")])
    assert json.loads((folder / "few.jsonl").read_text())["tokens"] == 3


def killed_after(lines: int, arguments: list[str]) -> None:
    write = Sink.write

    def then_die(self) -> None:
        write(self)
        if len(self._records) >= lines:
            os.kill(os.getpid(), signal.SIGKILL)

    Sink.write = then_die
    job.main(arguments)


def test_a_killed_run_is_resumed_to_the_same_file(folder, sampled):
    output = folder / "killed.jsonl"
    arguments = words(folder, output, *SAMPLED, "--resume")  # there is nothing to take up yet
    run_ranks(killed_after, 1, 5, arguments, expect_dead=(0,))
    left = output.read_text()
    assert left == sampled[: len(left)] and 5 <= left.count("\n") < 17
    output.write_text(left + '{"line": 9, "prom')  # as if it had been writing
    run_ranks(run_job, 2, arguments)
    assert output.read_text()[: len(left)] == left
    assert without_logprobs(output.read_text()) == without_logprobs(sampled)
    whole = output.read_text()
    run_ranks(run_job, 1, arguments)  # nothing is left to do
    assert output.read_text() == whole


def test_without_resume_an_output_file_is_overwritten_only_when_the_model_is_there(folder, tmp_path):
    (tmp_path / "model").mkdir()
    for name in os.listdir(folder / "model"):
        (tmp_path / "model" / name).write_bytes((folder / "model" / name).read_bytes())
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "n_routed_experts": 12}))
    with pytest.raises(RankFailed, match="CheckpointError"):
        run_ranks(run_job, 1, words(tmp_path, output))
    assert output.read_text() == "precious\n"


def read_other_input(folder: Path) -> None:
    name = f"in{os.environ['RANK']}.jsonl"
    (folder / name).write_text(json.dumps({"prompt": name}))
    arguments = words(folder, folder / "unused.jsonl")
    arguments[arguments.index("--input") + 1] = str(folder / name)
    with pytest.raises(ConfigError, match="rank 1 reads other prompts"):
        job.main(arguments)


def test_ranks_that_read_different_input_are_told(folder):
    run_ranks(read_other_input, 2, folder)


def test_a_prompt_may_have_any_character_inside(tmp_path):
    prompts = ["a\u2028b", "c\x85d", "e\nf"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "in.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read_requests([], tmp_path / "in.jsonl") == [Request(at, prompt) for at, prompt in enumerate(prompts, 1)]


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ('{"line": 1, "prompt": "b", "text": "x", "tokens": 1}\n', "line 1 of .* is not the result of input line 1"),
        ('{"line": 2, "prompt": "a", "text": "x", "tokens": 1}\n', "is not the result of input line 1"),
        ("text\n", "line 1 of .* is not JSON"),
        ("text\nof something else", "line 1 of .* is not JSON"),
        ("[]\n", "line 1 of .* is not a result"),
        ('{"line": 1, "prompt": "a", "text": "x", "tokens": 1, "logprobs": [0]}\n', "was written with --logprobs"),
        ('{"line": 1, "prompt": "a", "text": "x", "tokens": 1}\n' * 3, "has 3 results, the input only 2"),
    ],
)
def test_resuming_a_file_of_something_else_is_refused(tmp_path, left, told):
    (tmp_path / "out.jsonl").write_text(left)
    with pytest.raises(ConfigError, match=told):
        take_up(tmp_path / "out.jsonl", [Request(1, "a"), Request(2, None, "not JSON")], logprobs=False)
    assert (tmp_path / "out.jsonl").read_text() == left


def test_the_benchs_fixed_batches_do_the_same_work(v3):
    prompts, limits = some_prompts(7), [3, 9, 1, 5, 2, 8, 4]
    requests = [Request(number, prompt, None, limits[number]) for number, prompt in enumerate(prompts)]
    fixed = fixed_batches(v3, requests, 0, 1, 3, nullcontext, lambda mine: [mine])
    refilled = run_batch(v3, prompts, limits, batch_size=3)
    assert fixed == {one.number: [one.text, len(one.tokens), []] for one in refilled}


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--top-k", "-1"], "--top-k"),
        (["--top-p", "1.5"], "'1.5' is not a number above 0 and at most 1"),
        (["--temperature", "warm"], "'warm' is not a number of at least 0"),
        (["--batch-size", "0"], "of at least 1"),
        (["--prefill-chunk", "0"], "of at least 1"),
        (["--stop", ""], "stops nothing"),
        (["--dtype", "int8"], "--dtype"),
        (["--top-k", "3"], "--temperature 0 does not sample"),
        (["--resume"], "give --output too"),
        (["--input", "x.jsonl"], "give --prompt (once or more) or --input"),
    ],
)
def test_a_bad_value_is_told_by_the_launcher_before_any_rank_starts(more, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "--model", "m", "--prompt", "x", *more]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_the_launcher_passes_on_is_what_the_job_reads():
    given = [
        "--model",
        "m",
        "--prompt",
        "-x",
        "--prompt=a b",
        "--stop",
        "\n",
        "--top_p",
        "0.5",
        "--resume",
        "--seed",
        "-3",
    ]
    passed = cli._parser().parse_args(["generate", *[w if w != "-x" else "y" for w in given]]).job_arguments
    read = options.parse(passed)
    assert (read.prompt, read.stop, read.top_p, read.resume, read.seed) == (["y", "a b"], ["\n"], 0.5, True, -3)
