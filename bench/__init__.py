"""Microbenchmarks: how long a collective takes, here and in other libraries, in the same processes.

`python -m abccl.bench all_reduce --vs gloo`, or `abccl bench`. Files in reading order: `collectives` (what is measured:
buffers, bus factors), `data` (random data and the result it must give), `peers` (who is measured), `measure` (how),
`world` (the ranks), `roofline` and `regime` (what the machine can do), `options` (what was asked for), `run` (the whole
of it, on every rank), `table`, `record` and `machine` (what is printed and kept), `__main__` (the command).
`runs`, `performance` and `report` make docs/performance.md: the commands in it, their runs, the text.
"""
