"""Training data: which files, which tokens, from the cache or not; windows once per epoch; mistakes told clearly."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from moe_runtime.errors import ConfigError
from moe_runtime.launch.data import Batches, ValidationBatches, documents, find_files, held_out, open_corpus
from moe_runtime.launch.data.encoding import Encoder, encode_bytes
from moe_runtime.launch.data.order import shuffled
from moe_runtime.launch.tokenizers import END_OF_TEXT, byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
PARTS = ["<|end|>", "<|pad|>", "<|", "é", " ", "\r\n"]
TEXT = "def f(x):\n    return x + 1  # é, ü and 漢字\n"


@pytest.fixture(scope="module")
def learnt():
    """A BPE tokenizer as users have: learnt merges, an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture
def corpus(tmp_path):
    """open_corpus in tmp_path with a cache there."""

    def of(*sources: str, tokenizer=TOKENIZER, **options):
        return open_corpus(sources, tmp_path, tokenizer, cache=tmp_path / "cache", **options)

    return of


def ids(*texts: str) -> list[int]:
    """Byte tokens of whole documents."""
    return [token for text in texts for token in [*text.encode(), END_OF_TEXT]]


# ---------------------------------------------------------------- which files


def test_sources_are_paths_or_globs_relative_or_absolute(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b[1].txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)

    def names(*sources: str) -> list[str]:
        return [file.path.name for file in find_files(sources, tmp_path)]

    assert names("b[1].txt") == ["b[1].txt"]
    assert names("a.txt") == names(str(tmp_path / "a.txt")) == ["a.txt"]
    assert names("**/*.txt") == names(f"{tmp_path}/**/*.txt") == ["a.txt", "b[1].txt", "c.txt"]
    assert names("deep/*.txt", "a.txt") == ["c.txt", "a.txt"]


def test_a_folder_stands_for_its_text_files_in_an_order_of_their_names(tmp_path, corpus):
    for name in ("z/1", "a b/2", "a/3", "a.txt", ".git/config", "a/.hidden"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "folder" / "picture").write_bytes(b"\x89PNG\0\0")
    np.save(tmp_path / "folder" / "tokens.npy", np.arange(9))
    (tmp_path / "folder" / "rows.jsonl").write_text('{"text": "row"}\n')
    (tmp_path / "folder" / "empty").write_text("")
    found = corpus("folder")
    assert found.tokens.tolist() == ids("a/3", "a b/2", "a.txt", "row", "z/1")
    assert "5 documents" in found.describe() and "2 binary files skipped" in found.describe()


def test_the_standard_library_is_a_source(tmp_path):
    names = [file.path.name for file in find_files(["python-standard-library"], tmp_path)]
    assert "argparse.py" in names and "test_argparse.py" not in names and len(names) > 300


# ---------------------------------------------------------------- which tokens


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(PARTS)).map("".join))
@settings(max_examples=60, deadline=None)
def test_the_fast_path_of_bytes_is_what_the_tokenizer_encodes(text):
    assert encode_bytes(text.encode()).tolist() == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_fast_path_is_taken_for_the_byte_tokenizer_of_a_checkpoint_too(tmp_path, learnt):
    TOKENIZER.save_pretrained(tmp_path)
    assert Encoder(load_tokenizer("auto", tmp_path)).bytes_only
    assert not Encoder(learnt).bytes_only


def test_every_document_is_encoded_by_itself_and_ends_with_end_of_text(tmp_path, corpus, learnt):
    texts = [TEXT * 3, " leading space", "no newline", "<eos>"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    found = corpus("*.txt", tokenizer=learnt)
    learnt.backend_tokenizer.enable_truncation(3)  # as some checkpoints come; it must not apply here
    expected = [i for text in texts for i in [*learnt(text, truncation=False)["input_ids"], learnt.eos_token_id]]
    assert found.tokens.tolist() == expected
    assert found.tokens.dtype == np.uint16 and isinstance(found.tokens, np.memmap)
    assert not found.tokens.flags.writeable


def test_a_tokenizer_written_in_python_serves_too_and_its_tokens_are_found_again(tmp_path, corpus):
    (tmp_path / "a.txt").write_text("text")
    first, again = (corpus("a.txt", tokenizer=ByT5Tokenizer()) for _ in range(2))
    assert first.tokens.tolist() == [byte + 3 for byte in b"text"] + [1]
    assert "from the cache" in again.describe()


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path, corpus, learnt):
    (tmp_path / "a.txt").write_text("word")
    large = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "word": 70_000}, unk_token="<eos>")), eos_token="<eos>"
    )
    found = corpus("a.txt", tokenizer=large)
    assert found.tokens.dtype == np.uint32 and found.tokens.tolist() == [70_000, 0]


def test_jsonl_gives_a_document_a_line(tmp_path, corpus):
    rows = ['\ufeff{"body": "one"}', "", '{"body": "tw\\u00f6", "id": 2}', '{"body": ""}', '{"body": "half \\ud800"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert corpus("rows.jsonl", text_key="body").tokens.tolist() == ids("one", "twö", "half ?")


def test_text_that_is_not_utf8_is_read_as_bytes_or_replaced_and_counted(tmp_path, corpus, learnt):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "good.txt").write_text("café")
    assert corpus("latin.txt").tokens.tolist() == [*b"caf\xe9 au lait", END_OF_TEXT]
    found = corpus("*.txt", tokenizer=learnt)
    assert learnt.decode(found.tokens) == "café<eos>caf\ufffd au lait<eos>"
    assert "1 files not UTF-8" in found.describe()


def test_a_long_document_is_a_stream_and_no_piece_breaks_a_line_or_a_character(tmp_path, corpus, learnt, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 10)
    text = TEXT * 5 + "漢字" * 20
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "row.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    assert corpus("long.txt", "row.jsonl").tokens.tolist() == ids(text, text)
    found = corpus("long.txt", tokenizer=learnt)
    assert learnt.decode(found.tokens) == text + "<eos>"
    assert "1 long documents encoded in pieces" in found.describe()
    assert "pieces" not in corpus("long.txt").describe()


# ---------------------------------------------------------------- token arrays


def test_one_array_is_used_in_place(tmp_path, corpus):
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.int32))
    found = corpus("a.npy", tokenizer=None)
    assert found.tokens.filename == tmp_path / "a.npy" and found.tokens.tolist() == list(range(1000))
    assert not list(tmp_path.glob("cache/*.bin"))
    assert "used in place" in found.describe()


def test_arrays_and_text_are_joined_in_the_order_of_the_sources(tmp_path, corpus):
    np.save(tmp_path / "a.npy", np.array([5, 6], np.int64))
    (tmp_path / "b.txt").write_text("text")
    np.array([7, 8], np.uint16).tofile(tmp_path / "c.bin")
    assert corpus("c.bin", "b.txt", "a.npy").tokens.tolist() == [7, 8, *ids("text"), 5, 6]
    joined = corpus("*.bin", "*.npy", tokenizer=None)
    assert joined.tokens.tolist() == [7, 8, 5, 6] and "joined now" in joined.describe()


def test_raw_arrays_of_nanogpt_llm_c_and_megatron_are_understood(tmp_path, corpus):
    tokens = np.array([3, 1, 4, 60_000], np.uint16)
    tokens.tofile(tmp_path / "nanogpt.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 4
    (tmp_path / "llm_c.bin").write_bytes(header.tobytes() + tokens.tobytes())
    tokens.astype(np.int32).tofile(tmp_path / "megatron.bin")
    (tmp_path / "megatron.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2) + bytes(40))
    for name in ("nanogpt.bin", "llm_c.bin", "megatron.bin"):
        assert corpus(name, tokenizer=None).tokens.tolist() == tokens.tolist(), name


# ---------------------------------------------------------------- the cache


def test_a_second_call_only_maps_and_a_change_is_seen(tmp_path, corpus, learnt, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    first = corpus("a.txt")
    assert "tokenised now" in first.describe()
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", None)
        second = corpus("a.txt")
    assert f"from the cache {tmp_path / 'cache'}" in second.describe()
    assert second.tokens.tolist() == first.tokens.tolist() and second.digest == first.digest
    assert corpus("a.txt", tokenizer=learnt).digest != first.digest
    (tmp_path / "a.txt").write_text("two!")
    assert corpus("a.txt").tokens.tolist() == ids("two!")
    assert not list(tmp_path.glob("cache/.*"))  # nothing unfinished is left


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble"])
def test_a_damaged_cache_is_made_again(tmp_path, corpus, damage):
    (tmp_path / "a.txt").write_text("one")
    corpus("a.txt")
    (data,), (record,) = tmp_path.glob("cache/*.bin"), tmp_path.glob("cache/*.json")
    if damage == "truncate":
        os.truncate(data, 3)
    elif damage == "remove":
        data.unlink()
    else:
        record.write_text("{")
    again = corpus("a.txt")
    assert again.tokens.tolist() == ids("one") and "tokenised now" in again.describe()


def test_the_digest_tells_data_apart_not_where_it_lies(tmp_path, corpus):
    for folder, text in (("here", "same"), ("there", "same"), ("other", "else")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    here, there, other = (corpus(folder).digest for folder in ("here", "there", "other"))
    assert here == there != other


def test_progress_is_told_while_tokens_are_made(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("moe_runtime.launch.data.stream._SAY_EVERY_S", 0.0)
    (tmp_path / "a.txt").write_text(TEXT * 1000)
    said: list[str] = []
    corpus("a.txt", progress=said.append)
    assert said and "GB read" in said[-1] and "0 s left" in said[-1]


# ---------------------------------------------------------------- mistakes


def write_mistakes(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (folder / "key.jsonl").write_text('{"text": "good"}\n\n{"body": "b", "id": 1}\n')
    (folder / "list.jsonl").write_text('["text"]\n')
    (folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (folder / "text.gz").write_bytes(b"\x1f\x8b\x08\0\0")
    (folder / "binary").mkdir()
    (folder / "binary" / "a").write_bytes(b"\0")
    (folder / "empty.txt").write_text("")
    (folder / "a.txt").write_text("text")
    np.save(folder / "float.npy", np.zeros(3))
    np.save(folder / "matrix.npy", np.zeros((3, 3), int))
    np.save(folder / "negative.npy", np.array([1, 2, -100]))
    np.save(folder / "large.npy", np.array([1, 70_000], np.int64) << 20)
    np.save(folder / "object.npy", np.array([{}], object), allow_pickle=True)
    (folder / "no.npy").write_text("none")
    (folder / "odd.bin").write_bytes(b"123")
    (folder / "half.bin").write_bytes(b"1234")
    (folder / "half.idx").write_bytes(b"other")


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        (["nothing/*"], "'nothing/*' matches no file (looked in "),
        (["bad.jsonl"], "bad.jsonl, line 2: no JSON"),
        (["key.jsonl"], "key.jsonl, line 3: no object with a string under 'text' (its keys: body, id)"),
        (["list.jsonl"], "list.jsonl, line 1: no object"),
        (["latin.jsonl"], "latin.jsonl, line 1: no JSON ('utf-8' codec"),
        (["text.gz"], "text.gz is a binary file"),
        (["binary"], "no text (1 binary files skipped; to use token arrays, name or match them"),
        (["empty.txt"], "no text"),
        (["float.npy"], "float64 [3]; token ids must be"),
        (["matrix.npy"], "int64 [3, 3]; token ids must be"),
        (["negative.npy"], "token 2 is -100; no id can be negative"),
        (["large.npy", "a.txt"], "large.npy: token id 73400320000 is beyond 4294967295"),
        (["object.npy"], "object.npy: no array that numpy can map"),
        (["no.npy"], "no.npy: no array that numpy can map"),
        (["odd.bin"], "odd.bin: 3 bytes are no whole number of 2-byte token ids"),
        (["half.bin"], "half.idx is no index of token ids that Megatron writes"),
    ],
)
def test_a_mistake_in_the_sources_is_one_clear_line(tmp_path, corpus, sources, told):
    write_mistakes(tmp_path)
    with pytest.raises(ConfigError) as error:
        corpus(*sources)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/.*"))


def test_a_tokenizer_that_cannot_serve_is_one_clear_line(tmp_path, corpus):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="text needs a tokenizer"):
        corpus("a.txt", tokenizer=None)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        corpus("a.txt", tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot keep tokens in .*; set XDG_CACHE_HOME"):
        open_corpus(["file"], tmp_path, TOKENIZER, cache=tmp_path / "file" / "cache")


def test_a_tokenizer_that_does_not_match_the_model_is_named_with_the_first_id(tmp_path, corpus):
    (tmp_path / "a.txt").write_text("abc")
    found = corpus("a.txt")
    found.check_vocabulary(257)
    with pytest.raises(ConfigError, match="token 3 is 256, but the model's vocab_size is 256: the tokenizer does not"):
        found.check_vocabulary(256)
    with pytest.raises(ConfigError, match="token 2 is 99, .*set vocab_size to at least 257"):
        found.check_vocabulary(99)


# ---------------------------------------------------------------- batches


@given(st.integers(1, 3000), st.integers(0, 2**65), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_of_the_order_has_every_number_once(count, seed, epoch):
    order = shuffled(np.arange(count) + epoch * count, count, seed)
    assert sorted(order.tolist()) == list(range(count))


def test_the_order_mixes_differs_by_epoch_and_seed_and_stays_as_it_is():
    first, second = (shuffled(np.arange(10_000) + epoch * 10_000, 10_000, 0) for epoch in (0, 1))
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05 and abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert not np.array_equal(first, shuffled(np.arange(10_000), 10_000, 1))
    # A run that is taken up again must find the order that it left: these numbers must never change.
    assert shuffled(np.arange(8), 1000, 7).tolist() == [985, 910, 351, 944, 280, 739, 423, 362]


def test_the_order_of_a_hundred_million_windows_takes_no_memory():
    order = shuffled(np.arange(1000) + 10**12, 10**8, 3)
    assert len(set(order.tolist())) > 990 and 0 <= order.min() and order.max() < 10**8


def rows_of(batches, steps: int, size: int) -> list[list[int]]:
    return [row for step in range(steps) for rank in range(size) for row in batches.of_rank(step, rank, size).tolist()]


@given(
    length=st.integers(1, 5),
    windows=st.integers(2, 40),
    batch_size=st.integers(1, 6),
    size=st.integers(1, 5),
    fraction=st.none() | st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_window_comes_once_per_epoch_for_any_number_of_ranks(length, windows, batch_size, size, fraction, seed):
    tokens = np.arange(windows * length + 1, dtype=np.uint16)
    out = None if fraction is None else held_out(tokens, length, fraction)
    trained = windows - (0 if out is None else len(out))
    if trained < batch_size:
        return
    batches = Batches(tokens, length, batch_size, seed, out)
    assert batches.windows == trained
    rows = rows_of(batches, trained, size)  # as many steps as windows: batch_size whole epochs
    assert rows == rows_of(batches, trained, 1)
    starts = [row[0] // length for row in rows]
    assert all(row == list(range(row[0], row[0] + length + 1)) for row in rows)
    expected = sorted(set(range(windows)) - set([] if out is None else out.tolist()))
    assert all(sorted(starts[begin : begin + trained]) == expected for begin in range(0, len(starts), trained))


def test_a_run_goes_on_at_any_step_without_the_steps_before():
    tokens = np.arange(4001, dtype=np.uint16)
    rows = rows_of(Batches(tokens, 4, 7, seed=2), 300, 1)
    later = Batches(tokens, 4, 7, seed=2)
    assert later.of_rank(299, 0, 1).tolist() == rows[-7:]
    assert later.of_rank(5, 1, 3).dtype == torch.int64


def test_fewer_windows_than_a_batch_is_one_clear_line():
    with pytest.raises(ConfigError, match="100 tokens make 9 sequences of 11, fewer than one batch of 10; add data"):
        Batches(np.zeros(100, np.uint16), 11, 10, seed=0)
    tokens = np.zeros(100, np.uint16)
    with pytest.raises(ConfigError, match="7 sequences of 11 besides 2 held out, fewer"):
        Batches(tokens, 11, 8, 0, held_out(tokens, 11, 0.2))
    with pytest.raises(ConfigError, match="0 sequences of 11"):
        Batches(tokens[:0], 11, 1, seed=0)


# ---------------------------------------------------------------- validation


def test_what_is_held_out_is_never_predicted_in_training():
    tokens = np.arange(1001, dtype=np.uint16)
    out = held_out(tokens, 10, 0.1)
    assert out.tolist() == list(range(5, 100, 10))  # spread evenly, the same every time
    batches = Batches(tokens, 10, 9, 0, out)
    trained = {token for row in rows_of(batches, 10, 1) for token in row[1:]}
    validated = {token for row in rows_of(ValidationBatches(tokens, 10, 4, out), 3, 1) for token in row[1:]}
    assert trained | validated == set(range(1, 1001)) and not trained & validated


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_validation_has_every_window_once_in_order_shared_equally(size):
    tokens = np.arange(111, dtype=np.uint16)  # 11 windows of 10
    batches = ValidationBatches(tokens, 10, 4)
    assert (batches.sequences, batches.steps) == (11, 3)
    assert [row[0] for row in rows_of(batches, 3, size)] == list(range(0, 110, 10))
    for step in range(3):
        shares = [len(batches.of_rank(step, rank, size)) for rank in range(size)]
        assert max(shares) - min(shares) <= 1
        assert all(batches.of_rank(step, rank, size).shape[1] == 11 for rank in range(size))  # also where it is empty


def test_validation_on_a_part_takes_windows_from_all_over():
    tokens = np.arange(1001, dtype=np.uint16)
    batches = ValidationBatches(tokens, 10, 2, at_most=5)
    assert [row[0] for row in rows_of(batches, batches.steps, 1)] == [100, 300, 500, 700, 900]


def test_validation_mistakes_are_one_clear_line():
    tokens = np.zeros(10, np.uint16)
    with pytest.raises(ConfigError, match="10 tokens for validation make no sequence of 10; add data"):
        ValidationBatches(tokens, 10, 1)
    with pytest.raises(ConfigError, match="must be between 0 and 1, got 1.5"):
        held_out(tokens, 2, 1.5)
    with pytest.raises(ConfigError, match="make 1 sequences of 9; none can be held out"):
        held_out(tokens, 9, 0.5)
