"""`logprobd chat`: a chat in the terminal whose tokens are coloured by surprise.

input (what is typed) -> session (commands, requests) -> conversation (replies with log-probs) -> screen.
"""
