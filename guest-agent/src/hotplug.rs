//! Brings processors online that the host plugs in: the kernel adds them offline, and leaves the rest to whoever listens to
//! its events. Memory needs nobody: the kernel onlines it itself.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const CPUS: &str = "/sys/devices/system/cpu";
/// The kernel's own group of receivers; udev passes events on in another.
const KERNEL_EVENTS: u32 = 1;
/// The longest event of the kernel (UEVENT_BUFFER_SIZE), and its header.
const MAX_EVENT_LEN: usize = 4096;

/// The events of the kernel's objects.
#[derive(Debug)]
pub(crate) struct Events(AsyncFd<OwnedFd>);

impl Events {
    /// Listens from now on.
    pub(crate) fn listen() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
        // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, and the `AsyncFd` owns it.
        let socket = unsafe { AsyncFd::register(socket) }?;
        Ok(Self(socket))
    }

    /// Brings online what is plugged in, as long as the guest lives.
    pub(crate) async fn serve(self) {
        online_all();
        loop {
            match self.next().await {
                Ok(Some(cpu)) => online(&cpu),
                Ok(None) => {}
                // More came than the socket holds: what was lost is looked for.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => online_all(),
                Err(error) => {
                    tracing::error!(%error, "processors are not brought online any more");
                    return;
                }
            }
        }
    }

    /// Waits for an event. `None` if it is of no processor that was added.
    async fn next(&self) -> io::Result<Option<PathBuf>> {
        let mut event = [0; MAX_EVENT_LEN];
        let (len, sender) = self
            .0
            .async_io(Interest::READABLE, |socket| {
                Ok(recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut event)?)
            })
            .await?;
        // A process with the right to may send events, too: only the kernel is port 0.
        let from_kernel = sender.is_some_and(|sender| sender.pid() == 0);
        Ok(from_kernel
            .then(|| added_cpu(event.get(..len).unwrap_or(&event)))
            .flatten()
            .map(|cpu| Path::new(CPUS).join(cpu)))
    }
}

/// The name of the processor, if the event is that it was added.
fn added_cpu(event: &[u8]) -> Option<&str> {
    let has = |line: &[u8]| event.split(|byte| *byte == 0).any(|other| other == line);
    if !has(b"ACTION=add") || !has(b"SUBSYSTEM=cpu") {
        return None;
    }
    let header = event.split(|byte| *byte == 0).next()?;
    let name = std::str::from_utf8(header)
        .ok()?
        .strip_prefix("add@/devices/system/cpu/")?;
    is_cpu(name).then_some(name)
}

fn is_cpu(name: &str) -> bool {
    name.strip_prefix("cpu")
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Brings online all that are there: those whose events came before anybody listened.
fn online_all() {
    let folder = match fs::read_dir(CPUS) {
        Ok(folder) => folder,
        Err(error) => {
            tracing::warn!(%error, "cannot look for processors");
            return;
        }
    };
    for entry in folder.flatten() {
        if is_cpu(&entry.file_name().to_string_lossy()) {
            online(&entry.path());
        }
    }
}

fn online(cpu: &Path) {
    match online_in(cpu) {
        Ok(true) => tracing::info!(cpu = %cpu.display(), "a processor is online"),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(cpu = %cpu.display(), %error, "cannot bring a processor online")
        }
    }
}

/// True if that changed something.
fn online_in(cpu: &Path) -> io::Result<bool> {
    let switch = cpu.join("online");
    match fs::read_to_string(&switch) {
        Ok(state) if state.trim() == "0" => fs::write(&switch, "1").map(|()| true),
        Ok(_) => Ok(false),
        // The first processor cannot be switched off; another may be gone by now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDED: &[u8] =
        b"add@/devices/system/cpu/cpu12\0ACTION=add\0DEVPATH=/devices/system/cpu/cpu12\0\
        SUBSYSTEM=cpu\0SEQNUM=7\0";

    #[test]
    fn added_processor_is_named() {
        assert_eq!(added_cpu(ADDED), Some("cpu12"));
    }

    #[test]
    fn other_events_are_of_no_interest() {
        let text = std::str::from_utf8(ADDED).unwrap();
        for (from, to) in [
            ("ACTION=add", "ACTION=remove"),
            ("SUBSYSTEM=cpu", "SUBSYSTEM=cpux"),
            (
                "add@/devices/system/cpu/cpu12",
                "add@/devices/system/cpu/cpufreq",
            ),
            (
                "add@/devices/system/cpu/cpu12",
                "add@/devices/system/cpu/cpu",
            ),
            (
                "add@/devices/system/cpu/cpu12",
                "add@/devices/system/cpu/../cpu1",
            ),
        ] {
            assert_eq!(added_cpu(text.replace(from, to).as_bytes()), None, "{to}");
        }
        assert_eq!(added_cpu(b""), None);
        assert_eq!(added_cpu(&[0xff; 9]), None);
    }

    #[test]
    fn only_what_is_offline_is_switched() {
        let cpu = tempfile::tempdir().unwrap();
        assert!(!online_in(cpu.path()).unwrap(), "no switch");
        let switch = cpu.path().join("online");
        fs::write(&switch, "0\n").unwrap();
        assert!(online_in(cpu.path()).unwrap());
        assert_eq!(fs::read_to_string(&switch).unwrap(), "1");
        assert!(!online_in(cpu.path()).unwrap());
    }

    #[tokio::test]
    async fn listening_needs_no_privilege() {
        Events::listen().unwrap();
    }
}
