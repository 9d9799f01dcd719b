"""`apical sparsify` with its rules, which need torch: read only when that command is asked for."""

import dataclasses
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from tyro.conf import subcommand

from .commands import Sparsify, shard_bytes
from .growth.sparse import RULES

if TYPE_CHECKING:
    from .growth.sparse import Rule
else:
    # one subcommand per rule; its options are the fields of its dataclass
    Rule = reduce(
        or_,
        (Annotated[kind, subcommand(name.replace("_", "-"))] for name, kind in RULES.items()),
    )


@dataclasses.dataclass(frozen=True)
class SparsifyBy(Sparsify):
    __doc__ = f"""{Sparsify.__doc__}    rule: by what
    """

    rule: Rule = dataclasses.field(kw_only=True)

    def run(self) -> str:
        size = shard_bytes(self.source, self.max_shard_gb)
        from .growth.sparse.directory import sparsify_checkpoint

        report = sparsify_checkpoint(self.source, self.out, self.rule, max_shard_bytes=size)
        return f"{report}\nwrote {self.out}"
