"""Gives every column of a table mean 0 and variance 1, however large its .npy file: two passes, the memory of a few rows.

    python examples/standardize_memmap.py                   # on 64 MB of generated data, in a temporary folder
    python examples/standardize_memmap.py in.npy out.npy    # on a file of yours: rows x columns of floats
    python examples/standardize_memmap.py --gigabytes 10 --folder /data    # takes twice as much on the disk

The first pass takes the Moments of each chunk of rows and merges them, the second normalizes each chunk by them, a third
looks at what came out. The output is written beside its place and moved there when it is whole.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evennorm.numpy import merge, moments, normalize

CHUNK = 1 << 24
"""Bytes that are in memory at a time."""


class Table:
    """The rows of a .npy file. Each chunk is mapped by itself: what is mapped and was touched counts as memory."""

    def __init__(self, path, mode="r", dtype=None, shape=None):
        try:
            whole = np.lib.format.open_memmap(path, mode, dtype, shape)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path}: no .npy file to open: {error}") from None
        if whole.ndim != 2 or whole.dtype.kind != "f" or not whole.flags.c_contiguous or not whole.size:
            raise SystemExit(
                f"{path}: a table of floats is needed, row after row; found {whole.dtype} of shape {whole.shape}"
            )
        self.path, self.mode, self.offset = path, mode.replace("w", "r"), whole.offset
        self.dtype, self.shape, self.bytes, self.row = whole.dtype, whole.shape, whole.nbytes, whole.strides[0]

    def rows(self, part):
        offset, shape = self.offset + part.start * self.row, (part.stop - part.start, self.shape[1])
        return np.memmap(self.path, self.dtype, self.mode, offset, shape)

    def parts(self, what):
        """The chunks, one after the other; says how far it is."""
        rows, total = max(1, CHUNK // self.row), self.shape[0]
        begin = time.perf_counter()
        for start in range(0, total, rows):
            stop = min(total, start + rows)
            yield slice(start, stop)
            if sys.stderr.isatty():
                print(f"\r{what} {stop / total:4.0%}", end="\n" if stop == total else "", file=sys.stderr)
        seconds = time.perf_counter() - begin
        print(f"{what:10} {self.bytes / 1e9:7.3f} GB in {seconds:7.2f} s, {self.bytes / seconds / 1e9:5.2f} GB/s")

    def moments(self, what):
        return merge(moments(self.rows(part)) for part in self.parts(what))


def standardize(source, target, epsilon):
    table = Table(source)
    found = table.moments("moments")
    partial = target.with_name(f".{target.name}.part")
    try:
        result = Table(partial, "w+", table.dtype, table.shape)
        for part in result.parts("normalize"):
            normalize(table.rows(part), found.mean, found.variance, epsilon=epsilon, out=result.rows(part))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return found


def generate(path, size, columns):
    """float32 around means of up to 100,000."""
    rng = np.random.default_rng(0)
    means, deviations = rng.uniform(-1e5, 1e5, columns), rng.uniform(0.5, 2, columns).astype(np.float32)
    table = Table(path, "w+", np.float32, (max(2, int(size) // (4 * columns)), columns))
    for part in table.parts("generate"):
        rows = table.rows(part)
        rng.standard_normal(out=rows, dtype=np.float32)
        rows *= deviations
        rows += means.astype(np.float32)


def peak():
    """The most memory that this process has held, in MB; macOS counts bytes, Linux kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", nargs="?", type=Path, help="a .npy file; generated without it")
parser.add_argument("target", nargs="?", type=Path, help="the .npy file to write")
parser.add_argument("--gigabytes", type=float, default=0.064, help="how much to generate (0.064)")
parser.add_argument("--columns", type=int, default=256, help="columns to generate (256)")
parser.add_argument(
    "--epsilon", type=float, default=1e-12, help="added to the variance: columns of one value become 0 (1e-12)"
)
parser.add_argument("--folder", help="where generated files are, while this runs; the system's temporary folder without it")
args = parser.parse_args()
if (args.source is None) != (args.target is None):
    parser.error("give a file to read and one to write, or neither")

before = peak()
with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    source, target = args.source or Path(folder, "in.npy"), args.target or Path(folder, "out.npy")
    if args.source is None:
        generate(source, args.gigabytes * 1e9, args.columns)
    found = standardize(source, target, args.epsilon)
    after = Table(target).moments("check")
print(f"before     means from {found.mean.min():.1f} to {found.mean.max():.1f}, over {found.count} rows")
print(f"after      means of at most {abs(after.mean).max():.1e}, variances within {abs(after.variance - 1).max():.1e} of 1")
print(f"memory     {peak():.0f} MB at most, {before:.0f} MB of it before the first row")
