//! How guests end, and that each end has its name.

use std::io::Write;

use husk_vmm::control::ExitReason;

use crate::support::{self, Guest};

#[test]
fn power_off() {
    support::require_kvm!();
    assert_eq!(
        Guest::new("poweroff -f\n").start().end().0,
        ExitReason::PowerOff
    );
}

#[test]
fn reboot_is_a_reset() {
    support::require_kvm!();
    assert_eq!(Guest::new("reboot -f\n").start().end().0, ExitReason::Reset);
}

#[test]
fn a_panic_is_told_with_its_message() {
    support::require_kvm!();
    let (reason, output) = Guest::new("echo last words; exit 3\n").start().end();
    assert_eq!(reason, ExitReason::Panic);
    let (_, kernel) = output.split_once("last words\n").unwrap();
    assert!(
        kernel.contains("Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300"),
        "{output}"
    );
}

#[test]
fn a_panic_before_the_console_is_there_is_told_on_the_serial_port() {
    support::require_kvm!();
    // An archive that is none: there is no root.
    let guest = Guest::new("");
    let (reason, output) = guest.start_with(support::file_of(b"not an archive")).end();
    assert_eq!(reason, ExitReason::Panic);
    assert!(output.contains("Kernel panic - not syncing"), "{output}");
}

#[test]
fn a_triple_fault_is_told() {
    support::require_kvm!();
    // lidt of an empty table, then an invalid instruction.
    let program = [0x0f, 0x01, 0x1c, 0x25, 0x00, 0x00, 0x00, 0x00, 0x0f, 0x0b];
    let (reason, _) = bare_guest(&program).end();
    assert_eq!(reason, ExitReason::TripleFault);
}

#[test]
fn dropping_a_running_vm_ends_it_at_once() {
    support::require_kvm!();
    // jmp $
    let running = bare_guest(&[0xeb, 0xfe]);
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    assert_eq!(running.vmm.exit_reason(), None);
    let while_running = threads();
    drop(running.vmm);
    // One vCPU and a thread for each device.
    assert!(threads() + 3 <= while_running);
}

/// A guest whose kernel is one program, at 1 MiB, in the smallest ELF file.
fn bare_guest(program: &[u8]) -> support::Running {
    const ENTRY: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 56;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // Executable, x86-64, version 1.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for address in [ENTRY, 64, 0] {
        elf.extend(address.to_le_bytes());
    }
    // Flags, then sizes: one program header, no sections.
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // Loadable, read and execute.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let len = program.len() as u64;
    for field in [HEADERS, ENTRY, ENTRY, len, len, 1] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(program);
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(&elf).expect("a temporary file is written");
    let mut guest = Guest::new("");
    guest.kernel = file.path().to_owned();
    guest.start_with(support::file_of(b""))
}
