"""A communicator's calls with arrays in the memory of a CUDA device: how they find the device side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..algorithms import Collective
from ..transports import Transport
from .arrays import Array, View, is_on_device
from .bootstrap import Bootstrap
from .debug import Log
from .persistent import Persistent, PersistentExecution
from .tuner.tuner import AlgorithmLike, Tuner

if TYPE_CHECKING:
    from .device import DeviceSide
    from .device_messages import DeviceMessages


class DeviceCalls(ABC):
    """What a communicator does with arrays on a device."""

    size: int
    timeout: float
    tuner: Tuner
    _transport: Transport
    _devices: DeviceSide | None = None
    _device_messages: dict[int, DeviceMessages]
    _log: Log | None = None

    @property
    def devices(self) -> DeviceSide | None:
        """The ranks' CUDA devices and what carries messages between them; None until a call with an array there."""
        return self._devices

    @abstractmethod
    def _meeting(self, members: Sequence[int]) -> Bootstrap:
        """Where ranks of this communicator meet to make something new. Collective among all of its ranks."""

    def _device_side(self, array: Array, call: str) -> DeviceSide:
        """The device side. Collective at first."""
        if self._devices is None:
            from .device import connect_devices  # and with it what only devices need

            meeting = self._meeting(range(self.size))
            self._devices = connect_devices(meeting, self._transport, array, call, self.tuner, self.timeout)
            self._devices.tell(self._log)
        return self._devices

    def _messages_on_device(self, found: View) -> DeviceMessages:
        from .device_messages import DeviceMessages, ordinal_of  # and with it what only devices need

        ordinal = ordinal_of(found)
        if ordinal not in self._device_messages:
            self._device_messages[ordinal] = DeviceMessages(ordinal)
        return self._device_messages[ordinal]

    def _device_call(
        self, collective: Collective, x: Array, out: Array, op: Any, root: int, algorithm: AlgorithmLike
    ) -> Any:
        """The plan of a call; None if its arrays are in host memory."""
        array = next((one for one in (x, out) if is_on_device(one)), None)
        if array is None:
            return None
        return self._device_side(array, collective.value).bind(collective, x, out, op, root, algorithm)

    def _persistent_on_device(self, call: Any, x: Array, out: Array, text: str) -> Persistent:
        assert self._devices is not None
        return PersistentExecution(partial(self._devices.run, call, x, out), text)
