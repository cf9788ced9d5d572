//! Listens to the kernel's events. Processors that the host plugs in are brought online: the kernel adds them offline, and
//! leaves the rest to whoever listens. Of disks it tells [`crate::disks`]. Memory needs nobody: the kernel onlines it
//! itself.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::disks::Disks;

const CPUS: &str = "/sys/devices/system/cpu";
/// The kernel's own group of receivers; udev passes events on in another.
const KERNEL_EVENTS: u32 = 1;
/// The longest event of the kernel (UEVENT_BUFFER_SIZE), and its header.
const MAX_EVENT_LEN: usize = 4096;

/// What an event says was added.
#[derive(Debug, PartialEq, Eq)]
enum Added {
    /// A processor, with its folder in sysfs.
    Cpu(PathBuf),
    /// A disk, or a partition of one.
    Disk,
}

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

    /// Attends to what is plugged in, as long as the guest lives.
    pub(crate) async fn serve(self, disks: Arc<Disks>) {
        online_all();
        loop {
            match self.next().await {
                Ok(Some(Added::Cpu(cpu))) => online(&cpu),
                Ok(Some(Added::Disk)) => disks.appeared(),
                Ok(None) => {}
                // More came than the socket holds: what was lost is looked for.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    online_all();
                    disks.appeared();
                }
                Err(error) => {
                    tracing::error!(%error, "processors and disks go unseen from now on");
                    return;
                }
            }
        }
    }

    /// Waits for an event. `None` if nothing was added that is of interest.
    async fn next(&self) -> io::Result<Option<Added>> {
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
            .then(|| added(event.get(..len).unwrap_or(&event)))
            .flatten())
    }
}

/// What the event says was added.
fn added(event: &[u8]) -> Option<Added> {
    let has = |line: &[u8]| event.split(|byte| *byte == 0).any(|other| other == line);
    if !has(b"ACTION=add") {
        return None;
    }
    if has(b"SUBSYSTEM=block") {
        return Some(Added::Disk);
    }
    if has(b"SUBSYSTEM=cpu") {
        return cpu_of(event).map(|cpu| Added::Cpu(Path::new(CPUS).join(cpu)));
    }
    None
}

/// The name of the processor that was added.
fn cpu_of(event: &[u8]) -> Option<&str> {
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
        let cpu = Path::new(CPUS).join("cpu12");
        assert_eq!(added(ADDED), Some(Added::Cpu(cpu)));
    }

    #[test]
    fn added_disk_is_told() {
        let event = b"add@/devices/pci0000:00/0000:00:07.0/virtio5/block/vda\0ACTION=add\0SUBSYSTEM=block\0\
            DEVNAME=vda\0DEVTYPE=disk\0";
        assert_eq!(added(event), Some(Added::Disk));
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
            assert_eq!(added(text.replace(from, to).as_bytes()), None, "{to}");
        }
        assert_eq!(added(b""), None);
        assert_eq!(added(&[0xff; 9]), None);
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
