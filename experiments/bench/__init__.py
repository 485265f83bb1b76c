"""Is the kernel fast and lean? `python -m experiments.bench --help` shows the benchmark.

The pieces, each of which knows only those above it:

    problem     sizes and numbers
    timing      programs, and how they are timed together
    automatic   the baselines: unsharded, and partitioned by jit
    kernel      this package, by default and in every layout
    products    the products of a step and nothing else
    summary     ratios and means, from the record alone
    targets     verdicts on them
    measure     the runs of one size
    report      tables
    figures     the picture
    __main__    make bench
    pytorch     make bench-torch, whose other side is pytorch_ranks
    gpu         make bench-gpu
"""
