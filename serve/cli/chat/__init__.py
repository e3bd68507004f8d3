"""`logprobd chat`: a chat in the terminal whose tokens are colored by surprise.

command (input, commands, requests) -> conversation (replies with log-probs) -> screen.
"""
