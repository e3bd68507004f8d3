"""`python -m tools.portability`: compile a model's programs for absent hardware."""
