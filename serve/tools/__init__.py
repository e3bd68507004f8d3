"""Tools: their definitions in requests, the text formats of calls, and the grammars that hold a model to them."""
