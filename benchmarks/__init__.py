"""What the methods cost: time side by side in one process, and bytes and operations counted.

    python -m benchmarks                 all of it on the CPU (make bench)
    python -m benchmarks.layers          single linears           .models   whole training steps
    python -m benchmarks.memory          real sizes, fake tensors .scaling  cost against size
    python -m benchmarks.inference       adapter against base     .loading  an SDXL-size adapter
    python -m benchmarks.gpu             all of it on a GPU (make bench-gpu)
    python -m benchmarks.page            docs/performance.md from the results

Every command takes names of its entries, and then measures and replaces those alone.
"""
