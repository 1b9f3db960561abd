"""A sweep over sigma_tn: quality against copying, each cell a run of its own, beside the baselines to be beaten.

DIR/store         the prepared data set (unless a STORE was given)      DIR/logs/   what each cell's commands said
DIR/NAME/         a run folder a cell: EDM or ambient diffusion at one sigma_tn and seed, or a baseline
DIR/sweep.json    every cell's and every configuration's numbers, the rule and the chosen sigma_tn
DIR/table.md  DIR/pareto.svg  DIR/pareto.png   (with --audit-every also DIR/training.svg and .png)
DIR/report.html   the choice, curve and table, and the figures and pictures of every configuration's first seed

A cell is trained, sampled and measured as by ``train --resume``, ``sample`` and ``evaluate``, in a process of its own
(cell.py). What the stop rule ended is the beginning of a run that does not stop: it is trained first, the other goes on
from its checkpoint (training/ending.py). The same command goes on where the last one ended: finished cells are kept,
unfinished ones resumed.
"""

from fastambient.sweep.request import BASELINES, Cell, SweepRequest, cells
from fastambient.sweep.results import TARGET
from fastambient.sweep.run import sweep

__all__ = ["BASELINES", "TARGET", "Cell", "SweepRequest", "cells", "sweep"]
