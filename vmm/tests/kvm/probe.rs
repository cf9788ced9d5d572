//! Whether the probe tells a KVM that works from one that does not.

use crate::support;

#[test]
fn a_working_kvm_passes() {
    support::require_kvm!();
    husk_vmm::probe().unwrap();
}

/// A machine without hardware virtualization may have a `/dev/kvm` nonetheless; the probe must not fall for it.
#[test]
fn a_machine_without_hardware_virtualization_fails_with_advice() {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let has_hardware = cpuinfo
        .split_whitespace()
        .any(|word| word == "svm" || word == "vmx");
    if has_hardware {
        support::say_skipped("this machine has hardware virtualization");
        return;
    }
    let error = support::chain(&husk_vmm::probe().unwrap_err());
    println!("{error}");
    assert!(error.contains("hardware virtualization"), "{error}");
}
