"""Tensor parallel or pipeline parallel? `python -m experiments.parallelism --help` shows more.

The pieces, each of which knows only those above it:

    chips       devices and links that people have
    ways        the ways to use M devices
    counted     what each moves and holds, in its compiled program and as predicted
    work        what each takes, task by task: FLOPs, bytes, collectives
    modelled    seconds of a step on real links, and the link at which two ways take as long
    process     one of two processes, which times what it is told to
    measured    seconds of a step, of two processes that have a core each
    published   simulated ratios of throughput beside published ones
    schedules   what every schedule costs: of stages on their own, and of stages in step
    settings    what can be asked for
    finding     what the record says, in words
    report      tables
    figures     pictures
    __main__    make parallelism
"""
