"""The backend "abccl" of torch.distributed.

`register` is all that importing torch runs of it; the process group is imported when one is made.
"""
