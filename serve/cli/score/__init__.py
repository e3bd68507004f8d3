"""`logprobd score`: log-prob and rank of every token of a file, without HTTP.

config -> source (lines) -> texts (token ids) -> scoring (the engine, through serve.jobs) -> rows -> journal (files);
formats converts the finished rows, command joins all.
"""
