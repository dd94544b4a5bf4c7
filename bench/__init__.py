"""Microbenchmarks: how long a collective or a message takes, here and in other libraries, in the same processes.

`python -m abccl.bench all_reduce --vs gloo`, or `abccl bench`. Files in reading order: `collectives` and `messages`
(what is measured: sizes, bus factors), `data` (random data and the result it must give), `buffers` (the memory),
`peers` (who is measured), `measure` (how), `world` (the ranks),
`roofline` and `regime` (what the machine can do), `options` (what was asked for), `run` (the whole of it, on every
rank), `table`, `osu`, `record` and `machine` (what is printed and kept), `__main__` (the command).
`runs`, `performance` and `report` make docs/performance.md: the commands in it, their runs, the text.
"""
