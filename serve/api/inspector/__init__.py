"""The token inspector: a static page and its files, and the routes that serve them.

The page talks to the API like any other client; nothing in Python knows what it shows.
"""
