"""`python -m tools.portability`: compiles a model's programs for chips that are not here."""
