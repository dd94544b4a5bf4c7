"""Communicators: what users call."""

from .binding import premul_sum
from .communicator import Communicator, connect, init
from .launch import spawn
from .work import Work

__all__ = ["Communicator", "Work", "connect", "init", "premul_sum", "spawn"]
