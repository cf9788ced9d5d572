//! The kernel's command line.

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::error::Error;
use crate::layout::{CMDLINE_BASE, CMDLINE_MAX_LEN, SERIAL_PORTS};

/// What every guest gets.
///
/// - `quiet`: only what is wrong. Before `earlycon`, which prints what there is so far as soon as it is read.
/// - `console=hvc0`: the virtio console, one exit a line; the serial port costs one a byte.
/// - `earlycon`: until the virtio console is there, what is wrong (a panic above all) go to the
///   serial port.
/// - `panic=-1`: a panic ends the VM at once, in case the guest's kernel has no driver for the panic notifier.
/// - `reboot=acpi`: by the reset register, before any other way is tried.
/// - `dummy.numdummies=0`: a built-in driver of dummy network devices makes one that nobody has asked for.
/// - `memory_hotplug.online_policy=auto-movable`: of the memory that is plugged in, the kernel takes so much for data of its
///   own as it needs beside the rest, up to a fourth, and keeps what may be unplugged again free of such data.
fn defaults() -> String {
    format!(
        "quiet console=hvc0 earlycon=uart8250,io,{:#x} panic=-1 reboot=acpi dummy.numdummies=0 \
         memory_hotplug.online_policy=auto-movable",
        SERIAL_PORTS.start
    )
}

/// Writes the command line and returns its length without the terminating zero.
pub(super) fn write(memory: &GuestMemoryMmap, kernel_params: &str) -> Result<u32, Error> {
    let line = build(kernel_params)?;
    load_cmdline(memory, GuestAddress(CMDLINE_BASE), &line).map_err(Error::LoadKernel)?;
    let len = line.as_cstring().map_err(Error::Cmdline)?.count_bytes();
    Ok(u32::try_from(len).expect("the capacity is far below 4 GiB"))
}

fn build(kernel_params: &str) -> Result<Cmdline, Error> {
    let mut line = Cmdline::new(CMDLINE_MAX_LEN).map_err(Error::Cmdline)?;
    line.insert_str(defaults()).map_err(Error::Cmdline)?;
    if !kernel_params.trim().is_empty() {
        line.insert_str(kernel_params.trim())
            .map_err(Error::Cmdline)?;
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_last_so_that_they_win() {
        let line = build(" panic=0 ").unwrap().as_cstring().unwrap();
        let line = line.to_str().unwrap();
        assert!(line.starts_with("quiet "), "{line}");
        assert!(line.ends_with(" panic=0"), "{line}");
    }

    #[test]
    fn overlong_parameters_are_refused() {
        assert!(matches!(
            build(&"x".repeat(CMDLINE_MAX_LEN)),
            Err(Error::Cmdline(_))
        ));
    }

    #[test]
    fn the_length_is_without_the_zero() {
        let memory = crate::memory::allocate(1, 1).unwrap();
        let len = write(&memory, "").unwrap();
        assert_eq!(len as usize, defaults().len());
    }
}
