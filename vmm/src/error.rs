//! What can go wrong while a VM is built and driven. One sentence each; the cause is the source.

use std::io;

use vmm_sys_util::errno;

use crate::config::{ConfigError, DeviceId};
use crate::pci::SLOTS;

/// Why a VM could not be built, started, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The description of the VM contradicts itself or asks for what cannot be.
    #[error("the VM cannot be as described")]
    Config(#[from] ConfigError),

    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm: enable hardware virtualization and load kvm_intel or kvm_amd, then check its permissions"
    )]
    OpenKvm(#[source] errno::Error),
    /// `/dev/kvm` is something else.
    #[error(
        "/dev/kvm does not speak KVM's language: it has to be the device that the kernel's kvm module makes"
    )]
    NotKvm,

    /// The host's KVM lacks something that this VMM needs.
    #[error("the host's KVM has no {capability}: a newer kernel is needed")]
    MissingCapability {
        /// Its name.
        capability: &'static str,
    },

    /// An operation on the VM as a whole failed.
    #[error("KVM cannot {operation}")]
    Vm {
        /// What was asked.
        operation: &'static str,
        /// What KVM said.
        #[source]
        source: errno::Error,
    },

    /// Guest memory cannot be had.
    #[error("cannot allocate {size_mib} MiB of guest memory")]
    AllocateMemory {
        /// How much.
        size_mib: u64,
        /// Why.
        #[source]
        source: io::Error,
    },

    /// The file that a saved VM has left its memory in cannot be used.
    #[error("cannot use the memory of the saved VM")]
    AdoptMemory(#[source] io::Error),

    /// Guest memory cannot be written to a file.
    #[error("cannot save the memory of the VM")]
    SaveMemory(#[source] io::Error),

    /// A DAX window has no place in the guest's address space.
    #[error(
        "a DAX window of {size_mib} MiB finds no place below the {address_bits} bits of the processor's physical addresses: make it smaller, or max_memory_mib"
    )]
    WindowPlace {
        /// How large it was to be.
        size_mib: u32,
        /// What there is.
        address_bits: u32,
    },

    /// A DAX window cannot be had.
    #[error("cannot reserve {size_mib} MiB for a DAX window")]
    AllocateWindow {
        /// How much.
        size_mib: u32,
        /// Why.
        #[source]
        source: io::Error,
    },

    /// KVM refuses a memory slot.
    #[error("KVM refuses the memory slot of {len:#x} bytes at {base:#x}")]
    MemorySlot {
        /// Guest physical address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// What KVM said.
        #[source]
        source: errno::Error,
    },

    /// A structure of the boot protocol does not fit or lies outside memory.
    #[error("cannot write the {what} into guest memory: give the VM more memory")]
    WriteBootData {
        /// Its name.
        what: &'static str,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },

    /// The kernel is neither an ELF vmlinux nor a bzImage, or is broken, or does not fit into memory.
    #[error(
        "cannot load the kernel: it must be an x86-64 ELF vmlinux or bzImage that fits into the guest's memory"
    )]
    LoadKernel(#[source] linux_loader::loader::Error),

    /// The kernel's file cannot be read.
    #[error("cannot read the kernel")]
    ReadKernel(#[source] io::Error),

    /// The kernel is a bzImage without a 64-bit entry point.
    #[error("the kernel has no 64-bit entry point: build it with CONFIG_X86_64")]
    Not64Bit,

    /// The initramfs cannot be read.
    #[error("cannot read the initramfs")]
    ReadInitramfs(#[source] io::Error),

    /// The initramfs does not fit beside the kernel.
    #[error(
        "the initramfs of {size} bytes does not fit into memory beside the kernel: give the VM more memory"
    )]
    InitramfsTooLarge {
        /// In bytes.
        size: u64,
    },

    /// The command line is too long or has a character that the kernel does not take.
    #[error("the kernel's command line cannot be used")]
    Cmdline(#[source] linux_loader::cmdline::Error),

    /// The ACPI tables outgrew their room.
    #[error("the ACPI tables need {size} bytes, there is room for {room}")]
    AcpiTooLarge {
        /// In bytes.
        size: u64,
        /// In bytes.
        room: u64,
    },

    /// An operation on one vCPU failed.
    #[error("KVM cannot {operation} of vCPU {vcpu}")]
    Vcpu {
        /// Its index.
        vcpu: u8,
        /// What was asked.
        operation: &'static str,
        /// What KVM said.
        #[source]
        source: errno::Error,
    },

    /// KVM took or gave fewer model-specific registers than asked.
    #[error("KVM cannot access model-specific register {index:#x} of vCPU {vcpu}")]
    Msr {
        /// Index of the vCPU.
        vcpu: u8,
        /// Index of the register.
        index: u32,
    },

    /// A thread of the VMM cannot be started.
    #[error("cannot start thread {name}")]
    SpawnThread {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },

    /// A vCPU's thread is gone and cannot take the order.
    #[error("the thread of vCPU {vcpu} has ended")]
    VcpuGone {
        /// Its index.
        vcpu: u8,
    },

    /// A descriptor of the VMM's own cannot be made.
    #[error("cannot make an event descriptor")]
    EventFd(#[source] io::Error),

    /// The console's descriptor cannot be made non-blocking.
    #[error("cannot use the descriptor for the guest's console")]
    Console(#[source] io::Error),

    /// An interrupt cannot be delivered to the guest.
    #[error("KVM cannot {operation} interrupt {gsi}")]
    Interrupt {
        /// The GSI.
        gsi: u32,
        /// What was asked.
        operation: &'static str,
        /// What KVM said.
        #[source]
        source: errno::Error,
    },

    /// More devices than slots of the PCI bus.
    #[error("no place on the PCI bus for one more device: a VM has at most {SLOTS}")]
    PciBusFull,

    /// More message-signalled interrupts than KVM routes.
    #[error("no interrupt for one more device")]
    NoInterrupt,

    /// Two devices claim the same addresses.
    #[error("addresses {base:#x} to {end:#x} are claimed twice")]
    AddressConflict {
        /// First address.
        base: u64,
        /// First address after.
        end: u64,
    },

    /// A device cannot be made.
    #[error("cannot make the {device} device")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// More vCPUs than the description of the VM allows, or none.
    #[error("the VM can have 1 to {max_vcpus} vCPUs, not {vcpus}")]
    ResizeVcpus {
        /// What was asked for.
        vcpus: u8,
        /// What it may have.
        max_vcpus: u8,
    },

    /// More memory than the description of the VM allows.
    #[error("the VM can have up to {max_memory_mib} MiB of memory, not {memory_mib}")]
    ResizeMemory {
        /// What was asked for.
        memory_mib: u32,
        /// What it may have.
        max_memory_mib: u32,
    },

    /// The thread that makes vCPUs and devices while the guest runs is gone.
    #[error("the thread that makes vCPUs and devices has ended")]
    WorkshopClosed,

    /// The VM has no such device.
    #[error("the VM has no {device}")]
    NoSuchDevice {
        /// Which.
        device: DeviceId,
    },

    /// The VM has the device from the start.
    #[error("the {device} was there when the VM started, and stays until its end")]
    DeviceIsFixed {
        /// Which.
        device: DeviceId,
    },

    /// The removal of the device has begun before, and has not ended.
    #[error("the {device} is being removed already")]
    RemovalPending {
        /// Which.
        device: DeviceId,
    },

    /// The guest has not let go of the device in time. It stays.
    #[error("the guest does not let go of the {device}")]
    NotLetGo {
        /// Which.
        device: DeviceId,
    },

    /// A saved state does not fit this VM.
    #[error("the saved state of the VM cannot be restored")]
    Restore(#[from] crate::snapshot::RestoreError),
}

/// An error and its sources, in one line, for a log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
