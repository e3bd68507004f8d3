"""`python -m tools.guides`: runs the code of docs/guides."""
