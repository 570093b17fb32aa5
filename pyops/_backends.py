"""Which implementation runs, and why.

argument > `with pyops.backend(...)` > PYOPS_BACKEND > auto. A backend asked for by name never falls back: it raises with the reason.
Auto is plain Python over static facts, so it traces under fullgraph compile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

log = logging.getLogger("pyops")

NAMES = {
    "cpu": "hand-written C++, for CPU tensors",
    "cuda": "hand-written CUDA C++",
    "triton": "hand-written Triton",
    "vendor": "the op PyTorch itself would call (oneDNN, cuDNN, ATen)",
    "eager": "the reference: plain, traceable PyTorch",
}

_environment = os.environ.get("PYOPS_BACKEND", "auto").lower()
_context: ContextVar[str] = ContextVar("pyops_backend", default="auto")
_entered = 0  # live `with pyops.backend(...)` blocks: 0 lets a hot path skip the look-ups below
_logged: set[tuple[str, str, str]] = set()
EXPLAINERS: dict[str, Callable[..., Explanation]] = {}  # by the public function's name


def check_name(name: str, origin: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{origin}: expected one of auto, {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, ops run on the named backend ("cpu", "cuda", "triton", "vendor", "eager") or choose for themselves ("auto").

    Raises ValueError for an unknown name; ops raise it when the named backend cannot run them.
    """
    global _entered
    token = _context.set(check_name(name, "pyops.backend(name)"))
    _entered += 1
    try:
        yield
    finally:
        _entered -= 1
        _context.reset(token)


def overridden() -> bool:
    """Whether anything but auto may be asked for by context or environment."""
    return _entered > 0 or _environment != "auto"


def requested(argument: str | None) -> str:
    """The backend asked for by name, or "auto"."""
    if argument is not None:
        return check_name(argument, "backend")
    if not overridden():
        return "auto"
    name = _context.get()
    return name if name != "auto" else check_name(_environment, "PYOPS_BACKEND")


def select(op: str, wish: str, order: tuple[str, ...], unsupported: Callable[[str], str | None]) -> str:
    """The backend that runs: `wish`, or for "auto" the first of `order` that `unsupported` gives no reason against."""
    if wish != "auto":
        reason = unsupported(wish)
        if reason is not None:
            raise ValueError(f"{op}: backend {wish!r} cannot run this call: {reason}")
        return wish
    for name in order:
        if unsupported(name) is None:
            return name
    raise RuntimeError(f"{op}: no backend can run this call: " + "; ".join(f"{name}: {unsupported(name)}" for name in order))


def log_choice(op: str, device: str, name: str) -> None:
    """Once per op, device and backend."""
    if (op, device, name) not in _logged:
        _logged.add((op, device, name))
        log.info("%s on %s runs on %s (%s)", op, device, name, NAMES[name])


@dataclass(frozen=True)
class Explanation:
    """What `pyops.explain` returns: the backend that would run and, for each of the others, why it would not."""

    op: str
    facts: str
    wish: str
    chosen: str | None
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}({self.facts}), backend={self.wish}: {self.chosen or 'nothing can run this'}"]
        lines += [f"  {'>' if name == self.chosen else ' '} {name:<7} {text}" for name, text in self.rows]
        return "\n".join(lines)


def build_explanation(op: str, facts: str, wish: str, order: tuple[str, ...], unsupported: Callable[[str], str | None]) -> Explanation:
    reasons = {name: unsupported(name) for name in (*order, *(name for name in NAMES if name not in order))}
    usable = [name for name in order if reasons[name] is None] if wish == "auto" else [wish] if reasons[wish] is None else []
    chosen = usable[0] if usable else None
    rows = []
    for name, reason in reasons.items():
        text = f"cannot: {reason}" if reason else "runs" if name == chosen else "could run; ask for it by name"
        rows.append((name, text))
    return Explanation(op, facts, wish, chosen, tuple(rows))


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """What `op(*args, **kwargs)` would run on, and why not on the others; print it for a table. Nothing is run.

    `op` is a public function of pyops or its name, for example ``print(pyops.explain("fused_lstm", x, None, w_ih, w_hh))``.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in EXPLAINERS:
        raise ValueError(f"explain: op: expected one of {', '.join(sorted(EXPLAINERS))}, got {name!r}")
    return EXPLAINERS[name](*args, **kwargs)
