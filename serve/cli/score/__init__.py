"""`logprobd score`: log-prob and rank of every token of a file, without HTTP.

config -> texts (token ids) -> command -> rows; serve/cli/batch reads the lines and writes the files.
"""
