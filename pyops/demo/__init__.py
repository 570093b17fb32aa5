"""`pyops demo`: the same training with torch.nn and with pyops, side by side, in the terminal and as a page.

`missing()` says what has to be installed, `run()`, `images.run()`, `vit.run()`, `networks.run()` and `text.run()` train and judge,
`show()` prints, `write()` makes the page.
"""

from pyops.demo import images, networks, text, vit
from pyops.demo.presentation import show, write
from pyops.demo.sequence import CELLS, run
from pyops.demo.training import Cost, Result, missing

# of each task, unless told otherwise
EPOCHS = {"sequence": 20, "images": images.EPOCHS, "vit": vit.EPOCHS, **networks.EPOCHS, **text.EPOCHS}
RACES = {"vit": 2, **text.RACES}  # how many pairs of networks a task trains, where not one

__all__ = ["CELLS", "EPOCHS", "RACES", "Cost", "Result", "images", "missing", "networks", "run", "show", "text", "vit", "write"]
