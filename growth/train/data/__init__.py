"""From text to packed batches: corpora, files, tokenizer, token sources, packing."""
