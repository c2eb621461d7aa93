"""The content of results.json in, words and figures out. Imports nothing of ours."""
