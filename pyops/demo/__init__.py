"""`pyops demo`: the same training with torch.nn and with pyops, side by side, in the terminal and as a page.

`missing()` says what has to be installed, `run()`, `images.run()` and `vit.run()` train and judge, `show()` prints, `write()` makes the
page.
"""

from pyops.demo import images, vit
from pyops.demo.presentation import show, write
from pyops.demo.sequence import CELLS, run
from pyops.demo.training import Cost, Result, missing

EPOCHS = {"sequence": 20, "images": images.EPOCHS, "vit": vit.EPOCHS}  # of each task, unless told otherwise

__all__ = ["CELLS", "EPOCHS", "Cost", "Result", "images", "missing", "run", "show", "vit", "write"]
