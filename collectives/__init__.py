"""Communicators: what users call."""

from .communicator import Communicator, connect, init, premul_sum
from .launch import spawn
from .work import Work

__all__ = ["Communicator", "Work", "connect", "init", "premul_sum", "spawn"]
