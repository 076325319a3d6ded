"""Describe client devices by the rates that bound their work, with a table of named ones.

The figures of :data:`DEVICES` and :data:`LINKS` come from spec sheets; docs/clock.md names the sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from fedexperts.errors import UserError

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
MBIT = 1e6 / 8
"""Bytes in 10^6 bits."""
CUSTOM = "custom"
"""Name by which ``clock.device`` refers to the device of ``[clock.custom]``."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Rates between a client and the server, in 10^6 bits per second."""

    download_mbit: float
    upload_mbit: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """Section `[clock.custom]`: a device of your own, by the rates that it reaches."""

    half_tflops: float
    """Matrix products in bfloat16 or float16, in 10^12 floating-point operations per second."""
    float32_tflops: float
    """Matrix products in float32, in 10^12 floating-point operations per second."""
    memory_gb_per_s: float
    """Bandwidth of the memory that holds the model, in 10^9 bytes per second."""
    host_gb_per_s: float
    """Bandwidth from main memory to that memory, such as PCIe, in 10^9 bytes per second."""
    disk_gb_per_s: float
    """Bandwidth of the disk, in 10^9 bytes per second."""
    memory_gb: float
    """Size of the memory that holds the model, in 10^9 bytes."""
    download_mbit: float
    """Bandwidth from the server, in 10^6 bits per second."""
    upload_mbit: float
    """Bandwidth to the server, in 10^6 bits per second."""
    operation_us: float = 0.0
    """Time that each operation takes beside its work, such as its launch, in 10^-6 seconds."""
    no_grad_operation_us: float | None = None
    """The same for operations outside the forward and backward passes of training, such as those of a
    profile; without it `operation_us`."""

    def __post_init__(self) -> None:
        """Refuse rates that nothing can be divided by."""
        for item in fields(self):
            value, may_be_zero = getattr(self, item.name), item.name.endswith("operation_us")
            if value is not None and (value < 0 or (value == 0 and not may_be_zero)):
                least = "at least" if may_be_zero else "above"
                raise UserError(f"{item.name} must be {least} 0, not {value:g}")

    @property
    def memory_bytes(self) -> int:
        """Size of the memory that holds the model."""
        return round(self.memory_gb * GIGA)

    def with_link(self, link: Link) -> "Device":
        """Return the device behind another link."""
        return replace(self, download_mbit=link.download_mbit, upload_mbit=link.upload_mbit)

    def used(self, utilisation: float) -> "Device":
        """Return the device with that share of its peak rate of matrix products."""
        half, full = self.half_tflops * utilisation, self.float32_tflops * utilisation
        return replace(self, half_tflops=half, float32_tflops=full)

    def operation_seconds(self, *, flops: int, num_bytes: int, is_half: bool, has_grad: bool = True) -> float:
        """Return the time of one operation: the longer of its arithmetic and its memory traffic, and what it
        takes beside."""
        rate = self.half_tflops if is_half else self.float32_tflops
        busy = max(flops / (rate * TERA), num_bytes / (self.memory_gb_per_s * GIGA))
        no_grad_us = self.operation_us if self.no_grad_operation_us is None else self.no_grad_operation_us
        return busy + (self.operation_us if has_grad else no_grad_us) * MICRO

    def moving_seconds(self, *, host_bytes: int, disk_bytes: int) -> float:
        """Return the time of bytes that move between disk, main memory and the model's memory."""
        return host_bytes / (self.host_gb_per_s * GIGA) + disk_bytes / (self.disk_gb_per_s * GIGA)

    def link_seconds(self, *, download_bytes: int, upload_bytes: int) -> tuple[float, float]:
        """Return the time of a download and of an upload."""
        return download_bytes / (self.download_mbit * MBIT), upload_bytes / (self.upload_mbit * MBIT)


LINKS: Mapping[str, Link] = {
    "gigabit": Link(download_mbit=1000.0, upload_mbit=1000.0),
    "broadband": Link(download_mbit=100.0, upload_mbit=20.0),
    "mobile": Link(download_mbit=56.74, upload_mbit=12.61),
}
"""Links by name."""


def _device(link: str, **rates: float) -> Device:
    own = LINKS[link]
    return Device(**rates, download_mbit=own.download_mbit, upload_mbit=own.upload_mbit)


DEVICES: Mapping[str, Device] = {
    "l20": _device(
        "gigabit",
        half_tflops=119.5,
        float32_tflops=59.35,
        memory_gb_per_s=864.0,
        host_gb_per_s=31.5,
        disk_gb_per_s=7.45,
        memory_gb=48.0,
    ),
    "rtx_4090": _device(
        "broadband",
        half_tflops=165.15,
        float32_tflops=82.58,
        memory_gb_per_s=1008.0,
        host_gb_per_s=31.5,
        disk_gb_per_s=7.45,
        memory_gb=24.0,
    ),
    "laptop": _device(
        "broadband",
        half_tflops=23.22,
        float32_tflops=11.61,
        memory_gb_per_s=256.0,
        host_gb_per_s=15.75,
        disk_gb_per_s=7.45,
        memory_gb=8.0,
    ),
    "phone": _device(
        "mobile",
        half_tflops=7.4,
        float32_tflops=3.7,
        memory_gb_per_s=64.0,
        host_gb_per_s=64.0,
        disk_gb_per_s=4.2,
        memory_gb=8.0,
    ),
}
"""Devices by name, at the peak rates of their spec sheets."""
