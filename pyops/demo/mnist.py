"""Images of digits for whole networks: MNIST from its four files, else scikit-learn's bundled digits, enlarged.

Source: LeCun et al., 1998, whose files are in IDX: a magic number (0, 0, the type of the elements, the number of dimensions), the
dimensions as big-endian int32, the elements.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops.demo.training import Data, load_digits

UNSIGNED_BYTE = 8
PARTS = ("train", "t10k")
SIDE = 28


def load(size: int, seed: int, device: str, folder: Path | None = None) -> tuple[Data, Tensor]:
    """Images [N, 1, size, size] in 0..1 in two parts, and the test images [N, H, W] as they came.

    Args:
        size: at least 28. MNIST gets a margin, scikit-learn's digits are enlarged.
        seed: of the split of scikit-learn's digits; MNIST comes split.
        folder: of MNIST's four files, gzipped or not.

    Raises ValueError for files that are missing, not what their names say, or cut short.
    """
    if folder is None:
        data = load_digits(seed, device)

        def fit(images: Tensor) -> Tensor:
            return F.interpolate(images[:, None], size=(size, size), mode="bilinear", align_corners=False)
    else:
        train, test = (read_part(Path(folder), part) for part in PARTS)
        images, labels, test_images, test_labels = (part.to(device) for part in (*train, *test))
        data = Data(images.float() / 255, labels.long(), test_images.float() / 255, test_labels.long())

        def fit(images: Tensor) -> Tensor:
            margin = size - SIDE
            return F.pad(images[:, None], (margin // 2, margin - margin // 2) * 2)

    return data._replace(train_x=fit(data.train_x), test_x=fit(data.test_x)), data.test_x


def read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 28, 28] and labels [N] of one of PARTS, uint8."""
    images, labels = read_idx(find(folder, f"{part}-images-idx3-ubyte"), 3), read_idx(find(folder, f"{part}-labels-idx1-ubyte"), 1)
    if images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise ValueError(f"demo: data: {folder}: {part}: expected images [N, {SIDE}, {SIDE}], got {list(images.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"demo: data: {folder}: {part}: {len(images)} images, but {len(labels)} labels")
    if labels.max() > 9:
        raise ValueError(f"demo: data: {folder}: {part}: expected labels 0 to 9, got {labels.max().item()}")
    return images, labels


def find(folder: Path, name: str) -> Path:
    """The file of that name, as it is or gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"demo: data: {folder}: expected MNIST's files, there is no {name} or {name}.gz")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor that an IDX file holds. Raises ValueError for one of another type, rank or length."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"demo: data: {path}: is not a whole gzip file: {error}") from error
    magic, expected = content[:4], bytes((0, 0, UNSIGNED_BYTE, dimensions))
    if magic != expected:
        raise ValueError(
            f"demo: data: {path}: expected the magic number {expected.hex()} ({dimensions} dimensions of bytes), got {magic.hex()}"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"demo: data: {path}: ends within its header")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    elements = torch.Size(shape).numel()
    if len(content) != start + elements:
        raise ValueError(f"demo: data: {path}: expected {elements} bytes for {list(shape)}, got {len(content) - start}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)
