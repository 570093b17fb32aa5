"""Triton kernels. Nothing here imports Triton until a kernel module is imported, and nothing here imports pyops.ops."""

if __name__ != "pyops.triton_kernels":
    raise ImportError(
        f"this folder is the package pyops.triton_kernels, not {__name__!r}: install the project (pip install -e .) "
        "and import it by its full name"
    )
