"""What is wrong with a compiled launch."""

from __future__ import annotations

from tools.dry_run.capture import ARCHITECTURES, Seen
from tools.dry_run.read import Compiled

# ptxas at times keeps a few bytes on the stack to reach a round number of registers.
SPILLS_ALLOWED = 16


def programs_per_sm(arch: str, registers: int, warps: int, shared: int) -> int:
    """How many programs of a kernel share one SM; 0 if not even one fits."""
    limit = ARCHITECTURES[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out in 256 per warp
    by_registers = 16384 // per_warp * 4 // warps  # by each of the SM's four parts
    per_program = -(-(shared + 1024) // 128) * 128
    by_shared = (limit.shared_kib << 10) // per_program
    return min(limit.programs, limit.warps // warps, by_registers, by_shared)


def judge(seen: Seen, compiled: Compiled | str) -> list[str]:
    """What is wrong with one specialisation."""
    if isinstance(compiled, str):
        return [compiled]
    arch = seen.launch.arch
    nvidia = ARCHITECTURES[arch].target.backend == "cuda"
    wrong = [f"ptxas: {line}" for line in compiled.warnings]
    if compiled.spills > SPILLS_ALLOWED:
        wrong.append(f"{compiled.spills} bytes of spills")
    if nvidia and not programs_per_sm(arch, compiled.registers, compiled.warps, compiled.shared):
        wrong.append(f"{compiled.shared} bytes of shared memory do not fit")
    if compiled.product in ("bf16", "f16"):
        missing = sorted(
            x for x in ARCHITECTURES[arch].instructions if not compiled.operations.get(x)
        )
        wrong += [f"its matrix product has no {x}" for x in missing]
    if nvidia:
        for name in sorted(seen.wide):
            element = 4 if seen.launch.pointers[name] == "fp32" else 2
            for access, count in sorted(compiled.accesses.get(name, {}).items()):
                if access.bytes <= element:
                    what = f"{name}: {count} x {access.kind} of {access.bytes} bytes"
                    wrong.append(f"{what}, with even rows in {seen.wide[name]}")
        if "?" in compiled.accesses:
            wrong.append(f"addresses of unknown origin: {compiled.accesses['?']}")
    return wrong
