"""Tokenizers trained from a recipe at first use and kept on disk under the digest of that recipe."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from forgather.data.once import made_once
from forgather.data.sources import Source
from forgather.errors import DataError

if TYPE_CHECKING:
    # transformers takes seconds to import; the functions below that make a tokenizer import it when they run.
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BYTES = 256


def byte_bpe(
    *,
    sources: Mapping[str, Source | None],
    folder: Path | str,
    name: str = "byte_bpe",
    vocab_size: int = 4096,
    min_frequency: int = 2,
    max_training_bytes: int | None = None,
    bos_token: str = "<|startoftext|>",
    eos_token: str = "<|endoftext|>",
    pad_token: str = "<|padding|>",
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer: any text encodes, and decodes to the same bytes.

    `vocab_size` counts the special tokens and the 256 bytes. `max_training_bytes` trains on that much text, from the
    start of each source in equal parts. DataError when the vocabulary cannot hold the bytes or the corpus is empty.
    """
    special = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    _require_distinct(special)
    if vocab_size < BYTES + len(special):
        raise DataError(
            f"vocab_size is {vocab_size}; {BYTES} bytes and {len(special)} special tokens need {BYTES + len(special)}",
            fix=f"set vocab_size to {BYTES + len(special)} or more, for example 4096",
        )

    def train() -> "Tokenizer":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(special.values()),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_training_text(sources, max_training_bytes), trainer)
        _begin_with(tokenizer, bos_token)
        return tokenizer

    recipe = {"kind": "byte_bpe", "vocab_size": vocab_size, "min_frequency": min_frequency}
    recipe |= {"max_training_bytes": max_training_bytes, "special": special}
    return _cached(folder, name, recipe, sources, train, special)


def character(
    *,
    sources: Mapping[str, Source | None],
    folder: Path | str,
    name: str = "char",
    vocab_size: int | None = None,
    unk_token: str = "<unk>",
    bos_token: str = "<|startoftext|>",
    eos_token: str = "<|endoftext|>",
    pad_token: str = "<|padding|>",
) -> "PreTrainedTokenizerFast":
    """A token a character, in order of code point; characters not in the corpus are `unk_token`.

    `vocab_size` keeps the most frequent characters so that all tokens, special ones included, are that many.
    """
    special = {"unk_token": unk_token, "bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
    _require_distinct(special)
    if vocab_size is not None and vocab_size <= len(special):
        raise DataError(
            f"vocab_size is {vocab_size}, which {len(special)} special tokens fill",
            fix="set it to null for all characters of the corpus, or to 100 or more",
        )

    def train() -> "Tokenizer":
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        counts: Counter[str] = Counter()
        for text in _training_text(sources, None):
            counts.update(text)
        kept = sorted(counts, key=lambda character: (-counts[character], character))
        kept = sorted(kept if vocab_size is None else kept[: vocab_size - len(special)])
        vocabulary = {character: number for number, character in enumerate(kept)}
        vocabulary |= {token: len(kept) + number for number, token in enumerate(special.values())}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk_token))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(list(special.values()))
        _begin_with(tokenizer, bos_token)
        return tokenizer

    recipe = {"kind": "character", "vocab_size": vocab_size, "special": special}
    return _cached(folder, name, recipe, sources, train, special)


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of what decides which ids a text becomes: equal after saving and loading."""
    parts = json.loads(backend_json(tokenizer))
    deciding = {key: parts[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    content = [deciding, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def backend_json(tokenizer: Any) -> str:
    """The tokenizer as the `tokenizers` library writes it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer",
            fix="use one that has a tokenizer.json (transformers' PreTrainedTokenizerFast)",
        )
    text: str = backend.to_str()
    return text


def _cached(
    folder: Path | str,
    name: str,
    recipe: dict[str, Any],
    sources: Mapping[str, Source | None],
    train: Callable[[], "Tokenizer"],
    special: dict[str, str],
) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    used = {key: source for key, source in sources.items() if source is not None}
    if not used:
        raise DataError(f"tokenizer {name} has no source to be trained on", fix="name one under `sources`")
    recipe = recipe | {"sources": {key: source.digest() for key, source in used.items()}}
    recipe |= {"tokenizers": version("tokenizers")}  # another release may train another vocabulary
    digest = xxhash.xxh3_64_hexdigest(json.dumps(recipe, sort_keys=True).encode())
    final = Path(folder) / f"{name}-{digest}"
    with made_once(final) as aside:
        if aside is not None:
            print(f"training tokenizer {name} on {', '.join(used)}", file=sys.stderr)
            trained = PreTrainedTokenizerFast(tokenizer_object=train(), **special, clean_up_tokenization_spaces=False)
            trained.save_pretrained(aside)
            (aside / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
            asked = recipe["vocab_size"]
            short = f" of the {asked:,} asked for: the text holds no more" if asked and len(trained) < asked else ""
            print(f"  {len(trained):,} tokens{short}, in {final}", file=sys.stderr)
    # Loaded also by the process that has trained it, so that all processes hold what the files say.
    try:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            json.loads((final / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the tokenizer in {final} is damaged: {error}", fix=f"remove {final}: the same command trains it again"
        ) from error
    return PreTrainedTokenizerFast.from_pretrained(final)


def _training_text(sources: Mapping[str, Source | None], max_bytes: int | None) -> Iterator[str]:
    used = [source for source in sources.values() if source is not None]
    seen = 0
    for source in used:
        left = max_bytes // len(used) if max_bytes is not None else None
        for text in source.documents():
            seen += 1
            yield text
            if left is not None:
                left -= len(text.encode())
                if left <= 0:
                    break
    if not seen:
        raise DataError(
            "empty corpus: all documents are empty",
            fix="put text into the files, or give the source another path (a parameter such as --text-path)",
        )


def _begin_with(tokenizer: "Tokenizer", bos_token: str) -> None:
    """A prompt begins as the documents of training do."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A",
        pair=f"{bos_token} $A {bos_token} $B",
        special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))],
    )


def _require_distinct(special: dict[str, str]) -> None:
    if len(set(special.values())) < len(special):
        raise DataError(f"two special tokens are the same text: {special}", fix="give each its own")
