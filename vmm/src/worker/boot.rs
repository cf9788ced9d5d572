//! From a description and its descriptors to a VM that runs, confined.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use super::inbox::Outlet;
use super::seccomp::{self, Role, SeccompError};
use super::service::{Machine, Notice};
use super::{jail, one_line};
use crate::config::{DeviceConfig, DeviceId, VmConfig};
use crate::control::{ExitReason, FileChange, Resize};
use crate::devices::vsock::{ConnectError, VsockStream};
use crate::virtio::DeviceType;
use crate::vmm::{Confinement, NicFiles, VmFiles, Vmm};

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(
        "{count} descriptors came with the VM's description, not kernel, initramfs, console and those of its devices"
    )]
    Descriptors { count: usize },
    #[error("the worker cannot be confined")]
    Jail(#[from] jail::JailError),
    #[error("the VM cannot be built")]
    Build(#[source] crate::Error),
    #[error("the worker cannot be confined")]
    Seccomp(#[from] SeccompError),
    #[error("the VM cannot be started")]
    Start(#[source] crate::Error),
}

/// Confines the process, which has to have but this thread, and starts the VM in it. The error is for the shim.
pub(super) fn boot(
    config: &VmConfig,
    files: Vec<OwnedFd>,
    notices: Outlet<Notice>,
) -> Result<Vmm, String> {
    try_boot(config, files, notices).map_err(|err| one_line(&err))
}

fn try_boot(
    config: &VmConfig,
    files: Vec<OwnedFd>,
    notices: Outlet<Notice>,
) -> Result<Vmm, BootError> {
    let files = name_files(config, files)?;
    let changed = notices.clone();
    let shared: Vec<_> = config
        .shares
        .iter()
        .map(|share| share.path.as_path())
        .collect();
    jail::enter(&shared)?;
    let vmm = Vmm::new(
        config,
        files,
        move || notices.send(Notice::Ready),
        Confinement {
            device: confine_device,
            vcpu: confine_vcpu,
            workshop: confine_workshop,
            watch: confine_watch,
            front_end: confine_front_end,
        },
    )
    .map_err(BootError::Build)?;
    vmm.tell_changes(move || changed.send(Notice::FilesChanged));
    seccomp::install(Role::Control)?;
    vmm.start().map_err(BootError::Start)?;
    Ok(vmm)
}

/// Tells the descriptors apart by their order, see [`VmConfig`].
fn name_files(config: &VmConfig, files: Vec<OwnedFd>) -> Result<VmFiles, BootError> {
    let count = files.len();
    let wrong = || BootError::Descriptors { count };
    let mut files = files.into_iter();
    let mut next = || files.next().ok_or_else(wrong);
    let mut next_file = || next().map(File::from);
    let named = VmFiles {
        kernel: next_file()?,
        initramfs: next_file()?,
        console: next_file()?,
        disks: config
            .disks
            .iter()
            .map(|_| next_file())
            .collect::<Result<_, _>>()?,
        nics: config
            .nics
            .iter()
            .map(|nic| {
                let mut take = |count| (0..count).map(|_| next()).collect::<Result<_, _>>();
                Ok(NicFiles {
                    taps: take(nic.queue_pairs)?,
                    vhost: take(if nic.vhost { nic.queue_pairs } else { 0 })?,
                })
            })
            .collect::<Result<_, BootError>>()?,
        file_servers: config
            .file_servers
            .iter()
            .map(|_| next())
            .collect::<Result<_, _>>()?,
    };
    match files.next() {
        None => Ok(named),
        Some(_) => Err(wrong()),
    }
}

fn confine_vcpu() -> io::Result<()> {
    jail::drop_capabilities()?;
    seccomp::install(Role::Vcpu).map_err(io::Error::other)
}

/// Without capabilities, its threads need not drop any.
fn confine_workshop() -> io::Result<()> {
    jail::drop_capabilities()?;
    seccomp::install(Role::Workshop).map_err(io::Error::other)
}

/// It keeps the capabilities by which the file server finds what the guest knows, and with them its user.
fn confine_watch() -> io::Result<()> {
    seccomp::install(Role::Watch).map_err(io::Error::other)
}

/// It serves no files itself.
fn confine_front_end(_device: DeviceType) -> io::Result<()> {
    jail::drop_capabilities()?;
    seccomp::install(Role::FrontEnd).map_err(io::Error::other)
}

fn confine_device(device: DeviceType) -> io::Result<()> {
    if !matches!(device, DeviceType::Fs | DeviceType::P9) {
        jail::drop_capabilities()?;
    }
    seccomp::install(Role::Device(device)).map_err(io::Error::other)
}

impl Machine for Vmm {
    fn end_reason(&self) -> Option<ExitReason> {
        self.exit_reason()
    }

    fn resize(&self, size: Resize) -> Result<(), String> {
        self.resize(size).map_err(|err| one_line(&err))
    }

    fn add(
        &self,
        device: DeviceConfig,
        files: Vec<OwnedFd>,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<(), String> {
        let done = |result: Result<_, crate::Error>| done(result.map_err(|err| one_line(&err)));
        self.add(device, files, done).map_err(|err| one_line(&err))
    }

    fn remove(
        &self,
        device: &DeviceId,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<(), String> {
        let done = |result: Result<_, crate::Error>| done(result.map_err(|err| one_line(&err)));
        self.remove(device, done).map_err(|err| one_line(&err))
    }

    fn keep(&self, device: &DeviceId) {
        self.keep(device);
    }

    fn take_changes(&self) -> (Vec<FileChange>, bool) {
        self.take_changes()
    }

    fn metrics(&self) -> BTreeMap<String, u64> {
        self.metrics()
    }

    fn connect(
        &self,
        port: u32,
        done: impl FnOnce(Result<VsockStream, ConnectError>) + Send + 'static,
    ) {
        self.vsock().connect(port, done);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::config::{DiskConfig, NicConfig};

    fn files(count: usize) -> Vec<OwnedFd> {
        (0..count)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect()
    }

    /// `disks` disks, and a network device of two queue pairs without and with vhost-net.
    fn config(disks: usize) -> VmConfig {
        let nic = |vhost| NicConfig {
            mac: [2, 0, 0, 0, 0, u8::from(vhost)],
            mtu: 1500,
            queue_pairs: 2,
            vhost,
        };
        VmConfig {
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 64,
            max_memory_mib: 64,
            kernel_params: String::new(),
            shares: Vec::new(),
            disks: (0..disks)
                .map(|serial| DiskConfig {
                    serial: serial.to_string(),
                    read_only: true,
                })
                .collect(),
            nics: vec![nic(false), nic(true)],
            file_servers: Vec::new(),
            guest_cid: 3,
            ready_port: 1024,
        }
    }

    #[test]
    fn descriptors_are_told_apart_by_their_order() {
        let given = files(3 + 1 + 2 + 4);
        let numbers: Vec<_> = given.iter().map(AsRawFd::as_raw_fd).collect();
        let named = name_files(&config(1), given).unwrap();
        let [plain, vhost] = &named.nics[..] else {
            panic!("{:?}", named.nics);
        };
        let all = [&named.kernel, &named.initramfs, &named.console]
            .into_iter()
            .chain(&named.disks)
            .map(AsRawFd::as_raw_fd)
            .chain(plain.taps.iter().map(AsRawFd::as_raw_fd))
            .chain(vhost.taps.iter().map(AsRawFd::as_raw_fd))
            .chain(vhost.vhost.iter().map(AsRawFd::as_raw_fd));
        assert_eq!(all.collect::<Vec<_>>(), numbers);
        assert_eq!((plain.taps.len(), plain.vhost.len()), (2, 0));
        assert_eq!((vhost.taps.len(), vhost.vhost.len()), (2, 2));
    }

    #[test]
    fn missing_and_surplus_descriptors_are_refused() {
        for count in [2, 9, 11] {
            assert!(matches!(
                name_files(&config(1), files(count)),
                Err(BootError::Descriptors { count: seen }) if seen == count
            ));
        }
    }
}
