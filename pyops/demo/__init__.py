"""`pyops demo`: the same training with torch.nn and with pyops, side by side, in the terminal and as a page.

`missing()` says what has to be installed, `run()` trains and judges, `show()` prints, `write()` makes the page.
"""

from pyops.demo.presentation import show, write
from pyops.demo.training import CELLS, Result, missing, run

__all__ = ["CELLS", "Result", "missing", "run", "show", "write"]
