"""The content of results.json in, sentences, tables and figures out. Imports nothing of ours."""
