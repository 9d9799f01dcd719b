"""One line for an argument that is out of its range."""


def check(fine: bool, owner: object, name: str, expected: str) -> None:
    """Check an attribute.

    Raises:
        ValueError: it is not fine.
    """
    if not fine:
        raise ValueError(f"{name} is {getattr(owner, name)!r}; expected {expected}")
