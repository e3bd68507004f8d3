"""`python -m tools.soak`: send mixed traffic to a server for a given time and check every answer.

A pure client: it imports response schemas from serve.api, but never the engine or jax.
Data flow: traffic (with prompts and bad_bodies) -> client -> replies -> checks and replay. idle and memory check the
server between phases, soak runs everything, results counts, report prints.
"""
