//! A guest that is paused, saved, and goes on elsewhere.

use husk_vmm::control::ExitReason;

use crate::support::{self, Guest, Saved};

/// Counts forever, and looks at the clock and the entropy device, so that a guest that has lost time or interrupts is
/// noticed. Ends when it has counted to 30 after it was told of by a file that only the memory holds.
const COUNT: &str = "echo $$ > /mnt/token\n\
    n=0; while [ $n -lt 30 ]; do n=$((n + 1)); echo HUSK $n; sleep 0.1; head -c 16 /dev/hwrng > /mnt/random; done\n\
    [ \"$(cat /mnt/token)\" = 1 ] && echo HUSK all there; poweroff -f\n";

#[test]
fn a_paused_guest_goes_on() {
    support::require_kvm!();
    let running = Guest::new(COUNT).start();
    running.console.wait_for("HUSK 3\n");
    running.vmm.pause().unwrap();
    running.vmm.start().unwrap();
    let (reason, output) = running.end();
    assert_eq!(reason, ExitReason::PowerOff);
    assert!(output.contains("HUSK 30\nHUSK all there\n"), "{output}");
}

#[test]
fn a_saved_guest_goes_on_in_another_vm() {
    support::require_kvm!();
    let mut guest = Guest::new(COUNT);
    (guest.config.vcpus, guest.config.max_vcpus) = (2, 2);
    let config = guest.config.clone();
    let running = guest.start();
    running.console.wait_for("HUSK 3\n");
    let saved = Saved::of(&running.vmm);
    drop(running.vmm);

    let running = saved.restore(&config, Vec::new()).unwrap();
    let (reason, output) = running.end();
    assert_eq!(reason, ExitReason::PowerOff);
    assert!(!output.contains("HUSK 1\n"), "{output}");
    assert!(output.contains("HUSK 30\nHUSK all there\n"), "{output}");
}

#[test]
fn a_state_does_not_fit_a_vm_of_another_shape() {
    support::require_kvm!();
    let guest = Guest::new("sleep 1000\n");
    let config = guest.config.clone();
    let running = guest.start();
    let saved = Saved::of(&running.vmm);
    let restore = |config: &husk_vmm::config::VmConfig| saved.restore(config, Vec::new());
    let mut larger = config.clone();
    larger.memory_mib += 1;
    larger.max_memory_mib += 1;
    assert!(restore(&larger).is_err());
    let mut wider = config.clone();
    (wider.vcpus, wider.max_vcpus) = (2, 2);
    assert!(restore(&wider).is_err());
    let mut other = config;
    other.guest_cid = 4;
    assert!(restore(&other).is_err());
}
