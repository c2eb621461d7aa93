"""LoRA files on disk: keys, labels, published collections, and the built-in one. Imports nothing of ours."""
