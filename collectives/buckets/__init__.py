"""Gradient buckets: averages of gradients that run while backward goes on. Users know it as `abccl.buckets`.

`GradientBuckets` for training loops of one's own, `hook` for DistributedDataParallel: two faces of `averages`.
"""

from .gradients import GradientBuckets
from .hook import HookState, hook
from .report import BucketReport, Report

__all__ = ["BucketReport", "GradientBuckets", "HookState", "Report", "hook"]
