"""LoRA files on disk: keys, weights, labels, what builds a collection, and two builders. Imports nothing of ours."""
