"""How a verb refuses."""


class Refused(Exception):
    """A verb cannot do what was asked. One line, with the remedy."""
