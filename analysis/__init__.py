"""Numbers in, numbers out: evidence, and the five questions. Imports nothing of ours."""
