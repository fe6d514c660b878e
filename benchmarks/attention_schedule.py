"""Cycles of the TPU attention kernels as the compiler schedules them, beside other kernels', without a TPU.

    pip install 'jaxtrain[tpu]'            # and tokamax (Python 3.12), for its column
    python benchmarks/attention_schedule.py [--sequences] [--json]

For a chip, a pass and a head size: cycles of one core for one tile of logits, bfloat16.  The passes are forward, dq,
dkv, and backward, which is dq and dkv in one kernel.

- step: everything from one tile in the steady state to the next.  Ours: the loop over pairs of tiles that need no mask,
  from its label to its branch back, halved.  The others work on one tile in each step of the grid: the grid's loop,
  along the way that visits a tile but neither begins nor ends a row of them.  JAX's kernels compute the mask in every
  tile of a causal sequence; of tokamax's two kinds of tile the cheaper, without, is counted.  In the row "backward",
  splash and flash are the sums of their dq and dkv, which is how they run by default; "splash fused" is splash's one
  kernel for both.
- hot: the part of a step from the first to the last bundle that feeds a matrix unit.  It leaves away what a kernel
  does before and after, and so flatters a kernel that does much there.
- floor: the tile's products at the peak of the data sheet.
- masked: a tile of ours that needs the mask.

Whole sequences (``--sequences``), one head: the cycles of all steps of the grid, with what begins and ends a block,
the tiles that need a mask, and steps that are skipped at what skipping costs.  Splash attention visits the tiles of the
causal triangle whatever the documents are; ours those where documents meet.

Nothing runs: bundles are counted along the way that the program takes (see ``tpu_schedule``), a cycle each.  Waiting
for memory is not in them, nor is what XLA does around a kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tpu_schedule import Kernel, Stretch, compiler_environment, keep_schedules, read_kernels

# chip -> floating-point operations in bfloat16 a cycle and core: two for each cell of the matrix units, of which there
# are 4 x 128 x 128 on the older chips; on the newer 2 x 256 x 256, each of which takes two rows a cycle.
FLOPS = {"v4": 131_072, "v5e": 131_072, "v5p": 131_072, "v6e": 524_288, "tpu7x": 524_288}
# pass -> matrix products of a tile.
PASSES = {"forward": 2, "dq": 3, "dkv": 4, "backward": 5}
# program in ``attention_programs`` -> what its kernels' names contain, by pass.
PEERS = {
    "ours": {"forward": "flash_forward", "dq": "flash_dq", "dkv": "flash_dkv", "backward": "flash_backward"},
    "splash": {"forward": "splash_mha_fwd", "dq": "splash_mha_dq", "dkv": "splash_mha_dkv"},
    "splash_fused": {"backward": "splash_mha_dkv"},
    "flash": {"forward": "jvp_jit_flash_attention", "dq": "flash_mha_bwd_dq", "dkv": "flash_mha_bwd_dkv"},
    "tokamax": {"forward": "splash_mha_fwd", "backward": "splash_mha_dkv"},
}
# The length that is compiled: more than one chunk of keys at every head size.
LENGTH = 8192
SEQUENCES = (8192, 32768)
# Of 8,192 tokens; of longer sequences in proportion.
DOCUMENTS = {
    "causal": [8192],
    "8 equal": [1024] * 8,
    "8 unequal": [2500, 1700, 1300, 1000, 700, 500, 300, 192],
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """pass -> kernel; of ours, the lengths at which the backward pass is one kernel.  Empty: it does not compile."""

    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    one_backward: tuple[int, ...] = ()


def compiled(peer: str, chip: str, H: int, tile: tuple[int, int], dumps: Path) -> Compiled:
    """Compiles, unless its dumps are there from before.  Why something does not compile is said on stderr."""
    folder = dumps / f"{peer}-{chip}-{H}-{tile[0]}x{tile[1]}"
    if not folder.exists():
        fresh = folder.with_suffix(".part")
        program = Path(__file__).parent / "attention_programs.py"
        command = [sys.executable, str(program), json.dumps([peer, chip, LENGTH, H, tile])]
        done = subprocess.run(command, env=compiler_environment(fresh), capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
            reason = (lines or done.stderr.splitlines() or ["no reason given"])[-1]
            print(f"# {peer}, head size {H}, does not compile for {chip}: {reason[:300]}", file=sys.stderr)
            shutil.rmtree(fresh, ignore_errors=True)
            return Compiled()
        keep_schedules(fresh)
        (fresh / "fused.json").write_text(done.stdout)
        fresh.rename(folder)
        print(f"# compiled {peer}, head size {H}, for {chip}", file=sys.stderr)
    try:
        found = read_kernels(folder, chip)
    except ValueError as error:
        if peer == "ours":
            raise
        print(f"# {peer}, head size {H}, for {chip} cannot be read: {error}", file=sys.stderr)
        return Compiled()
    kernels = {name: kernel for name, part in PEERS[peer].items() for key, kernel in found.items() if part in key}
    return Compiled(kernels, tuple(json.loads((folder / "fused.json").read_text())))


# What the stretches of a schedule cost.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridCosts:
    """Cycles of a kernel that works on one tile in a step of the grid; begin and end are a row's, beyond the step."""

    step: int
    hot: int
    skipped: int
    begin: int
    end: int

    @classmethod
    def read(cls, kernel: Kernel) -> GridCosts:
        tile = min(kernel.matrix, key=lambda stretch: stretch.own_cycles)
        path = kernel.path(tile)
        grid = next(i for i, stretch in enumerate(path) if stretch.kind == "loop")
        around = sum(stretch.own_cycles for stretch in path[grid:-1])
        rest = [s for s in path[-2].children if s not in kernel.matrix]
        return cls(
            step=around + tile.own_cycles,
            hot=kernel.hot(tile),
            skipped=around,
            begin=sum(s.end - s.start for s in rest if s.start < tile.start),
            end=sum(s.end - s.start for s in rest if s.start > tile.start),
        )

    def sequence(self, T: int, tile: tuple[int, int], row: int) -> int:
        """Cycles of a causal sequence of whole tiles; row: which side of a tile a row of the grid holds."""
        rows, columns = T // tile[row], T // tile[1 - row]
        visited = sum(-(-(i + 1) * tile[0] // tile[1]) for i in range(T // tile[0]))
        return visited * self.step + (rows * columns - visited) * self.skipped + rows * (self.begin + self.end)


class LoopKernel:
    """Ours: a step of the grid holds one block and loops over the tiles of a chunk of the other side.

    In the order of the program: masked tiles before, the start of the first full tile, pairs of full tiles, the end of
    an odd count, the end of an even count, masked tiles after.
    """

    ORDER = ("loop", "if", "loop", "if", "if", "loop")

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        found = tuple(stretch.kind for stretch in kernel.matrix)
        if found != self.ORDER:
            raise ValueError(f"{kernel.name}: {found} feed a matrix unit, this benchmark knows {self.ORDER}")
        self.pairs, self.masked = kernel.matrix[2], kernel.matrix[5]
        step = kernel.path(kernel.matrix[0])
        self.step = next(stretch for stretch in step if stretch.kind == "loop")

    def cycles(self, before: int, full: int, after: int, first: bool, last: bool, clear: int = 0) -> int:
        """Of a step with so many tiles of each kind, which may be the block's first or last.

        clear: turns of the loop, before all others, that clears what all blocks add to.
        """
        pairs, odd = max(full - 1, 0) // 2, full % 2
        turns = (before, full > 0, pairs, odd, full > 0 and not odd, after)
        counts = dict(zip(map(id, self.kernel.matrix), map(int, turns), strict=True))
        begin, end = self.kernel.matrix[0].start, self.masked.end

        def one(stretch: Stretch) -> int:
            return stretch.own_cycles + sum(count(child) * one(child) for child in stretch.children)

        def count(stretch: Stretch) -> int:
            if id(stretch) in counts:
                return counts[id(stretch)]
            inside = [counts[id(s)] for s in stretch.walk() if id(s) in counts]
            if len(inside) == len(counts):
                return 1
            if inside:
                return int(any(inside))
            if stretch.kind == "loop":
                return clear
            if any(s.kind == "loop" for s in stretch.walk()):
                return int(clear > 0)
            return int(first if stretch.end <= begin else last if stretch.start >= end else True)

        return one(self.step)


def documents_of(lengths: list[int], T: int):
    """Positions and segments, int32 ``[1, T]``."""
    import numpy as np

    lengths = [length * T // sum(lengths) for length in lengths]
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    return np.concatenate([np.arange(length) for length in lengths])[None], segments


def our_sequence(kernel: LoopKernel, name: str, T: int, H: int, tile: tuple[int, int], lengths: list[int]) -> dict:
    """Cycles, and tiles of each kind, of one head over the real ranges of packed documents."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from attention_programs import spec_and_marks

    from jaxtrain.kernels.attention import tpu

    spec, marks = spec_and_marks(*map(jnp.asarray, documents_of(lengths, T)), H, tile)
    x = jax.ShapeDtypeStruct((1, 1, T, H), jnp.bfloat16)
    call = (tpu._Queries if name in ("forward", "dq") else tpu._Keys).of(spec, x, x, x)
    blocks = np.asarray(call.ranges(*tpu.pad_marks(marks, *call.units())))[0]
    chunks, tiles = call.grid()[-1], call.shape.tiles
    cycles = masked = full = 0
    for i, block in enumerate(blocks):
        for chunk in range(chunks):
            a, b, c, d = np.clip(block - chunk * tiles, 0, tiles).tolist()
            clear = call.T // call.shape.queries if i == chunk == 0 else 0
            cycles += kernel.cycles(b - a, c - b, d - c, chunk == 0, chunk == chunks - 1, clear)
            masked, full = masked + (b - a) + (d - c), full + c - b
    return {"ours": cycles, "masked_tiles": masked, "full_tiles": full}


# Rows and tables.


def tile_row(chip: str, H: int, tile: tuple[int, int], name: str, found: dict[str, Compiled]) -> dict:
    ours = LoopKernel(found["ours"].kernels[name])
    kernel = ours.kernel

    def other(peer: str, what: str = "step") -> int | None:
        kernels = found[peer].kernels if peer in found else {}
        parts = [name] if name in kernels or name != "backward" else ["dq", "dkv"]
        if not all(part in kernels for part in parts):
            return None
        return sum(getattr(GridCosts.read(kernels[part]), what) for part in parts)

    use = kernel.use(ours.pairs)
    unit = max(use, key=use.get)
    step, hot = ours.pairs.own_cycles / 2, kernel.hot(ours.pairs) / 2
    splash, splash_hot = other("splash"), other("splash", "hot")
    return {
        "chip": chip,
        "pass": name,
        "head_dim": H,
        "ours": step,
        "splash": splash,
        "ratio": splash and round(step / splash, 3),
        "ours_hot": hot,
        "splash_hot": splash_hot,
        "hot_ratio": splash_hot and round(hot / splash_hot, 3),
        "splash_fused": other("splash_fused"),
        "flash": other("flash"),
        "tokamax": other("tokamax"),
        "floor": round(PASSES[name] * 2 * tile[0] * tile[1] * H / FLOPS[chip]),
        "ours_masked": ours.masked.own_cycles,
        "unit": unit,
        "unit_share": round(use[unit], 3),
        "use": {unit: round(share, 3) for unit, share in use.items()},
        "ours_spills": kernel.spills(ours.pairs) / 2,
        "tile": list(tile),
    }


def sequence_rows(chip: str, H: int, tile: tuple[int, int], found: dict[str, Compiled]) -> Iterator[dict]:
    ours, splash = found["ours"], found["splash"].kernels
    for T in SEQUENCES:
        passes = ["forward", "backward"] if T in ours.one_backward else ["forward", "dq", "dkv"]
        for documents, lengths in DOCUMENTS.items():
            rows = {}
            for name in passes:
                rows[name] = our_sequence(LoopKernel(ours.kernels[name]), name, T, H, tile, lengths)
                parts = ["dq", "dkv"] if name == "backward" else [name]
                rows[name]["splash"] = sum(
                    GridCosts.read(splash[part]).sequence(T, tile, row=int(part == "dkv")) for part in parts
                )
            rows["all"] = {key: sum(row[key] for row in rows.values()) for key in rows["forward"]}
            for name, row in rows.items():
                what = {"chip": chip, "pass": name, "head_dim": H, "tokens": T, "documents": documents}
                yield what | row | {"ratio": round(row["ours"] / row["splash"], 3)}


TILE_COLUMNS = {
    "chip": "chip", "pass": "pass", "head_dim": "head", "ours": "ours", "splash": "splash", "ratio": "ratio",
    "ours_hot": "ours hot", "splash_hot": "splash hot", "hot_ratio": "hot ratio", "splash_fused": "splash fused",
    "flash": "flash", "tokamax": "tokamax", "floor": "floor", "ours_masked": "ours masked", "unit": "fullest",
    "unit_share": "share", "ours_spills": "spills",
}  # fmt: skip
SEQUENCE_COLUMNS = {
    "chip": "chip", "pass": "pass", "head_dim": "head", "tokens": "tokens", "documents": "documents",
    "full_tiles": "full tiles", "masked_tiles": "masked tiles", "ours": "ours", "splash": "splash", "ratio": "ratio",
}  # fmt: skip


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown."""

    def text(value) -> str:
        if value is None:
            return "–"
        if isinstance(value, int) or (isinstance(value, float) and value > 10):
            return f"{value:,.0f}"
        return str(value)

    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[text(row[key]) for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tile_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sizes = tuple(map(int, found.groups())) if found else ()
    if not sizes or any(size == 0 or size % 128 or LENGTH % size for size in sizes):
        message = f"{text!r}: write queries x keys, such as 512x512, multiples of 128 that divide {LENGTH}"
        raise argparse.ArgumentTypeError(message)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=FLOPS, default=list(FLOPS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--tiles", type=tile_of, default=(512, 512), metavar="QxK", help="queries x keys of a tile")
    parser.add_argument("--sequences", action="store_true", help="cycles of whole sequences too")
    parser.add_argument(
        "--json", action="store_true", help="print rows as JSON: of tiles, or with --sequences of those"
    )
    parser.add_argument("--dumps", type=Path, help="keep the compiler's dumps in this folder; those there are read")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    args = parser.parse_args()
    if not importlib.util.find_spec("libtpu"):
        print("the TPU compiler is not installed: pip install 'jaxtrain[tpu]'", file=sys.stderr)
        raise SystemExit(2)
    os.environ["JAX_PLATFORMS"] = "cpu"
    peers = list(PEERS)
    if not importlib.util.find_spec("tokamax"):
        peers.remove("tokamax")
        print("# tokamax is not installed: its column stays empty", file=sys.stderr)

    cases = [(chip, H) for chip in args.chips for H in args.head_dims]
    tiles, sequences = [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        dumps = args.dumps or Path(folder)
        dumps.mkdir(parents=True, exist_ok=True)
        asked = [{peer: pool.submit(compiled, peer, *case, args.tiles, dumps) for peer in peers} for case in cases]
        for (chip, H), futures in zip(cases, asked, strict=True):
            found = {peer: future.result() for peer, future in futures.items()}
            passes = [name for name in PASSES if name in found["ours"].kernels]
            tiles += [tile_row(chip, H, args.tiles, name, found) for name in passes]
            if args.sequences and passes and found["splash"].kernels:
                sequences += sequence_rows(chip, H, args.tiles, found)
    if args.json:
        print(json.dumps(sequences if args.sequences else tiles, indent=1))
    else:
        print(table(tiles, TILE_COLUMNS))
        if args.sequences:
            print("\n" + table(sequences, SEQUENCE_COLUMNS))
    if {(row["chip"], row["head_dim"]) for row in tiles} != set(cases):
        print("# ours did not compile everywhere, see above", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
