"""Decisions over HTTP: probabilities of named options, in OpenAI's and in TypeSafe's form."""
