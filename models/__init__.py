"""Networks built from pyops.nn."""

if __name__ != "pyops.models":
    raise ImportError(
        f"this folder is the package pyops.models, not {__name__!r}: install the project (pip install -e .) and import it by that name"
    )
