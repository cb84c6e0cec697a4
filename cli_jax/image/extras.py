"""What a fusion strategy adds to a picture's tokens and tiles, in numbers that host code needs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Extras:
    """A strategy's declaration (`Fusion.extras`); the default adds nothing.

    pooled  E: tokens behind every picture, behind its last newline too. The strategy makes E more
            features of every tile behind its N patches; these tokens read those of the base view
    stacks  m: features that `deepstack` adds at the N tokens of a picture's base view, out of its
            high-resolution tiles (cli_jax/image/stacks.py)
    tiles   high-resolution tiles that a picture gets for its stacks, at most; 0 where the
            treatment makes some anyway
    """

    pooled: int = 0
    stacks: int = 0
    tiles: int = 0


NO_EXTRAS = Extras()
