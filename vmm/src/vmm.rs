//! One virtual machine: built, started, ended.
//!
//! ```text
//! new ──────┐
//! restore ──┴► paused ◄──start, pause──► running ──the guest or a vCPU ends it──► over
//!                 └──────────────────────── drop: threads joined, memory freed ────┘
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use crate::board::{Board, BoardState, Parts};
use crate::boot::{self, BootSource};
use crate::config::{ConfigError, NicConfig, VmConfig};
use crate::control::ExitReason;
use crate::devices::vsock::VsockHandle;
use crate::end::End;
use crate::error::Error;
use crate::kvm::{self, KvmState, KvmVm};
use crate::memory;
use crate::snapshot::RestoreError;
use crate::vcpu::{CpuModel, ExitKind, Surroundings, Vcpu, VcpuSetup, VcpuState};
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
    /// One for each network device of the description.
    pub nics: Vec<NicFiles>,
}

/// The descriptors of a network device, see [`crate::config::NicConfig`].
#[derive(Debug)]
pub struct NicFiles {
    /// The queues of the tap.
    pub taps: Vec<OwnedFd>,
    /// As many of `/dev/vhost-net`, or none.
    pub vhost: Vec<OwnedFd>,
}

/// The files of a VM that goes on where another was saved.
#[derive(Debug)]
pub struct RestoreFiles {
    /// What [`Vmm::save_memory`] wrote. It is not changed, so any number of VMs may be restored from it.
    pub memory: File,
    /// As [`VmFiles::console`].
    pub console: File,
    /// As [`VmFiles::disks`].
    pub disks: Vec<File>,
    /// As [`VmFiles::nics`].
    pub nics: Vec<NicFiles>,
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
    kvm: Arc<KvmVm>,
    /// After the vCPUs: KVM uses the mapping while they run.
    memory: GuestMemoryMmap,
}

/// What a VM is built around.
#[derive(Debug)]
struct Machine {
    console: File,
    disks: Vec<File>,
    nics: Vec<NicFiles>,
    memory: GuestMemoryMmap,
}

/// The state of a VM as data, without its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    vcpus: Vec<VcpuState>,
    kvm: KvmState,
    board: BoardState,
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
        let memory = memory::allocate(config.memory_mib)?;
        let machine = Machine {
            console: files.console,
            disks: files.disks,
            nics: files.nics,
            memory,
        };
        let vmm = Self::build(config, machine, on_ready, confinement)?;
        let entry = boot::load(
            &vmm.memory,
            &mut BootSource {
                kernel: &mut files.kernel,
                initramfs: &mut files.initramfs,
                kernel_params: &config.kernel_params,
                vcpus: config.vcpus,
            },
        )?;
        // The others wait for the kernel to start them.
        vmm.vcpus[0].boot_at(entry)?;
        Ok(vmm)
    }

    /// Builds a VM that goes on where another was saved. `config` is that one's.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind.
    pub fn restore(
        config: &VmConfig,
        files: RestoreFiles,
        state: VmState,
        confinement: Confinement,
    ) -> Result<Self, Error> {
        config.validate()?;
        let memory = memory::adopt(files.memory, config.memory_mib)?;
        let machine = Machine {
            console: files.console,
            disks: files.disks,
            nics: files.nics,
            memory,
        };
        // Its guest has been ready before.
        let vmm = Self::build(config, machine, || (), confinement)?;
        if state.vcpus.len() != vmm.vcpus.len() {
            return Err(Error::Restore(RestoreError {
                device: "VM",
                reason: format!("it has {} vCPUs", state.vcpus.len()),
            }));
        }
        vmm.kvm.restore(&state.kvm)?;
        vmm.board.restore(state.board)?;
        for (vcpu, state) in vmm.vcpus.iter().zip(state.vcpus) {
            vcpu.restore(state)?;
        }
        Ok(vmm)
    }

    /// All of a VM but what is in its memory and registers.
    fn build(
        config: &VmConfig,
        machine: Machine,
        on_ready: impl FnOnce() + Send + 'static,
        confinement: Confinement,
    ) -> Result<Self, Error> {
        if config.disks.len() != machine.disks.len() {
            return Err(Error::Config(ConfigError::DiskFiles {
                disks: config.disks.len(),
                files: machine.disks.len(),
            }));
        }
        let fits = |(nic, files): (&NicConfig, &NicFiles)| {
            let pairs = usize::from(nic.queue_pairs);
            files.taps.len() == pairs && files.vhost.len() == if nic.vhost { pairs } else { 0 }
        };
        if config.nics.len() != machine.nics.len()
            || !config.nics.iter().zip(&machine.nics).all(fits)
        {
            return Err(Error::Config(ConfigError::NicFiles {
                nics: config.nics.len(),
            }));
        }
        set_nonblocking(&machine.console).map_err(Error::Console)?;
        let memory = machine.memory;
        let kvm = kvm::open()?;
        let vm = Arc::new(KvmVm::new(&kvm)?);
        memory::register(vm.fd(), &memory)?;
        let end = Arc::new(End::new().map_err(Error::EventFd)?);
        let board = Board::new(
            Parts {
                config,
                console: machine.console,
                disks: machine.disks,
                nics: machine.nics,
                memory: &memory,
                hypervisor: vm.clone(),
                end: &end,
                setup: confinement.device,
            },
            on_ready,
        )?;
        let model = CpuModel::new(&kvm, config.vcpus)?;
        let surroundings = Surroundings {
            buses: Arc::clone(&board.buses),
            end: Arc::clone(&end),
            setup: confinement.vcpu,
        };
        let vcpus = (0..config.vcpus)
            .map(|index| Vcpu::new(vm.fd(), index, &model, surroundings.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            vcpus,
            board,
            end,
            kvm: vm,
            memory,
        })
    }

    /// Lets the guest run, for the first time or after [`Self::pause`].
    ///
    /// # Errors
    /// When the thread of a vCPU has ended.
    pub fn start(&self) -> Result<(), Error> {
        self.board.resume();
        self.vcpus.iter().try_for_each(Vcpu::resume)
    }

    /// Stops the guest between two instructions, and its devices between two requests.
    ///
    /// # Errors
    /// When the thread of a vCPU has ended.
    pub fn pause(&self) -> Result<(), Error> {
        self.vcpus.iter().try_for_each(Vcpu::pause)?;
        self.board.pause();
        Ok(())
    }

    /// Copies the state of the paused VM, without its memory.
    ///
    /// # Errors
    /// When KVM does not give it.
    pub fn save(&self) -> Result<VmState, Error> {
        Ok(VmState {
            vcpus: self
                .vcpus
                .iter()
                .map(Vcpu::save)
                .collect::<Result<_, _>>()?,
            kvm: self.kvm.save()?,
            board: self.board.save(),
        })
    }

    /// Writes the memory of the paused VM into an empty file.
    ///
    /// # Errors
    /// When the file does not take it.
    pub fn save_memory(&self, file: &File) -> Result<(), Error> {
        memory::save(&self.memory, file)
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

fn set_nonblocking(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}
