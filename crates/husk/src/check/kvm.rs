//! Whether KVM can be used.

use std::io;

use husk_vmm::{ProbeError, probe};
use kvm_ioctls::Kvm;

use super::report::Problem;

/// The one version that KVM's interface has had since 2007 (Linux, Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

const LOAD_MODULE: &str = "\
Load the kernel's module: modprobe kvm_amd, or modprobe kvm_intel. If that fails, see the processor's line above.
In a container, it has to be started with the device /dev/kvm.";
const PERMISSIONS: &str = "Run this as the user that containerd runs as, which is root; or let that user read and write /dev/kvm.";
const KVM_REFUSES: &str = "\
If another hypervisor uses the processor's virtualization, stop it; else look at what dmesg says of kvm.";
const FALLBACK: &str = "Behind /dev/kvm is a software fallback, which can run no real kernel: see the processor's line above.";
const NOT_KVM: &str = "What is behind /dev/kvm is not Linux's KVM: look at what made it.";

/// Whether `/dev/kvm` can be opened and is KVM.
pub(super) fn check() -> Result<String, Problem> {
    let kvm = Kvm::new().map_err(|err| {
        let err = io::Error::from(err);
        let remedy = match err.kind() {
            io::ErrorKind::PermissionDenied => PERMISSIONS,
            _ => LOAD_MODULE,
        };
        Problem::new(format!("cannot open /dev/kvm: {err}"), remedy)
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(format!("/dev/kvm, API version {API_VERSION}")),
        version => Err(Problem::new(
            format!("/dev/kvm has API version {version}, not {API_VERSION}"),
            NOT_KVM,
        )),
    }
}

/// Whether a guest really runs.
pub(super) fn run_guest() -> Result<String, Problem> {
    probe().map_err(|err| {
        let remedy = match err {
            ProbeError::Kvm(_) => KVM_REFUSES,
            ProbeError::MissingInstruction { .. } | ProbeError::NotHardware { .. } => FALLBACK,
        };
        Problem::from_error(&err, remedy)
    })?;
    Ok("a small one ran to its end".to_owned())
}
