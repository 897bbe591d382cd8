"""From text to batches: tokenizers, sources, prepared shards, packed blocks, their order, and the loader."""
