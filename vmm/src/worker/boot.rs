//! From a description and its descriptors to a VM that runs, confined.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use super::inbox::Outlet;
use super::seccomp::{self, Role, SeccompError};
use super::service::{Machine, Notice};
use super::{jail, one_line};
use crate::config::VmConfig;
use crate::control::ExitReason;
use crate::devices::vsock::{ConnectError, VsockStream};
use crate::virtio::DeviceType;
use crate::vmm::{Confinement, VmFiles, Vmm};

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(
        "{count} descriptors came with the VM's description, not kernel, initramfs, console and one for each disk"
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
    let files = name_files(files)?;
    jail::enter(config.shares.iter().map(|share| share.path.as_path()))?;
    let vmm = Vmm::new(
        config,
        files,
        move || notices.send(Notice::Ready),
        Confinement {
            device: confine_device,
            vcpu: confine_vcpu,
        },
    )
    .map_err(BootError::Build)?;
    seccomp::install(Role::Control)?;
    vmm.start().map_err(BootError::Start)?;
    Ok(vmm)
}

/// Tells the descriptors apart by their order, see [`VmConfig`].
fn name_files(files: Vec<OwnedFd>) -> Result<VmFiles, BootError> {
    let count = files.len();
    let mut files = files.into_iter().map(File::from);
    let mut next = || files.next().ok_or(BootError::Descriptors { count });
    Ok(VmFiles {
        kernel: next()?,
        initramfs: next()?,
        console: next()?,
        disks: files.collect(),
    })
}

fn confine_vcpu() -> io::Result<()> {
    jail::drop_capabilities()?;
    seccomp::install(Role::Vcpu).map_err(io::Error::other)
}

fn confine_device(device: DeviceType) -> io::Result<()> {
    if device != DeviceType::Fs {
        jail::drop_capabilities()?;
    }
    seccomp::install(Role::Device(device)).map_err(io::Error::other)
}

impl Machine for Vmm {
    fn end_reason(&self) -> Option<ExitReason> {
        self.exit_reason()
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
    use super::*;

    fn files(count: usize) -> Vec<OwnedFd> {
        (0..count)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect()
    }

    #[test]
    fn descriptors_past_the_console_are_disks() {
        assert_eq!(name_files(files(3)).unwrap().disks.len(), 0);
        assert_eq!(name_files(files(5)).unwrap().disks.len(), 2);
    }

    #[test]
    fn missing_descriptors_are_refused() {
        assert!(matches!(
            name_files(files(2)),
            Err(BootError::Descriptors { count: 2 })
        ));
    }
}
