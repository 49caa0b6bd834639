"""Machine code that reads a uniform register which nothing has written: a mistake of ptxas, seen before the code runs.

ptxas 12.8 makes such code where a kernel keeps two tiles, of rows of different widths, in one place of shared memory,
one after the other: of one of them it computes where tensor cores read from a register that it forgot to set
(docs/triton-forward.md). Results are then wrong, or the GPU reports an illegal address. The PTX is right, and so is
what ptxas makes of it without optimising; no test but one of that very launch would tell.
"""

import re
import subprocess
import tempfile

import triton

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)\s*(.*?)\s*;")
LABEL = re.compile(r"(\.L\w+):")
REGISTER = re.compile(r"\bUR(\d+)\b")
# What writes a uniform register; these begin with a U as well, and read them only.
WRITES = re.compile(r"U(?!TMA|TC|BLK|CGA|SETMAXREG|STG|RED)|R2UR|S2UR|CS2UR|REDUX|VOTEU|LDCU|SYNCS|ELECT")
BESIDE = re.compile(r"U?P\w+|U?RZ|R\d+")  # what an instruction may write before it
DESCRIBED = re.compile(r"gdesc\[UR(\d+)\]")


def disassembled(cubin: bytes) -> str:
    """What Triton's nvdisasm says of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def unset_reads(code: str) -> list[str]:
    """The instructions that read a uniform register which no instruction on any way to them has written.

    One that moves it elsewhere does not count: of a pair, ptxas may move the half that it sets afterwards.

    Raises ValueError where there are none, or none that reads a tile from shared memory: they are written otherwise
    than this knows.
    """
    instructions, labels = [], {}
    for line in code.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append((found[2], found[3], bool(found[1])))
    if not any("gdesc[" in operands for _, operands, _ in instructions):
        raise ValueError(f"code: expected one instruction with gdesc[...] or more, got none among {len(instructions)}")
    following = _following(instructions, labels)
    effects = [_effects(name, operands) for name, operands, _ in instructions]
    written: dict[int, set[int]] = {0: set()}  # before an instruction that is reached, on one way or another
    waiting = [0]
    while waiting:
        number = waiting.pop()
        (name, _, guarded), (reads, writes) = instructions[number], effects[number]
        behind = written[number] | writes
        if name == "UMOV" and not guarded and not reads <= written[number]:
            behind = written[number] - writes
        for target in following[number]:
            if target not in written or not behind <= written[target]:
                written[target] = behind | written.get(target, set())
                waiting.append(target)
    return [
        f"UR{register} in {instructions[number][0]} {instructions[number][1]}"
        for number, before in sorted(written.items())
        if instructions[number][0] not in ("UMOV", "MOV.SPILL")
        for register in sorted(effects[number][0] - before)
    ]


def _following(instructions: list[tuple[str, str, bool]], labels: dict[str, int]) -> list[list[int]]:
    """Which instructions may come next: rather too many, where the code does not say."""
    targets = [[labels[x] for x in re.findall(r"`\((\.L\w+)\)", operands)] for _, operands, _ in instructions]
    kinds = [name.split(".")[0] for name, _, _ in instructions]
    joined = [target for kind, there in zip(kinds, targets, strict=True) if kind == "BSSY" for target in there]
    returns = [number + 1 for number, kind in enumerate(kinds) if kind == "CALL"]
    found = []
    for number, (kind, (_, operands, guarded)) in enumerate(zip(kinds, instructions, strict=True)):
        always = operands.startswith("`(") if kind == "BRA" else kind in ("EXIT", "BRX", "JMP", "RET")
        ends = always and not guarded
        here = [] if ends else [number + 1]
        if kind in ("BRA", "JMP", "CALL", "WARPSYNC"):
            here += targets[number]
        elif kind == "BRX":
            here += labels.values()
        elif kind in ("BSYNC", "BREAK"):
            here += joined
        elif kind == "RET":
            here += returns
        found.append([target for target in here if target < len(instructions)])
    return found


def _effects(name: str, text: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction reads, and those that it writes."""
    operands, writes = [x.strip() for x in text.split(",")], set()
    if WRITES.match(name):
        place = next((i for i, x in enumerate(operands) if not BESIDE.fullmatch(x)), len(operands))
        if place < len(operands) and (found := REGISTER.fullmatch(operands[place])):
            width = 4 if ".128" in name else 2 if re.search(r"\.64|WIDE", name) else 1
            writes = set(range(int(found[1]), int(found[1]) + width))
            del operands[place]
    reads = set()
    for place, operand in enumerate(operands):
        if found := DESCRIBED.match(operand):
            # Two registers describe a tile. HGMMA names those of two tiles, the first of which, where it comes from
            # other registers, are idle.
            first, both = int(found[1]), name.startswith(("HGMMA", "IGMMA", "QGMMA"))
            reads |= set(range(first + 2 if both and place > 1 else first, first + 4 if both else first + 2))
        else:
            reads |= {int(x) for x in REGISTER.findall(operand)}
    return reads, writes
