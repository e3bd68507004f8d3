"""Structured output: JSON schemas, regular expressions and grammars as masks of the tokens that may follow."""
