"""The dry run of the GPU (tools/dry_run): what our launches become, and that its gate can fail.

Run without TRITON_INTERPRET: the interpreter replaces the compiler.
"""

import os
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.dry_run import capture, cases, judge, read  # noqa: E402
from tools.dry_run.__main__ import dry_run  # noqa: E402

CASE = cases.Case("dense", "bfloat16", "plain", (4096, 128256, 1024))


def test_launches_of_sm_90_compile_to_what_they_should():
    """The cases of `make test`; `make dry-run` takes all of them and every architecture."""
    rows, wrong = dry_run("sm_90", quick=True)
    if judge.table_path().exists():
        wrong += judge.compare(rows, judge.read_table(judge.table_path()), complete=False)
    assert not wrong, "\n".join(wrong)


def test_tables_of_the_docs_are_those_of_the_results():
    assert judge.DOCS.read_text() == judge.docs_with_tables(), "python -m tools.dry_run --docs"


# --- The gate's judgement, from planted inputs -------------------------------------------------

PTX = """
.visible .entry copy(
\t.param .u64 .ptr .global .align 1 copy_param_0,
\t.param .u64 .ptr .global .align 1 copy_param_1,
\t.param .u32 copy_param_2,
\t.param .u64 .ptr .global .align 1 copy_param_3
)
{
\tld.param.b64 \t%rd1, [copy_param_0];
\tld.param.b64 \t%rd2, [copy_param_1];
\tmad.wide.s32 \t%rd3, %r1, 4, %rd1; // an address of z
\tadd.s64 \t%rd4, %rd2, %rd9;
$L__BB0_1:
\t@%p1 ld.global.L1::evict_last.b32 { %r2 }, [ %rd3 + 0 ];
\t@%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd3 + 16 ];
\t@%p1 st.global.b16 [ %rd5 + 0 ], { %rs1 };
\tcp.async.cg.shared.global [ %r7 + 0 ], [ %rd3 + 0 ], 0x10, %r8;
\tmov.b64 \t%rd5, %rd4;
\t@%p2 bra \t$L__BB0_1;
}
"""
LOG = """ptxas info    : 11 bytes gmem
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'copy' for 'sm_90a'
    40 bytes stack frame, 24 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
GOOD = read.Compiled(
    hash="0" * 64,
    warps=8,
    registers=96,
    spills=0,
    shared=96 << 10,
    warnings=[],
    product="bf16",
    accesses={
        "z": {read.Access("ld", 16): 4},
        "p": {read.Access("st", 16): 2},
        "labels": {read.Access("ld", 8): 1},
    },
    operations={"HGMMA": 4, "UTMALDG": 6},
)


def seen(wide=("z", "p")):
    pointers = {"z": "fp32", "p": "bf16", "labels": "i64"}
    launch = capture.Launch("sm_90", None, "", (), None, pointers)
    return capture.Seen(launch, frozenset("zp"), dict.fromkeys(wide, CASE), [CASE])


def test_an_access_is_counted_for_the_pointer_that_its_address_comes_from():
    found = read.read_accesses(PTX, ["z", "p", "unused"])
    wanted = {"z": {("ld", 4): 1, ("ld", 16): 1, ("cp", 16): 1}, "p": {("st", 2): 1}}
    assert found == wanted


def test_an_address_of_unknown_origin_is_wrong():
    found = read.read_accesses(PTX.replace("%rd2, [", "%rd7, ["), ["z", "p", "unused"])
    assert found["?"] == {("st", 2): 1}
    assert "unknown origin" in judge.judge(seen(), GOOD._replace(accesses=found))[-1]


def test_warnings_and_spills_are_read_from_the_report_of_ptxas():
    report = read.read_ptxas(LOG)
    assert (report["registers"], report["spills"]) == (168, 44)
    assert len(report["warnings"]) == 1 and "C7515" in report["warnings"][0]


def test_operations_are_read_from_sass():
    sass = """
        /*0170*/                   UTMALDG.2D [UR8], [UR4], desc[URZ] ;
        /*0190*/              @!P0 STG.E.U16 desc[UR6][R2.64], R5 ;   /* 0x0000000502 */
        /*01a0*/             @!UP1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*01b0*/                   STG.E.128 desc[UR6][R2.64], R4 ;
    """
    assert read.read_sass(sass) == {"UTMALDG": 1, "STG": 2, "HGMMA": 1}


BAD = {
    "scalar store of P": ({"accesses": {"p": {read.Access("st", 2): 64}}}, "p: 64 x st of 2 bytes"),
    "scalar load of logits": ({"accesses": {"z": {read.Access("ld", 4): 16}}}, "z: 16 x ld of 4"),
    "warning": ({"warnings": ["(C7515) serialized"]}, "C7515"),
    "spills": ({"spills": 4}, "4 bytes of spills"),
    "shared memory": ({"shared": 228 << 10}, "do not fit"),
    "no tensor cores": ({"operations": {"FFMA": 64, "UTMALDG": 6}}, "no HGMMA"),
    "no asynchronous copies": ({"operations": {"HGMMA": 4, "LDG": 6}}, "no UTMALDG"),
}  # fmt: skip


@pytest.mark.parametrize("change, complaint", BAD.values(), ids=BAD)
def test_the_gate_fails_on(change, complaint):
    assert judge.judge(seen(), GOOD) == []
    (found,) = judge.judge(seen(), GOOD._replace(**change))
    assert complaint in found


def test_a_compiler_error_is_wrong_and_scalar_access_to_ragged_rows_is_not():
    assert judge.judge(seen(), "CompilationError: no") == ["CompilationError: no"]
    scalar = GOOD._replace(accesses={"p": {read.Access("st", 2): 64}})
    assert judge.judge(seen(wide=["z"]), scalar) == []


@pytest.mark.parametrize(
    "arch, registers, warps, shared, programs",
    [
        ("sm_90", 128, 8, 96 << 10, 2),  # registers and shared memory alike
        ("sm_90", 129, 8, 96 << 10, 1),  # 136 are handed out
        ("sm_90", 32, 4, 0, 16),  # warps
        ("sm_90", 32, 1, 0, 32),  # the most programs
        ("sm_90", 96, 1, 0, 20),  # five warps in each of its four parts
        ("sm_86", 64, 8, 49 << 10, 2),  # with their KiB each, 100 KiB
        ("sm_86", 64, 8, 50 << 10, 1),
        ("sm_90", 64, 8, 228 << 10, 0),
    ],
)
def test_programs_per_sm(arch, registers, warps, shared, programs):
    compiled = GOOD._replace(registers=registers, warps=warps, shared=shared)
    assert judge.programs_per_sm(arch, compiled) == programs


ROW = judge.Row("sm_90", "dz_tile", "bfloat16", "plain", "even", 1, 128, 0, 98328, 2, 1480, "HGMMA")


def test_what_fell_behind_the_table_is_wrong():
    (fell,) = judge.compare([ROW._replace(programs=1)], [ROW], complete=True)
    assert "from 2 to 1 programs per SM" in fell
    lacks, gone = judge.compare([ROW._replace(variant="all")], [ROW], complete=True)
    assert "not in the table" in lacks and "no longer launched" in gone
    table = [ROW, ROW._replace(arch="sm_80"), ROW._replace(variant="all")]
    assert judge.compare([ROW._replace(programs=3)], table, complete=False) == []


def test_a_table_keeps_the_rows_of_architectures_that_were_not_run(tmp_path):
    other, path = ROW._replace(arch="sm_80"), tmp_path / "table.csv"
    judge.write_table([ROW, other], path)
    judge.write_table([ROW._replace(registers=96)], path)
    assert judge.read_table(path) == [other, ROW._replace(registers=96)]


# --- Capture and compilation, from planted kernels ---------------------------------------------


def _copy(source, target, n, v, BLOCK: tl.constexpr):
    for row in tl.range(0, n):
        offs = tl.arange(0, BLOCK)
        x = tl.load(source + row * v + offs, mask=offs < v)
        tl.store(target + row * v + offs, x.to(tl.bfloat16), mask=offs < v)


copy = triton.jit(_copy)
copy_of_any_width = triton.jit(_copy, do_not_specialize=["v"])


def launch(kernel, n=3, v=1024):
    source = torch.empty(n, v, device="meta")
    kernel[(1,)](source, source.bfloat16(), n, v, BLOCK=1024, enable_fp_fusion=True)


def test_a_width_that_the_compiler_may_not_know_is_caught():
    found = {}
    for kernel in (copy, copy_of_any_width):
        with capture.recording("sm_90") as recorder:
            launch(kernel)
        (one,) = recorder.seen.values()
        found[kernel] = judge.judge(one, read.compile_launch(one.launch))
    assert found[copy] == []
    assert [x.split(", with")[0].partition(" x ")[2] for x in found[copy_of_any_width]] == [
        "ld of 4 bytes",
        "st of 2 bytes",
    ]


def test_one_specialisation_is_one_entry_however_often_it_is_launched():
    with capture.recording("sm_90") as recorder:
        for v in (1024, 512, 1003):
            launch(copy, v=v)
    even, ragged = recorder.seen.values()
    assert recorder.keys == [even.launch.key, even.launch.key, ragged.launch.key]
    assert even.wide and not ragged.wide


def _with_other_kernels(case):
    for part, v in (("forward with gradient", 1024), ("forward without gradient", 1003)):
        launch(copy, v=v)
        yield part


def _unbound(case):
    copy[(1,)](torch.empty(3, device="meta"))
    yield "never"


def _idle(case):
    yield "nothing"


@pytest.mark.parametrize(
    "run, complaint",
    [
        (_with_other_kernels, "other kernels with gradient than without"),
        (_unbound, "TypeError"),
        (_idle, "launches nothing"),
    ],
)
def test_a_case_is_wrong_that(run, complaint, monkeypatch):
    monkeypatch.setitem(cases.RUN, "planted", run)
    _, wrong = capture.capture("sm_90", [cases.Case("planted", "", "", ())])
    assert len(wrong) == 1 and complaint in wrong[0]


def test_a_crash_of_the_compiler_loses_one_launch(monkeypatch):
    def compile_or_die(launch):
        if launch == 1:
            os._exit(1)
        return f"result {launch}"

    monkeypatch.setattr(read, "compile_launch", compile_or_die)
    found = read.compile_all([0, 1, 2])
    assert found == ["result 0", "the compiler process died", "result 2"]
