"""`python -m tools.soak`: mixed traffic against a server for a given time, and what must hold of all that it answers.

A client and nothing else: it may import the shapes of answers from serve.api, and never the engine or jax.
traffic (what is asked, over prompts and bad_bodies) -> client (how) -> answers (what came) -> checks and again (what
must hold of it); idle and memory judge the server in between, soak joins them, tally counts, report tells.
"""
