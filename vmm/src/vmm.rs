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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use crate::board::{Board, BoardState, Parts};
use crate::boot::{self, BootSource};
use crate::config::{ConfigError, DeviceConfig, DeviceId, NicConfig, VmConfig};
use crate::control::{ExitReason, FileChange, Resize};
use crate::devices::vsock::VsockHandle;
use crate::end::End;
use crate::error::Error;
use crate::kvm::{self, KvmState, KvmVm};
use crate::memory;
use crate::snapshot::RestoreError;
use crate::vcpu::{CpuModel, ExitKind, Surroundings, Vcpu, VcpuSetup, VcpuState};
use crate::virtio::worker::ThreadSetup;
use crate::windows;
use crate::workshop::Workshop;

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
    /// One for each file server of the description: a connected stream socket.
    pub file_servers: Vec<OwnedFd>,
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
    /// Those of the devices that were added while it ran, in the order of [`VmState::added`].
    pub added: Vec<OwnedFd>,
}

/// How the VM's threads confine themselves.
#[derive(Debug, Clone, Copy)]
pub struct Confinement {
    /// For the thread of a device.
    pub device: ThreadSetup,
    /// For the thread of a vCPU.
    pub vcpu: VcpuSetup,
    /// For the thread that makes later vCPUs and devices, whose threads inherit its confinement and add their own.
    pub workshop: VcpuSetup,
    /// For the thread that watches a shared folder.
    pub watch: VcpuSetup,
    /// For the thread of a device whose requests another process serves.
    pub front_end: ThreadSetup,
}

impl Confinement {
    /// None: for tests and tools that run a guest they trust.
    pub const NONE: Self = Self {
        device: |_| Ok(()),
        vcpu: || Ok(()),
        workshop: || Ok(()),
        watch: || Ok(()),
        front_end: |_| Ok(()),
    };
}

/// A virtual machine. Dropping it ends the guest at once, joins all threads and frees its memory.
#[derive(Debug)]
pub struct Vmm {
    /// First, so that nothing runs any more when the rest goes. Those with the lowest numbers, as far as there has been
    /// need of them; KVM cannot unmake one.
    vcpus: Mutex<Vec<Vcpu>>,
    /// Makes the others, and devices that come later. Before those, so that it is done with them when they go.
    workshop: Workshop,
    maker: Arc<VcpuMaker>,
    limits: Limits,
    board: Board,
    end: Arc<End>,
    kvm: Arc<KvmVm>,
    /// After the vCPUs: KVM uses the mapping while they run.
    memory: GuestMemoryMmap,
}

/// How large the VM may be.
#[derive(Debug, Clone, Copy)]
struct Limits {
    max_vcpus: u8,
    memory_mib: u32,
    max_memory_mib: u32,
}

/// What a VM is built around.
#[derive(Debug)]
struct Machine {
    console: File,
    disks: Vec<File>,
    nics: Vec<NicFiles>,
    file_servers: Vec<OwnedFd>,
    memory: GuestMemoryMmap,
    /// How many vCPUs it has before it runs.
    vcpus: u8,
}

/// The state of a VM as data, without its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    vcpus: Vec<VcpuState>,
    kvm: KvmState,
    board: BoardState,
}

impl VmState {
    /// The devices that were added while the guest ran ([`Vmm::add`]), and were there when it was saved.
    pub fn added(&self) -> impl Iterator<Item = &DeviceConfig> {
        self.board.added()
    }
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
        let allocate = if config.file_servers.is_empty() {
            memory::allocate
        } else {
            memory::allocate_shared
        };
        let memory = allocate(config.memory_mib, config.max_memory_mib)?;
        let machine = Machine {
            console: files.console,
            disks: files.disks,
            nics: files.nics,
            file_servers: files.file_servers,
            memory,
            vcpus: config.vcpus,
        };
        let vmm = Self::build(config, machine, on_ready, confinement)?;
        let (_, pluggable) = memory::map(config.memory_mib, config.max_memory_mib);
        let entry = boot::load(
            &memory::at_start(&vmm.memory, &pluggable),
            &mut BootSource {
                kernel: &mut files.kernel,
                initramfs: &mut files.initramfs,
                kernel_params: &config.kernel_params,
                vcpus: config.vcpus,
                max_vcpus: config.max_vcpus,
                memory_end: memory::end(&vmm.memory),
                first_late_slot: vmm.board.first_late_slot(),
            },
        )?;
        // The others wait for the kernel to start them.
        vmm.vcpus()[0].boot_at(entry)?;
        Ok(vmm)
    }

    /// Builds a VM that goes on where another was saved. `config` is that one's. It can have no file server, since what that
    /// knows of its guest is not saved.
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
        let vcpus = u8::try_from(state.vcpus.len()).unwrap_or(0);
        if !(config.vcpus..=config.max_vcpus).contains(&vcpus) {
            return Err(Error::Restore(RestoreError {
                device: "VM",
                reason: format!("it has {} vCPUs", state.vcpus.len()),
            }));
        }
        let memory = memory::adopt(files.memory, config.memory_mib, config.max_memory_mib)?;
        let machine = Machine {
            console: files.console,
            disks: files.disks,
            nics: files.nics,
            // What a server knows of its guest is not saved.
            file_servers: Vec::new(),
            memory,
            vcpus,
        };
        // Its guest has been ready before.
        let vmm = Self::build(config, machine, || (), confinement)?;
        vmm.kvm.restore(&state.kvm)?;
        vmm.board.restore(state.board, files.added)?;
        for (vcpu, state) in vmm.vcpus().iter().zip(state.vcpus) {
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
        if config.file_servers.len() != machine.file_servers.len() {
            return Err(Error::Config(ConfigError::ServerFiles {
                servers: config.file_servers.len(),
                files: machine.file_servers.len(),
            }));
        }
        set_nonblocking(&machine.console).map_err(Error::Console)?;
        let memory = machine.memory;
        let kvm = kvm::open()?;
        let model = CpuModel::new(&kvm, config.max_vcpus)?;
        let windows = windows::reserve(&config.shares, &memory, model.address_bits())?;
        let reachable = windows::reachable(&memory, &windows);
        let vm = Arc::new(KvmVm::new(&kvm)?);
        memory::register(vm.fd(), &reachable)?;
        let end = Arc::new(End::new().map_err(Error::EventFd)?);
        let board = Board::new(
            Parts {
                config,
                console: machine.console,
                disks: machine.disks,
                nics: machine.nics,
                file_servers: machine.file_servers,
                memory: reachable,
                windows,
                pluggable: memory::map(config.memory_mib, config.max_memory_mib).1,
                hypervisor: vm.clone(),
                end: &end,
                setup: confinement.device,
                watch_setup: confinement.watch,
                front_end_setup: confinement.front_end,
            },
            on_ready,
        )?;
        let maker = Arc::new(VcpuMaker {
            vm: Arc::clone(&vm),
            model,
            surroundings: Surroundings {
                buses: Arc::clone(&board.buses),
                end: Arc::clone(&end),
                setup: confinement.vcpu,
            },
        });
        let vcpus = (0..machine.vcpus)
            .map(|index| maker.make(index))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            vcpus: Mutex::new(vcpus),
            workshop: Workshop::open(confinement.workshop)?,
            maker,
            limits: Limits {
                max_vcpus: config.max_vcpus,
                memory_mib: config.memory_mib,
                max_memory_mib: config.max_memory_mib,
            },
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
        self.vcpus().iter().try_for_each(Vcpu::resume)
    }

    /// Tells the running guest how many vCPUs it shall have, and how much memory; what is not given stays as it is. Returns
    /// when the guest has been told: it takes what it is given, and gives up what it shall not have, when it can. What the
    /// VM started with of memory it keeps.
    ///
    /// # Errors
    /// When the description of the VM does not allow that much, or a vCPU cannot be made. The guest is told nothing then.
    pub fn resize(&self, size: Resize) -> Result<(), Error> {
        let Limits {
            max_vcpus,
            memory_mib: least_mib,
            max_memory_mib,
        } = self.limits;
        if let Some(vcpus) = size.vcpus
            && !(1..=max_vcpus).contains(&vcpus)
        {
            return Err(Error::ResizeVcpus { vcpus, max_vcpus });
        }
        if let Some(memory_mib) = size.memory_mib
            && memory_mib > max_memory_mib
        {
            return Err(Error::ResizeMemory {
                memory_mib,
                max_memory_mib,
            });
        }
        if let Some(vcpus) = size.vcpus {
            self.make_vcpus(vcpus)?;
            self.board.resize_vcpus(vcpus);
        }
        if let Some(memory_mib) = size.memory_mib {
            let plugged = memory_mib.saturating_sub(least_mib);
            self.board.resize_memory(u64::from(plugged) << 20);
        }
        Ok(())
    }

    /// Makes vCPUs until there are `count`, and lets them run: they wait for the kernel to start them.
    fn make_vcpus(&self, count: u8) -> Result<(), Error> {
        let mut vcpus = self.vcpus();
        let present = u8::try_from(vcpus.len()).expect("at most max_vcpus");
        for index in present..count {
            let maker = Arc::clone(&self.maker);
            let vcpu = self.workshop.run(move || maker.make(index))??;
            vcpu.resume()?;
            vcpus.push(vcpu);
        }
        Ok(())
    }

    /// Adds a device to the running VM, with the descriptors that its description says. `done` is called, on a thread of the
    /// VM, when the device is on the bus and the guest has been told, or with the reason why it is not; it must not block.
    /// It is not called if the VM ends before.
    ///
    /// A VM has at most 32 devices in all, those of the start included; a place is free again when [`Self::remove`] is done.
    ///
    /// # Errors
    /// When the thread that makes devices is gone; `done` is not called then.
    pub fn add(
        &self,
        device: DeviceConfig,
        files: Vec<OwnedFd>,
        done: impl FnOnce(Result<(), Error>) + Send + 'static,
    ) -> Result<(), Error> {
        let slots = Arc::clone(self.board.slots());
        self.workshop
            .orders()
            .post(move || done(slots.plug(device, files)))
    }

    /// Asks the guest to let go of a device that was added. `done` is called, on a thread of the VM, when it has and the
    /// device's descriptors are closed, or with an error after [`Self::keep`]; it must not block. It is not called if the
    /// VM ends before.
    ///
    /// # Errors
    /// When there is no such device, or it has been asked to go already; `done` is not called then.
    pub fn remove(
        &self,
        device: &DeviceId,
        done: impl FnOnce(Result<(), Error>) + Send + 'static,
    ) -> Result<(), Error> {
        let orders = self.workshop.orders();
        self.board.slots().unplug(device, orders, done)
    }

    /// Gives up the removal of a device, if the guest has not let go of it by now: it stays, and may be asked to go again.
    pub fn keep(&self, device: &DeviceId) {
        self.board.slots().keep(device);
    }

    fn vcpus(&self) -> MutexGuard<'_, Vec<Vcpu>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the guest between two instructions, and its devices between two requests.
    ///
    /// # Errors
    /// When the thread of a vCPU has ended.
    pub fn pause(&self) -> Result<(), Error> {
        self.vcpus().iter().try_for_each(Vcpu::pause)?;
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
                .vcpus()
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

    /// From now on, `tell` is called when there is something for [`Self::take_changes`], and not again until all is taken. It
    /// must not block.
    pub fn tell_changes(&self, tell: impl Fn() + Send + 'static) {
        self.board.changes().tell(tell);
    }

    /// Takes the first of what others have changed in the shared folder that is watched, and tells whether there are more.
    pub fn take_changes(&self) -> (Vec<FileChange>, bool) {
        self.board.changes().take()
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
                .vcpus()
                .iter()
                .map(|vcpu| vcpu.counters().get(kind))
                .sum();
            metrics.insert(format!("vcpu_exits_{}", kind.name()), count);
        }
        self.board.collect(&mut metrics);
        metrics
    }
}

/// What a vCPU is made from.
#[derive(Debug)]
struct VcpuMaker {
    vm: Arc<KvmVm>,
    model: CpuModel,
    surroundings: Surroundings,
}

impl VcpuMaker {
    fn make(&self, index: u8) -> Result<Vcpu, Error> {
        Vcpu::new(self.vm.fd(), index, &self.model, self.surroundings.clone())
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
