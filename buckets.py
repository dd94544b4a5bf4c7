"""Gradient buckets for data-parallel training with torch: `GradientBuckets`, and `hook` for DistributedDataParallel."""

from .collectives.buckets import BucketReport, GradientBuckets, HookState, Report, hook

__all__ = ["BucketReport", "GradientBuckets", "HookState", "Report", "hook"]
