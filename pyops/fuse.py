"""`pyops.fuse(model)`: what kernels can stand for in anyone's model runs on them, in place; `pyops.unfuse(model)` undoes it.

Modules keep their parameters, buffers, hooks and state_dict keys and change class only, to one derived from their own. Layers and blocks
that are known become pyops.nn's (`pyops._fusion.rules`); a forward that calls layers one after another is rewritten so that those which
kernels run as one do (`pyops._fusion.rewrite`). What is not exactly known (a subclass of a layer, a parametrised, scripted or quantised
module, a forward set on the instance) is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch import nn

from pyops import _backends
from pyops._fusion import report
from pyops._fusion.fusing import fuse, unfuse

__all__ = ["explain", "fuse", "unfuse"]


@overload
def explain(op: nn.Module, /, *inputs: Any, **kwargs: Any) -> report.Explanation: ...


@overload
def explain(op: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> _backends.Explanation: ...


def explain(op: Any, /, *args: Any, **kwargs: Any) -> _backends.Explanation | report.Explanation:
    """What runs a call of an op, or a model's layers; print it for a table.

    Of a model, `print(pyops.explain(model, x))` with the arguments of its forward: what runs each layer and with which others, what stays
    PyTorch's and why, and the time of each; the object's ``rows`` are for programs (`pyops._fusion.report.Row`). A model that is not fused
    is shown as it is and beside it what `fuse` would change. The model runs in eval mode without gradients, and is afterwards as it was:
    class, modes, hooks, random numbers' state.

    Of an op, a public function of pyops or its name, for example ``print(pyops.explain("fused_lstm", x, None, w_ih, w_hh))``: which backend
    `op(*args, **kwargs)` would run on, and why not on the others; nothing is run.

    Raises TypeError for a model without inputs or with a part that torch.compile made, ValueError for a name that is no op's, and whatever
    the model's forward raises.
    """
    return report.explain(op, args, kwargs) if isinstance(op, nn.Module) else _backends.explain(op, *args, **kwargs)
