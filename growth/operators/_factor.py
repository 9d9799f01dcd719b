def check_factor(factor: object) -> None:
    """Check how many times deeper the grown model is.

    Raises:
        ValueError: the factor is not an integer of at least 2.
    """
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor is {factor!r}; expected an integer of at least 2")
