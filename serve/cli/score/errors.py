"""What can go wrong, in words for whoever started us."""


class LineError(ValueError):
    """A line cannot be scored."""


class ScoreError(Exception):
    """The scoring cannot begin or go on."""
