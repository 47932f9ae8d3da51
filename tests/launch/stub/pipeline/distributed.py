"""Every ValueError of the stub is one for the user."""


def describe(error: ValueError) -> str | None:
    return str(error)
