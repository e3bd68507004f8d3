"""Requests in, token events out: one thread that alone touches the device, and the scheduler that feeds it.

Knows nothing of HTTP or of the OpenAI schema; `serve.api` imports this folder, never the other way round.
"""
