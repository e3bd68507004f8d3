"""`python -m tools.guides`: run the code of docs/guides."""
