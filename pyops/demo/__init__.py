"""`pyops demo`: the same training with torch.nn and with pyops, side by side, in the terminal and as a page.

`missing()` says what has to be installed, `run()`, `images.run()`, `vit.run()`, `networks.run()` and `text.run()` train and judge,
`runner()` finds the one of a task, `show()` prints, `write()` makes the page.
"""

from pyops.demo import images, networks, text, vit
from pyops.demo.presentation import show, write
from pyops.demo.sequence import CELLS, run
from pyops.demo.tasks import EPOCHS, RACES, SMALL, runner
from pyops.demo.training import Cost, Result, missing

__all__ = [
    "CELLS", "EPOCHS", "RACES", "SMALL", "Cost", "Result", "images", "missing", "networks", "run", "runner", "show", "text", "vit", "write",
]  # fmt: skip
