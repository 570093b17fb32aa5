"""Compiles csrc/**/*.cu for the host, or for the GPU at hand, into a library that tests call through ctypes."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DRIVER = Path(__file__).resolve().parent
ROOT = DRIVER.parent.parent
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

# A library's statics are its own (hidden): two builds of the same kernels are loaded side by side.
HOST = ["-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
PLAIN_FLAGS = [*HOST, "-O1"]
SANITIZE = ["-fsanitize=address,undefined"]
SANITIZED_FLAGS = [*HOST, "-O0", "-g", "-fno-sanitize-recover=all", *SANITIZE]  # -O1 takes six times as long to compile

GPU_FLAGS = ["-x", "cu", "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin/nvcc")) if home else shutil.which("nvcc")


def kernel_sources(root=ROOT):
    return sorted((root / "csrc").glob("**/*.cu"))


class Builder:
    """Compiles to objects named by the hash of everything that goes into them, so that a second run compiles nothing."""

    def __init__(self, cache, compiler=CXX):
        self.cache, self.compiler = cache, compiler
        self.version = subprocess.run([compiler, "--version"], capture_output=True).stdout
        self.headers = {}

    def header_hash(self, source):
        """Of every header in the tree that the source belongs to: the checkout, or a copy of it with a planted fault."""
        root = next((parent for parent in source.parents if (parent / "csrc").is_dir()), ROOT)
        if root not in self.headers:
            found = sorted([*(root / "csrc").glob("**/*.cuh"), *(root / "csrc").glob("**/*.h"), *DRIVER.glob("*.h")])
            self.headers[root] = hashlib.sha256(b"".join(header.read_bytes() for header in found)).digest()
        return self.headers[root]

    def object(self, source, flags):
        told = "\0".join([str(source), *flags]).encode()
        key = hashlib.sha256(self.version + self.header_hash(source) + told + source.read_bytes()).hexdigest()[:24]
        target = self.cache / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.part.o")
            done = subprocess.run([self.compiler, *flags, "-c", str(source), "-o", str(partial)], capture_output=True, text=True)
            assert done.returncode == 0, f"{source.name} does not compile with {self.compiler}:\n{done.stderr[:4000]}"
            partial.rename(target)
        return target

    def link(self, target, sources, flags, link_flags):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.object(source, flags), sources))
        done = subprocess.run([self.compiler, *link_flags, "-o", str(target), *map(str, objects)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        return target


def load(path):
    library = ctypes.CDLL(str(path))
    library.host_machine.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    library.host_scan_workspace.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_int]
    library.host_scan_workspace.argtypes += [ctypes.POINTER(ctypes.c_int64), ctypes.c_char_p, ctypes.c_int]
    library.host_choose_path.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 2, *[ctypes.c_int] * 3]
    return library


def checked(function, *arguments):
    """Calls a function whose last arguments are a buffer for an error's text; that error is raised."""
    error = ctypes.create_string_buffer(2000)
    if function(*arguments, error, len(error)):
        raise RuntimeError(error.value.decode())


def plain_name(kernel):
    """one_cta_forward<Kind::lstm, bf16, 8> -> one_cta_forward<lstm, bf16, 8>; C's types by torch's short names."""
    kernel = re.sub(r"\w+::", "", kernel)
    types = {"float": "f32", "unsigned short": "u16", "uint16_t": "u16", "unsigned int": "u32", "uint32_t": "u32", "unsigned char": "u8"}
    types |= {"uint8_t": "u8", "int64_t": "i64", "long": "i64", "int": "i32"}
    return re.sub(r"(?<=[<, ])(" + "|".join(sorted(types, key=len, reverse=True)) + r")(?=[,>])", lambda found: types[found[1]], kernel)


def kernel_table(library):
    """What the library's registry knows: {kernel: {portable, launches, threads, shared_bytes}}; the last three as launched so far."""
    text = ctypes.create_string_buffer(1 << 17)
    assert library.host_kernel_table(text, len(text)) >= 0, "the table does not fit the buffer"
    rows = [line.split("\t") for line in text.value.decode().splitlines()]
    rows = [[plain_name(row[0]), plain_name(row[1]), *row[2:]] for row in rows]
    names = [row[0] for row in rows]
    assert len(names) == len(set(names)), "a kernel is registered twice"
    return {
        name: {"portable": portable or None, "launches": int(launches), "threads": int(threads), "shared_bytes": int(shared)}
        for name, portable, launches, threads, shared in rows
    }
