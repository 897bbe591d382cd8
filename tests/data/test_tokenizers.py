"""Tokenizers trained from a recipe: exact, deterministic, made once."""

import io
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.data import tokenize_process
from forgather.data.sources import TextFiles
from forgather.data.tokenize_process import Encoder, read_frame, write_frame
from forgather.data.tokenizers import backend_json, byte_bpe, character, tokenizer_digest
from forgather.errors import DataError


def corpus(folder, *texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return {"text": TextFiles(folder)}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    text = "the quick brown fox jumps over the lazy dog, and the dog sleeps on\n" * 20
    return byte_bpe(sources=corpus(folder / "corpus", text), folder=folder, vocab_size=300)


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_byte_for_byte(bpe, text):
    assert bpe.decode(bpe(text, add_special_tokens=False)["input_ids"]) == text


def test_the_vocabulary_is_as_declared(bpe):
    assert len(bpe) == 300
    assert (bpe.bos_token, bpe.eos_token, bpe.pad_token) == ("<|startoftext|>", "<|endoftext|>", "<|padding|>")
    assert len({bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id}) == 3
    assert bpe("the")["input_ids"][0] == bpe.bos_token_id


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_special_token_in_a_document_is_text(bpe, tmp_path, kind):
    tokenizer = bpe if kind == "bpe" else character(sources=corpus(tmp_path / "c", "ab<|endoftx>"), folder=tmp_path)
    text = "a<|endoftext|>b<|startoftext|>"
    counts, tokens = Encoder(backend_json(tokenizer), [tokenizer.bos_token_id], [tokenizer.eos_token_id]).encode([text])
    special = [token for token in tokens.tolist() if token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert special == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert counts.tolist() == [len(tokens)]
    if kind == "bpe":
        assert tokenizer.decode(tokens[1:-1]) == text


def test_training_is_deterministic_and_done_once(tmp_path, capsys):
    sources = corpus(tmp_path / "corpus", "some text, some more text\n" * 30, "def f(x):\n    return x\n" * 30)
    one = byte_bpe(sources=sources, folder=tmp_path / "one", vocab_size=290)
    other = byte_bpe(sources=sources, folder=tmp_path / "other", vocab_size=290)
    assert backend_json(one) == backend_json(other)
    capsys.readouterr()
    again = byte_bpe(sources=sources, folder=tmp_path / "one", vocab_size=290)
    assert capsys.readouterr().err == ""
    assert tokenizer_digest(again) == tokenizer_digest(one)
    byte_bpe(sources=sources, folder=tmp_path / "one", vocab_size=5000)
    assert "tokens of the 5,000 asked for: the text holds no more" in capsys.readouterr().err


def test_of_many_at_once_one_trains(tmp_path, capsys):
    sources = corpus(tmp_path / "corpus", "abc " * 50)
    threads = [
        threading.Thread(target=character, kwargs={"sources": sources, "folder": tmp_path / "out"}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err.count("training tokenizer") == 1
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == 1


def test_the_digest_survives_saving_and_loading(bpe, tmp_path):
    import transformers

    bpe.save_pretrained(tmp_path)
    assert tokenizer_digest(transformers.AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(bpe)


def test_padding_and_truncation_do_not_reach_the_corpus(bpe):
    before = tokenizer_digest(bpe)
    bpe(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(bpe) == before
    counts, _ = Encoder(backend_json(bpe), [], []).encode(["a", "a longer text than four tokens"])
    assert counts[0] == 1
    assert counts[1] > 4


@pytest.fixture(scope="module")
def newlines_with_punctuation():
    """Words as GPT-4, Llama 3 and Qwen have them: a newline belongs to the punctuation before it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([",\n_\n,\r\n\r\n_\n\nab,\n" * 20], trainer)
    return tokenizer.to_str()


@pytest.mark.parametrize("kind", ["GPT-2", "GPT-4"])
@given(text=st.text(alphabet="ab, \n\r\té'3_", max_size=80), characters=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_a_long_text_in_pieces_has_the_same_tokens(bpe, newlines_with_punctuation, kind, text, characters):
    encoder = Encoder(backend_json(bpe) if kind == "GPT-2" else newlines_with_punctuation, [], [])
    _, whole = encoder.encode([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_process, "_PIECE_CHARACTERS", characters)
        counts, tokens = encoder.encode([text])
    assert tokens.tolist() == whole.tolist()
    assert counts.tolist() == [len(whole)]


@pytest.mark.parametrize("length", [0, 10, 20, 30, 37])
def test_a_frame_that_breaks_off_is_the_end(length):
    stream = io.BytesIO()
    write_frame(stream, np.array([1, 2]), b"abcdef")
    whole = stream.getvalue()
    assert len(whole) == 38
    assert read_frame(io.BytesIO(whole[:length])) is None
    lengths, content = read_frame(io.BytesIO(whole))
    assert (lengths.tolist(), content) == ([1, 2], b"abcdef")


def test_characters_in_order_of_code_point(tmp_path):
    tokenizer = character(sources=corpus(tmp_path / "corpus", "hello"), folder=tmp_path)
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [1, 0, 2, 2, 3]
    assert tokenizer.decode([1, 0, 2, 2, 3]) == "hello"
    assert tokenizer("z\n", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id] * 2
    assert len(tokenizer) == 8


def test_the_most_frequent_characters_are_kept(tmp_path):
    sources = corpus(tmp_path / "corpus", "aaa bb\n\tc ü")
    tokenizer = character(sources=sources, folder=tmp_path, vocab_size=7)
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(3)] == [" ", "a", "b"]
    assert len(tokenizer) == 7
    everything = character(sources=sources, folder=tmp_path)
    assert everything.decode(everything("a\tb\nü", add_special_tokens=False)["input_ids"]) == "a\tb\nü"


def test_bad_recipes(tmp_path):
    sources = corpus(tmp_path / "corpus", "text")
    with pytest.raises(DataError, match=r"vocab_size is 100(.|\n)*259 or more"):
        byte_bpe(sources=sources, folder=tmp_path, vocab_size=100)
    with pytest.raises(DataError, match="same text"):
        byte_bpe(sources=sources, folder=tmp_path, bos_token="<|endoftext|>")
    with pytest.raises(DataError, match="has no source"):
        byte_bpe(sources={"text": None}, folder=tmp_path)
    with pytest.raises(DataError, match="which 4 special tokens fill"):
        character(sources=sources, folder=tmp_path, vocab_size=4)
    with pytest.raises(DataError, match="empty corpus"):
        character(sources=corpus(tmp_path / "empty", ""), folder=tmp_path)
    with pytest.raises(DataError, match="not a fast tokenizer"):
        tokenizer_digest(object())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_tokenizer_is_told_with_the_folder_to_remove(tmp_path, damage):
    sources = corpus(tmp_path / "corpus", "abc")
    character(sources=sources, folder=tmp_path)
    (file,) = tmp_path.glob("char-*/tokenizer.json")
    file.write_text(file.read_text()[:50]) if damage == "cut" else file.unlink()
    with pytest.raises(DataError, match=f"is damaged: .*\n  fix: remove {file.parent}"):
        character(sources=sources, folder=tmp_path)
