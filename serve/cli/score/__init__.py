"""`python -m serve score`: the log-prob and rank of every token of a file, without HTTP.

Reads and writes files and drives the engine; knows nothing of serve.api's answers. config -> source (lines of a
file) -> texts (token ids) -> windows -> run (the engine) -> rows -> journal (what is written), command joins them.
"""
