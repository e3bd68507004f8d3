"""`python -m serve chat`: a chat in the terminal whose tokens are coloured by surprise.

Drives the engine and paints; nothing here decides about numbers.
"""
