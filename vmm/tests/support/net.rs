//! Taps, in a network namespace of the test's.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::thread;

use husk_vmm::NicFiles;
use husk_vmm::config::NicConfig;
use rustix::thread::UnshareFlags;

/// Calls `test` on a thread in a network namespace of its own.
pub(crate) fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // SAFETY: asks for no descriptor table of its own (CLONE_FILES), which is what could be unsound.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Makes a tap with an address in this thread's network namespace, and opens what the device needs.
pub(crate) fn open(name: &str, address: &str, config: &NicConfig) -> NicFiles {
    let queues = config.queue_pairs;
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    let taps = many(queues, || open_tap(name, flags));
    run(&format!("ip addr add {address} dev {name}"));
    run(&format!("ip link set {name} up"));
    let vhost = if config.vhost { queues } else { 0 };
    NicFiles {
        taps,
        vhost: many(vhost, || open_device("/dev/vhost-net").into()),
    }
}

fn many(count: u8, open: impl FnMut() -> OwnedFd) -> Vec<OwnedFd> {
    std::iter::repeat_with(open).take(count.into()).collect()
}

fn open_device(path: &str) -> File {
    let file = File::options().read(true).write(true).open(path);
    file.unwrap_or_else(|err| panic!("{path}: {err}"))
}

/// Opens a queue of the tap, which is made if it is the first.
fn open_tap(name: &str, flags: libc::c_int) -> OwnedFd {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(flags).unwrap(),
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::try_from(from).unwrap();
    }
    let tap = open_device("/dev/net/tun");
    // SAFETY: TUNSETIFF reads and writes an ifreq.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    tap.into()
}

fn run(command: &str) {
    let words: Vec<_> = command.split(' ').collect();
    let status = Command::new(words[0]).args(&words[1..]).status().unwrap();
    assert!(status.success(), "{command}: {status}");
}
