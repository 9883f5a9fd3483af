"""A dry run of the GPU without a GPU: the launchers' own launches, compiled, read and judged.

    python -m tools.dry_run                     # every architecture; status 1 if anything is wrong
    python -m tools.dry_run --arch sm_90 --kernel softmax_tile
    python -m tools.dry_run --write             # the table and that of docs/kernels.md anew
    python -m tools.dry_run --docs              # that of docs/kernels.md alone

The backend and the small ops run on tensors without memory that say they lie on a GPU (`cases`). Their
launches go through Triton's own binder, which sees what it will see on a GPU: which integers are 1 or
divide by 16, which pointers are aligned, which arguments are None (`capture`). Each specialisation is
compiled for its target and its PTX, SASS and ptxas report are read (`read`), judged and compared
with the committed table (`judge`). Nothing is launched, no GPU is needed.

Run it without TRITON_INTERPRET: the interpreter replaces the compiler in a process that sets it.
"""
