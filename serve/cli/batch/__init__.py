"""What commands share that write one row per line of a file, and resume after an interruption.

config -> source (lines) -> run (the model, through `LLM`) -> journal (rows and checkpoints).
"""
