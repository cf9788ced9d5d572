//! One virtual machine: built, started, ended.
//!
//! ```text
//! new ──► built (vCPUs paused) ──start──► running ──guest or vCPU ends it──► over
//!            └────────────────────────────── drop: threads joined, memory freed ──┘
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vm_memory::GuestMemoryMmap;

use crate::board::{Board, Parts};
use crate::boot::{self, BootSource};
use crate::config::{ConfigError, VmConfig};
use crate::control::ExitReason;
use crate::devices::vsock::VsockHandle;
use crate::end::End;
use crate::error::Error;
use crate::kvm::{self, KvmVm};
use crate::layout::{KVM_IDENTITY_MAP_BASE, KVM_TSS_BASE};
use crate::memory;
use crate::vcpu::{CpuModel, ExitKind, Surroundings, Vcpu, VcpuSetup};
use crate::virtio::worker::ThreadSetup;

/// The files of a VM.
#[derive(Debug)]
pub struct VmFiles {
    /// An ELF vmlinux or a bzImage. Its offset is moved, so nobody else may use this open file at the same time.
    pub kernel: File,
    /// A cpio archive; an empty file for a guest without. Its offset is moved likewise.
    pub initramfs: File,
    /// Where the guest's console goes. It is made non-blocking: what it does not take at once is lost, and counted.
    pub console: File,
    /// One for each disk of the description.
    pub disks: Vec<File>,
}

/// How the VM's threads confine themselves.
#[derive(Debug, Clone, Copy)]
pub struct Confinement {
    /// For the thread of a device.
    pub device: ThreadSetup,
    /// For the thread of a vCPU.
    pub vcpu: VcpuSetup,
}

impl Confinement {
    /// None: for tests and tools that run a guest they trust.
    pub const NONE: Self = Self {
        device: |_| Ok(()),
        vcpu: || Ok(()),
    };
}

/// A virtual machine. Dropping it ends the guest at once, joins all threads and frees its memory.
#[derive(Debug)]
pub struct Vmm {
    /// First, so that nothing runs any more when the rest goes.
    vcpus: Vec<Vcpu>,
    board: Board,
    end: Arc<End>,
    /// After the vCPUs: KVM uses the mapping while they run.
    _memory: GuestMemoryMmap,
}

impl Vmm {
    /// Builds the VM, with everything loaded and the vCPUs paused. `on_ready` is called once, on a thread of the VM, when
    /// the guest connects to its ready port; it must not block.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind.
    pub fn new(
        config: &VmConfig,
        mut files: VmFiles,
        on_ready: impl FnOnce() + Send + 'static,
        confinement: Confinement,
    ) -> Result<Self, Error> {
        config.validate()?;
        if config.disks.len() != files.disks.len() {
            return Err(Error::Config(ConfigError::DiskFiles {
                disks: config.disks.len(),
                files: files.disks.len(),
            }));
        }
        set_nonblocking(&files.console).map_err(Error::Console)?;

        let kvm = kvm::open()?;
        let vm = create_vm(&kvm)?;
        let memory = memory::allocate(config.memory_mib)?;
        memory::register(&vm, &memory)?;
        let vm = Arc::new(KvmVm(vm));
        let end = Arc::new(End::new().map_err(Error::EventFd)?);
        let board = Board::new(
            Parts {
                config,
                console: files.console,
                disks: files.disks,
                memory: &memory,
                hypervisor: vm.clone(),
                end: &end,
                setup: confinement.device,
            },
            on_ready,
        )?;
        let entry = boot::load(
            &memory,
            BootSource {
                kernel: &mut files.kernel,
                initramfs: &mut files.initramfs,
                kernel_params: &config.kernel_params,
                vcpus: config.vcpus,
            },
        )?;

        let model = CpuModel::new(&kvm, config.vcpus)?;
        let surroundings = Surroundings {
            buses: Arc::clone(&board.buses),
            end: Arc::clone(&end),
            setup: confinement.vcpu,
        };
        let vcpus = (0..config.vcpus)
            .map(|index| Vcpu::new(&vm.0, index, &model, surroundings.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        // The others wait for the kernel to start them.
        vcpus[0].boot_at(entry)?;

        Ok(Self {
            vcpus,
            board,
            end,
            _memory: memory,
        })
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When the thread of a vCPU has ended.
    pub fn start(&self) -> Result<(), Error> {
        self.vcpus.iter().try_for_each(Vcpu::resume)
    }

    /// The way to open connections into the guest.
    pub fn vsock(&self) -> VsockHandle {
        self.board.vsock()
    }

    /// Why the VM has ended; `None` while it has not. [`Self::as_fd`] is readable from then on.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.end.reason()
    }

    /// Every counter, by name.
    pub fn metrics(&self) -> BTreeMap<String, u64> {
        let mut metrics = BTreeMap::new();
        for kind in ExitKind::ALL {
            let count = self
                .vcpus
                .iter()
                .map(|vcpu| vcpu.counters().get(kind))
                .sum();
            metrics.insert(format!("vcpu_exits_{}", kind.name()), count);
        }
        self.board.collect(&mut metrics);
        metrics
    }
}

impl AsFd for Vmm {
    /// Readable once the VM has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

/// Makes a VM with an interrupt controller in the kernel. There is no PIT: hardware-reduced ACPI tells Linux so, and
/// kvm-clock and the TSC deadline timer need no calibration by one.
fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let failed = |operation| move |source| Error::Vm { operation, source };
    let vm = kvm.create_vm().map_err(failed("make a VM"))?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP_BASE)
        .map_err(failed("place its identity map"))?;
    let tss = usize::try_from(KVM_TSS_BASE).expect("x86-64 has 64-bit pointers");
    vm.set_tss_address(tss)
        .map_err(failed("place its task state"))?;
    vm.create_irq_chip()
        .map_err(failed("make the interrupt controllers"))?;
    Ok(vm)
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}
