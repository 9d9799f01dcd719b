"""Shape checks that name the argument, in one call instead of a wall of ifs."""

from torch import Tensor


def bind_shapes(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Bind dimension letters to sizes and return them.

    ``bind_shapes(query=(query, "T H D"), key=(key, "T K D"))`` returns ``{"T": …, "H": …, …}``.

    Raises:
        ValueError: an argument has another rank, or two arguments disagree about a letter.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, pattern) in named.items():
        letters = pattern.split()
        if tensor.ndim != len(letters):
            raise ValueError(f"{name} must have shape ({pattern}), got {tuple(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has {letter}={size}, an earlier argument has {letter}={sizes[letter]}"
                )
    return sizes
