"""`logprobd score`: log-prob and rank of every token of a file, without HTTP.

config -> texts (lines, token ids) -> command (the model, through `LLM`) -> rows -> journal (files).
"""
