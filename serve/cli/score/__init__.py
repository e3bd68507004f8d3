"""`logprobd score`: log-prob and rank of every token of a file, without HTTP.

config -> texts (lines, token ids) -> scoring (the engine, through serve.jobs) -> rows -> journal (files); command joins
all.
"""
