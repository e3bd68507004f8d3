"""Decisions: questions with named options, their prompts, and the tokens that stand for each option."""
