"""Blocks of other libraries that run as a view of their own layers: a module of pyops.nn that holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pyops.nn.chain import Chained


class Viewed(Chained, nn.Module):
    """Base of what such a block becomes; its own class comes next."""

    def view(self, make: Callable[[], Any], *facts: Any) -> Any:
        """``make()``, kept until a child or one of the facts is another."""
        now = [*self._modules.values(), *facts]
        before, view = self._kept.get("view", ((), None))
        if len(before) != len(now) or any(a is not b for a, b in zip(before, now, strict=True)):
            view = make()
            self._kept["view"] = now, view
        return view
