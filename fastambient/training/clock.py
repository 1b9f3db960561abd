"""Images as the clock: what is due at a number of images seen, as a function of that number alone."""

from __future__ import annotations


def crosses(nimg: int, batch: int, every_kimg: float) -> bool:
    """True where the step that ends at `nimg` passes a multiple of `every_kimg`."""
    every = every_kimg * 1000
    return every > 0 and nimg // every > (nimg - batch) // every


def grids_to_come(nimg: int, batch: int, total_nimg: int, every_kimg: float) -> int:
    """How many grids of samples a run still draws after `nimg` images: one for each step that `crosses`, however many
    multiples it passes, and one at the end."""
    steps = -(-(total_nimg - nimg) // batch)
    if steps <= 0 or not every_kimg > 0:
        return 0
    end, every = nimg + steps * batch, every_kimg * 1000
    passing = steps if every <= batch else int(end // every - nimg // every)
    return passing + (not crosses(end, batch, every_kimg))
