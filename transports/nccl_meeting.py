"""How ranks of the nccl transport meet: what each needs to have, and what all refuse alike."""

from __future__ import annotations

import importlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import AbcclError, TransportError
from .topology import Exchange

TIMEOUT = 300.0
"""Seconds that a new communicator waits for all its ranks."""

SHARE, SHARING = "NCCL_MULTI_RANK_GPU_ENABLE", 23000
"""The variable that lets ranks share a GPU, and the first version of NCCL that knows it."""

_CUPY = 14  # the first whose unique ids are bytes


def find_nccl() -> Any:
    """The module cupy.cuda.nccl, with NCCL behind it.

    Raises:
        TransportError: it can not be had; the message says what to install.
    """
    extra = "pip install -U 'abccl[cuda13]', or 'abccl[cuda12]' for a driver of CUDA 12"
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise TransportError(f"the nccl transport needs cupy, which can not be imported ({error}): {extra}") from error
    if int(cupy.__version__.split(".")[0]) < _CUPY:
        raise TransportError(f"the nccl transport needs cupy {_CUPY} or newer, and this is {cupy.__version__}: {extra}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cupy warns if the library is missing, and imports nothing of it
        nccl = importlib.import_module("cupy.cuda.nccl")
    if not nccl.available:
        try:
            importlib.import_module("cupy_backends.cuda.libs.nccl")
        except ImportError as error:
            raise TransportError(
                f"the nccl transport needs NCCL's library, which cupy {cupy.__version__} can not load ({error}): "
                f"{extra}; they bring nvidia-nccl-cu13 and nvidia-nccl-cu12"
            ) from error
    return nccl


def meet(exchange: Exchange, rank: int, size: int, driver: Any, nccl: Any, timeout: float) -> tuple[Any, Any]:
    """NCCL's module and a new communicator. Collective; two exchanges. The arguments are `nccl_wire`'s.

    Raises:
        TransportError: on all ranks, if one has no NCCL, theirs differ, ranks share a GPU where NCCL does not allow it,
            or NCCL fails.
    """
    card: dict[str, Any] = {"error": ""}
    try:
        nccl = nccl or find_nccl()
        card |= {"version": nccl.get_version(), "gpu": driver.uuid.hex()}
        card |= {"shares": os.environ.get(SHARE, "") not in ("", "0")}
        card |= {"id": nccl.get_unique_id().hex() if rank == 0 else ""}
    except (AbcclError, RuntimeError) as error:
        card["error"] = str(error)
    # Who calls NCCL waits for all others, and can not be helped out: so nobody does before all are known to come.
    cards = [json.loads(blob) for blob in exchange(json.dumps(card).encode())]
    _check_errors(cards)
    _check_versions([card["version"] for card in cards])
    _check_gpus([card["gpu"] for card in cards], cards[0]["version"], all(card["shares"] for card in cards))
    made: list[Any] = []

    def make() -> None:
        driver.make_current()
        made.append(nccl.NcclCommunicator(size, bytes.fromhex(cards[0]["id"]), rank))

    outcome = {"error": ""}
    try:
        if not within(timeout, make):
            outcome["error"] = f"NCCL waits for other ranks since {timeout:g} s; NCCL_DEBUG=INFO tells where it is"
    except (AbcclError, RuntimeError) as error:
        outcome["error"] = f"NCCL says {error}; NCCL_DEBUG=WARN makes it tell more"
    try:
        _check_errors([json.loads(blob) for blob in exchange(json.dumps(outcome).encode())])
    except BaseException:
        for communicator in made:
            communicator.abort()
        raise
    return nccl, made[0]


def within(timeout: float, call: Callable[[], object]) -> bool:
    """Whether a call that may wait for ever has returned in time; a thread makes it, and is left in it.

    Raises:
        Exception: what the call raised.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def _check_errors(cards: Sequence[dict[str, Any]]) -> None:
    for rank, card in enumerate(cards):
        if card["error"]:
            raise TransportError(f"nccl: rank {rank} of {len(cards)}: {card['error']}")


def _check_versions(versions: Sequence[int]) -> None:
    for rank, version in enumerate(versions):
        if version != versions[0]:
            raise TransportError(
                f"nccl: all ranks need the same NCCL, and rank 0 has {_words(versions[0])}, rank {rank} "
                f"{_words(version)}: install one on all"
            )


def _check_gpus(gpus: Sequence[str], version: int, allowed: bool) -> None:
    twin = next((rank for rank, gpu in enumerate(gpus) if gpu in gpus[:rank]), None)
    if twin is None or (allowed and version >= SHARING):
        return
    raise TransportError(
        f"nccl: ranks {gpus.index(gpus[twin])} and {twin} share a GPU: give each rank one of its own, or take the "
        f"transport cuda_ipc. NCCL {_words(SHARING)} and newer (this is {_words(version)}: pip install -U "
        f"nvidia-nccl-cu13 gets another) lets ranks share one if {SHARE}=1 is set on all ranks"
    )


def _words(version: int) -> str:
    """NCCL's number of a version as people write it."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
