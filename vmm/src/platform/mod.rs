//! The few devices that are neither virtio nor on the PCI bus: a serial port for the first messages of the kernel, the
//! panic notifier, and the registers by which ACPI powers off, resets, and learns of hot-plug.

pub(crate) mod hotplug;
pub(crate) mod power;
pub(crate) mod pvpanic;
pub(crate) mod serial;
pub(crate) mod slots;

/// What the registers of hot-plug read that name nothing, or nothing more.
pub(crate) const NONE: u8 = 0xff;
