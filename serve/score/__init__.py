"""`python -m serve score`: the log-prob and rank of every token of a file, without HTTP.

Reads and writes files and drives the engine; knows nothing of serve.openai's answers.
"""
