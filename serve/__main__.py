"""`python -m serve`."""

from serve.cli.main import run

if __name__ == "__main__":
    run()
