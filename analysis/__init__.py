"""Numbers in, numbers out: predictions, draws, and the five questions. Imports nothing of ours outside this folder."""
