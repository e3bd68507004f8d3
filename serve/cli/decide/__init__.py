"""`logprobd decide`: probabilities of the options of questions, for a file of requests, without HTTP.

config -> command (the model, through `LLM`) -> report; serve/cli/batch reads the lines and writes the files.
"""
