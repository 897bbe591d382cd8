"""Turns texts into token ids; also the program of the processes that `tokenize_pool` starts.

It is started by its path and imports nothing of Forgather, so that a process costs 0.1 s and 30 MB, not torch. Frames
on stdin and stdout: a count of texts, their lengths, their bytes; a count, the numbers of tokens, the tokens.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_PIECE_CHARACTERS = 2**20
_LINE_END = re.compile(r"[^\W_](?=\r?\n)")


class Encoder:
    """Encodes documents as ordinary text between the begin and end tokens.

    A special token's string in the text, `<|endoftext|>` in a file about tokenizers, is spelt out like any other text:
    only `before` and `after` put special ids into the stream.
    """

    def __init__(self, tokenizer_json: str, before: Sequence[int], after: Sequence[int]) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._before = np.array(before, np.uint32)
        self._after = np.array(after, np.uint32)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """The number of tokens of each document, and all their tokens one after another."""
        tokens: list[NDArray[np.uint32]] = []
        lengths = []
        for text in texts:
            start = len(tokens)
            tokens.append(self._before)
            # One piece at a time: an encoding takes a hundred times the memory of its text until its ids are taken out.
            # In a batch, because there is no other way to have it without offsets, which cost half as much again.
            for piece in _pieces(text):
                (encoding,) = self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)
                tokens.append(np.array(encoding.ids, np.uint32))
            tokens.append(self._after)
            lengths.append(sum(map(len, tokens[start:])))
        return np.array(lengths, np.int64), np.concatenate(tokens)


def _pieces(text: str) -> Iterator[str]:
    """A very long text in parts, cut where a line ends in a letter or digit.

    There the words of byte-level BPE end too, GPT-2's as well as those that keep a newline with the punctuation before
    it (GPT-4, Llama 3, Qwen), so the tokens are the same.
    """
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = _LINE_END.search(text, start + _PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def write_frame(stream: IO[bytes], lengths: NDArray[np.int64], content: bytes) -> None:
    """A count, that many lengths, and the size and bytes of what they are lengths of."""
    stream.write(np.array([len(lengths), len(content)], np.int64).tobytes())
    stream.write(lengths.astype(np.int64).tobytes())
    stream.write(content)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[NDArray[np.int64], bytes] | None:
    """What `write_frame` wrote; None at the end of the stream, also where that is in the middle of a frame."""
    head = stream.read(16)
    if len(head) < 16:
        return None
    count, size = np.frombuffer(head, np.int64).tolist()
    lengths, content = stream.read(8 * count), stream.read(size)
    if len(lengths) < 8 * count or len(content) < size:
        return None
    return np.frombuffer(lengths, np.int64), content


def main() -> None:
    """Answers frames of texts with frames of tokens until stdin ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    settings = read_frame(sys.stdin.buffer)
    assert settings is not None, "no settings came"
    encoder = Encoder(*json.loads(settings[1]))
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        lengths, content = frame
        ends = np.cumsum(lengths).tolist()
        texts = [content[end - length : end].decode() for end, length in zip(ends, lengths.tolist(), strict=True)]
        counts, tokens = encoder.encode(texts)
        write_frame(sys.stdout.buffer, counts, tokens.tobytes())


if __name__ == "__main__":
    main()
