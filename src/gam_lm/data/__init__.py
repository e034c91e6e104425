"""Text in, token ids out: corpora, tokenizers, the memory-mapped ids and the blocks cut from them. Never imports torch."""
