"""The code that nvcc generates for the CUDA kernels: instructions an entry, accesses and their order.

``python -m pecker_fast.benchmarks.sass`` compiles the kernels that stream and prints a table. Needs nvcc and cuobjdump
(of the CUDA toolkit or of Triton's package), no GPU.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pecker_fast.ops.extension import library_path

ROOT = Path(__file__).resolve().parents[1]
CUDA_SOURCES = ROOT / "csrc" / "cuda"
# As in setup.py.
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}")
STREAMING = ("adam_f32", "adam_bf16", "adam_fp16", "pointwise", "packing")


def find_tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit: below CUDA_HOME, on PATH, or in Triton's package; None if there is none."""
    homes = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)]
    candidates = [str(Path(home) / "bin" / name) for home in homes]
    candidates.append(shutil.which(name) or "")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    return next((path for path in candidates if path and Path(path).exists()), None)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def is_vector_load(self) -> bool:
        """A load of 8 or 16 bytes from global memory."""
        return re.match(r"LDG?\.E.*\.(64|128)\b", self.opcode) is not None

    @property
    def is_vector_store(self) -> bool:
        return re.match(r"STG?\.E.*\.(64|128)\b", self.opcode) is not None

    @property
    def is_scalar_store(self) -> bool:
        return re.match(r"STG?\.E\b", self.opcode) is not None and not self.is_vector_store

    @property
    def is_vector_access(self) -> bool:
        return self.is_vector_load or self.is_vector_store

    @property
    def is_branch(self) -> bool:
        """Excludes the detour on which a diverged warp reconverges."""
        return self.opcode.startswith("BRA") and ".DIV" not in self.opcode and self.target is not None

    @property
    def target(self) -> int | None:
        """Address that a branch jumps to."""
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.opcode.startswith(("BRA", "BSSY")) else None
        return int(match[1], 16) if match else None

    def destinations(self) -> set[int]:
        """Registers that a load fills."""
        match = re.match(r"\s*R(\d+)", self.operands)
        if match is None:
            return set()
        width = re.search(r"\.(64|128)\b", self.opcode)
        count = int(width[1]) // 32 if width else 1
        return set(range(int(match[1]), int(match[1]) + count))

    def sources(self) -> set[int]:
        """Registers that the instruction reads (addresses as pairs)."""
        parts = self.operands.split(",", 1)
        stores = self.opcode.startswith(("ST", "RED", "ATOM"))
        text = self.operands if stores else parts[1] if len(parts) > 1 else ""
        read = set()
        for number, pair in re.findall(r"\bR(\d+)(\.64)?", text):
            read |= {int(number), int(number) + 1} if pair else {int(number)}
        if stores and (width := re.search(r"\.(64|128)\b", self.opcode)):
            data = re.findall(r"\bR(\d+)", self.operands.rsplit(",", 1)[-1])
            read |= set(range(int(data[-1]), int(data[-1]) + int(width[1]) // 32)) if data else set()
        return read


_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Way:
    """A path through the body of a loop."""

    instructions: tuple[Instruction, ...]

    def count(self, what: str) -> int:
        return sum(bool(getattr(instruction, what)) for instruction in self.instructions)


class Kernel:
    """A function of the disassembly: instructions, blocks, loops."""

    def __init__(self, mangled: str, instructions: Sequence[Instruction]) -> None:
        self.mangled = mangled
        self.instructions = tuple(instructions)

    @cached_property
    def name(self) -> str:
        return demangle(self.mangled)

    @cached_property
    def _blocks(self) -> dict[int, tuple[list[Instruction], list[int]]]:
        """For each block, by its first address: its instructions, and the blocks that may follow."""
        code = self.instructions
        leaders = {code[0].address}
        barriers: dict[str, int] = {}
        for this, following in zip(code, [*code[1:], None], strict=True):
            if this.is_branch:
                leaders.add(this.target)
            if this.opcode.startswith("BSSY"):
                leaders.add(this.target)
            if this.opcode.startswith(("BRA", "EXIT", "RET", "BREAK", "BSYNC")) and following is not None:
                leaders.add(following.address)
        blocks: dict[int, tuple[list[Instruction], list[int]]] = {}
        start = code[0].address
        for this, following in zip(code, [*code[1:], None], strict=True):
            if this.address in leaders:
                start = this.address
                blocks[start] = ([], [])
            blocks[start][0].append(this)
            if this.opcode.startswith("BSSY"):
                barriers[this.operands.split(",")[0].strip()] = this.target
            ends = following is None or following.address in leaders
            if not ends:
                continue
            successors = blocks[start][1]
            # A branch may have its condition among its operands too.
            always = not this.predicate and re.match(r"0x", this.operands) is not None
            unconditional = (this.is_branch and always) or (
                this.opcode.startswith(("EXIT", "RET")) and not this.predicate
            )
            if this.is_branch:
                successors.append(this.target)
            if this.opcode.startswith("BSYNC"):
                successors.append(barriers.get(this.operands.strip(), following.address if following else 0))
                unconditional = True
            if not unconditional and following is not None:
                successors.append(following.address)
        return blocks

    @cached_property
    def _loops(self) -> list[tuple[int, set[int]]]:
        blocks = self._blocks
        reached, stack = set(), [self.instructions[0].address]
        while stack:
            address = stack.pop()
            if address in blocks and address not in reached:
                reached.add(address)
                stack += blocks[address][1]
        blocks = {address: block for address, block in blocks.items() if address in reached}
        before: dict[int, list[int]] = {address: [] for address in blocks}
        for address, (_, successors) in blocks.items():
            for successor in successors:
                if successor in before:
                    before[successor].append(address)
        found: dict[int, set[int]] = {}
        for address, (_, successors) in blocks.items():
            for header in successors:
                # Compilers lay loops out with their header first.
                if header > address or header not in blocks:
                    continue
                body, stack = {header}, [address]
                while stack:
                    block = stack.pop()
                    if block not in body and block >= header:
                        body.add(block)
                        stack += before[block]
                found[header] = found.get(header, set()) | body
        return list(found.items())

    def streaming_loops(self) -> list[tuple[int, set[int]]]:
        """(header, blocks) of the innermost loops that store vectors."""
        storing = [
            (header, body)
            for header, body in self._loops
            if any(instruction.is_vector_store for block in body for instruction in self._blocks[block][0])
        ]
        return [(h, body) for h, body in storing if not any(other < body for _, other in storing)]

    def fast_path(self, loop: tuple[int, set[int]]) -> Way:
        """The path through a loop's body with the most vector accesses, then the most special functions of the
        arithmetic, then the fewest instructions."""
        header, body = loop
        best: dict[int, tuple[tuple[int, int, int], list[int]]] = {}

        def walk(block: int) -> tuple[tuple[int, int, int], list[int]] | None:
            """The best way from a block back to the header."""
            if block in best:
                return best[block]
            onward = []
            for successor in self._blocks[block][1]:
                if successor == header:
                    onward.append(((0, 0, 0), []))
                elif successor in body and successor > block:
                    way = walk(successor)
                    if way is not None:
                        onward.append(way)
            if not onward:
                return None
            (accesses, special, length), way = max(onward, key=lambda item: item[0])
            own = self._blocks[block][0]
            accesses += sum(instruction.is_vector_access for instruction in own)
            special += sum(instruction.opcode.startswith("MUFU") for instruction in own)
            best[block] = ((accesses, special, length - len(own)), [block, *way])
            return best[block]

        way = walk(header)
        if way is None:
            return Way(())
        return Way(tuple(instruction for block in way[1] for instruction in self._blocks[block][0]))

    def count(self, what: str) -> int:
        return sum(bool(getattr(instruction, what)) for instruction in self.instructions)


def parse(text: str) -> list[Kernel]:
    """The kernels of ``cuobjdump -sass``."""
    kernels = []
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name, body = part.split("\n", 1)
        instructions = [
            Instruction(int(address, 16), (predicate or "").strip(), opcode, operands.strip())
            for address, predicate, opcode, operands in _LINE.findall(body)
        ]
        kernels.append(Kernel(name.strip(), instructions))
    return kernels


def demangle(name: str) -> str:
    for tool in ("cu++filt", "c++filt"):
        path = find_tool(tool)
        if path:
            name = subprocess.run([path, name], capture_output=True, text=True, check=True).stdout.strip()
            break
    return name.replace("pecker_fast::", "").replace("(anonymous namespace)::", "")


def early_uses(instructions: Iterable[Instruction]) -> list[tuple[Instruction, Instruction]]:
    """(use, later load) where a loaded register is read before a later vector load: that load waits for the first."""
    pending: dict[int, Instruction] = {}
    uses: list[Instruction] = []
    found = []
    for instruction in instructions:
        if instruction.is_vector_store:
            break
        if instruction.is_vector_load:
            found += [(use, instruction) for use in uses]
            uses = []
        if pending.keys() & instruction.sources():
            uses.append(instruction)
        if instruction.is_vector_load:
            pending.update(dict.fromkeys(instruction.destinations(), instruction))
    return found


_USAGE = re.compile(r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+).*? LOCAL:(?P<local>\d+)")


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout + result.stderr


def compile_source(source: str, architecture: str, cubin: Path) -> None:
    """Compiles ``csrc/cuda/<source>.cu`` to ``cubin``. Raises RuntimeError if nvcc is missing or fails."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    _run([nvcc, *FLAGS, "-cubin", f"-arch={architecture}", str(CUDA_SOURCES / f"{source}.cu"), "-o", str(cubin)])


def built_cubins(folder: Path) -> dict[tuple[str, str], Path]:
    """The cubins of the installed CUDA library, by source and architecture, as files in ``folder``.

    Empty if there is no such library, or a source is newer. Raises RuntimeError if cuobjdump is missing or fails.
    """
    library = library_path("cuda")
    sources = [path for part in ("cuda", "common") for path in (ROOT / "csrc" / part).iterdir()]
    if library is None or max(path.stat().st_mtime for path in sources) > library.stat().st_mtime:
        return {}
    _run([_disassembler(), "-xelf", "all", str(library)], folder)
    return {tuple(path.stem.rsplit(".", 1)): path for path in folder.glob("*.cubin")}


def resource_usage(cubin: Path) -> dict[str, dict[str, int]]:
    """For each kernel (mangled) its "registers", and its bytes of "stack" (with spilled values) and "local" memory.

    Raises RuntimeError if cuobjdump is missing or fails.
    """
    report = _run([_disassembler(), "-res-usage", str(cubin)])
    names = ("registers", "stack", "local")
    return {match["name"]: {name: int(match[name]) for name in names} for match in _USAGE.finditer(report)}


def disassemble(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin. Raises RuntimeError if cuobjdump is missing or fails."""
    return parse(_run([_disassembler(), "-sass", str(cubin)]))


def _disassembler() -> str:
    dump = find_tool("cuobjdump")
    if dump is None:
        raise RuntimeError("cuobjdump was not found: install the CUDA toolkit or triton")
    return dump


ENTRIES = 4
"""Entries of a group: what a thread works on in one round of a streaming loop."""


@dataclass(frozen=True)
class Row:
    """One streaming loop: instructions an entry, and the vector accesses of a round. Clipping, decay and similar
    features are off; all lists that the kernel can work on are present."""

    kernel: str
    instructions: float
    loads: int
    stores: int


def instruction_table(kernels: Iterable[Kernel]) -> list[Row]:
    rows = []
    for kernel in kernels:
        for loop in kernel.streaming_loops():
            path = kernel.fast_path(loop)
            counts = path.count("is_vector_load"), path.count("is_vector_store")
            rows.append(Row(kernel.name, len(path.instructions) / ENTRIES, *counts))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="instructions an entry of the CUDA kernels that stream")
    parser.add_argument("sources", nargs="*", default=STREAMING, help="files of csrc/cuda, without their .cu")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args(arguments)
    print(f"instructions an entry  vector accesses  kernel ({options.arch})")
    with tempfile.TemporaryDirectory() as folder:
        for source in options.sources:
            cubin = Path(folder) / f"{source}.cubin"
            try:
                compile_source(source, options.arch, cubin)
                kernels = disassemble(cubin)
            except RuntimeError as error:
                print(f"sass: {error}", file=sys.stderr)
                return 2
            for row in instruction_table(kernels):
                print(f"{row.instructions:21.1f}  {f'{row.loads} in, {row.stores} out':>15}  {row.kernel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
