//! A shared memory region of a device (virtio 1.3, 2.10): addresses of the guest at which the device shows it files of the
//! host.
//!
//! It is address space that is never given back while the region lives. Where nothing is shown, nothing can be accessed: a
//! guest that does ends its VM. For devices it is a part of the guest's memory, since a buffer of a program may lie in a file
//! that it has mapped. What they meet there is what the guest makes of it: [`crate::faults`].

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use crate::faults::Guard;
use crate::memory;

const PAGE: u64 = 4096;

/// A region, and what is shown there.
#[derive(Debug)]
pub struct SharedMemory {
    /// Before the mapping that it is about.
    guard: Guard,
    region: Arc<GuestRegionMmap>,
}

impl SharedMemory {
    /// Its length and its address are multiples of this, in the guest and in this process, so that it can have large pages.
    pub const UNIT: u64 = 2 << 20;

    /// Reserves a region of `len` bytes for the guest's address `at`.
    ///
    /// # Errors
    /// When one of both is no multiple of [`Self::UNIT`], `len` is zero, or there is no room.
    pub fn new(at: GuestAddress, len: u64) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(Self::UNIT) || !at.0.is_multiple_of(Self::UNIT) {
            return Err(invalid());
        }
        let mapping = memory::map_aligned(as_usize(len)?)?;
        let start = mapping.as_ptr().addr();
        let region = GuestRegionMmap::new(mapping, at).ok_or_else(invalid)?;
        // SAFETY: the mapping goes after the guard. Nothing in this process refers to what is there but as to memory that
        // changes at any time.
        let guard = unsafe { Guard::new(start..start + region.size()) }?;
        let shared = Self {
            guard,
            region: Arc::new(region),
        };
        shared.hide_all()?;
        Ok(shared)
    }

    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "none is empty")]
    pub fn len(&self) -> u64 {
        self.region.len()
    }

    /// Where the guest has it.
    pub fn at(&self) -> GuestAddress {
        self.region.start_addr()
    }

    /// As a part of the guest's memory.
    pub(crate) fn region(&self) -> Arc<GuestRegionMmap> {
        Arc::clone(&self.region)
    }

    /// How many pages were replaced by empty ones, because this process has touched what was not there. What is shown there is
    /// shown again by the next call that says so.
    pub fn filled(&self) -> usize {
        self.guard.filled()
    }

    /// Shows `len` bytes of `file` from `from` on at `at`, in the place of what was there.
    ///
    /// # Errors
    /// EINVAL if the pieces are empty, not of whole pages, or not inside the region or a file; what mmap(2) says else. What
    /// was there may be gone even so.
    pub fn show(
        &self,
        at: u64,
        len: u64,
        file: BorrowedFd<'_>,
        from: u64,
        writable: bool,
    ) -> io::Result<()> {
        let place = self.place(at, len)?;
        let from_signed = i64::try_from(from).map_err(|_| invalid())?;
        let len_signed = i64::try_from(len).map_err(|_| invalid())?;
        if !from.is_multiple_of(PAGE) || from_signed.checked_add(len_signed).is_none() {
            return Err(invalid());
        }
        let fd = file.as_raw_fd();
        self.replace(place, rights(writable), libc::MAP_SHARED, fd, from_signed)
    }

    /// Shows `len` empty bytes at `at`, which take memory of the host as they are written to.
    ///
    /// # Errors
    /// As [`Self::show`].
    pub fn blank(&self, at: u64, len: u64, writable: bool) -> io::Result<()> {
        let place = self.place(at, len)?;
        self.replace(place, rights(writable), ANONYMOUS, -1, 0)
    }

    /// Lets go of what is shown in `len` bytes at `at`, if anything is.
    ///
    /// # Errors
    /// As [`Self::show`].
    pub fn hide(&self, at: u64, len: u64) -> io::Result<()> {
        let place = self.place(at, len)?;
        self.replace(place, libc::PROT_NONE, ANONYMOUS, -1, 0)
    }

    /// Lets go of all that is shown.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn hide_all(&self) -> io::Result<()> {
        self.hide(0, self.len())
    }

    /// The part of the region that is `len` bytes from `at` on, if it is one of whole pages.
    fn place(&self, at: u64, len: u64) -> io::Result<Range<usize>> {
        let end = at.checked_add(len).ok_or_else(invalid)?;
        let whole_pages = at.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        if len == 0 || !whole_pages || end > self.len() {
            return Err(invalid());
        }
        Ok(as_usize(at)?..as_usize(end)?)
    }

    /// Maps something in the place of a part of the region, as [`Self::place`] returned it.
    fn replace(
        &self,
        place: Range<usize>,
        protection: i32,
        flags: i32,
        fd: i32,
        from: i64,
    ) -> io::Result<()> {
        let start = self.region.as_ptr().wrapping_add(place.start);
        let flags = flags | libc::MAP_FIXED;
        let mapped =
            // SAFETY: the part lies in the mapping, which this type owns. Nothing in this process relies on what is there:
            // it is only ever accessed as memory that changes at any time, and KVM follows each change.
            unsafe { libc::mmap(start.cast(), place.len(), protection, flags, fd, from) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

fn rights(writable: bool) -> i32 {
    if writable {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_READ
    }
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn as_usize(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| invalid())
}

#[cfg(test)]
pub(crate) mod testing {
    use vm_memory::{Bytes, MemoryRegionAddress};

    use super::SharedMemory;

    impl SharedMemory {
        /// What a device reads at `at`.
        pub(crate) fn peek(&self, at: u64) -> u8 {
            self.region.read_obj(MemoryRegionAddress(at)).unwrap()
        }

        /// Writes at `at` as a device does.
        pub(crate) fn poke(&self, at: u64, value: u8) {
            self.region
                .write_obj(value, MemoryRegionAddress(at))
                .unwrap();
        }

        /// The rights of the mapping at `at` as Linux shows them, such as `rw-s`.
        pub(crate) fn rights(&self, at: u64) -> String {
            let address = self.region.as_ptr() as u64 + at;
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
            maps.lines()
                .find_map(|line| {
                    let (range, rest) = line.split_once(' ')?;
                    let (start, end) = range.split_once('-')?;
                    (hex(start)..hex(end))
                        .contains(&address)
                        .then(|| rest[..4].to_owned())
                })
                .unwrap()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use vm_memory::MmapRegion;

    use super::*;

    const AT: GuestAddress = GuestAddress(1 << 36);
    const LEN: u64 = 2 * SharedMemory::UNIT;

    fn memory() -> SharedMemory {
        SharedMemory::new(AT, LEN).unwrap()
    }

    fn file_of(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE).unwrap();
        file.write_all_at(bytes, PAGE).unwrap();
        file
    }

    #[test]
    fn a_file_is_seen_and_changed_both_ways() {
        let memory = memory();
        let file = file_of(b"seven");
        memory
            .show(2 * PAGE, 2 * PAGE, file.as_fd(), PAGE, true)
            .unwrap();
        assert_eq!(memory.peek(2 * PAGE), b's');
        file.write_all_at(b"e", PAGE).unwrap();
        assert_eq!(memory.peek(2 * PAGE), b'e');
        memory.poke(2 * PAGE + 1, b'L');
        let mut seen = [0; 5];
        file.read_exact_at(&mut seen, PAGE).unwrap();
        assert_eq!(&seen, b"eLven");
        assert_eq!(memory.filled(), 0);
    }

    #[test]
    fn what_is_not_shown_has_no_rights() {
        let memory = memory();
        assert_eq!(memory.rights(0), "---p");
        let file = file_of(b"");
        memory.show(PAGE, PAGE, file.as_fd(), 0, true).unwrap();
        memory.show(2 * PAGE, PAGE, file.as_fd(), 0, false).unwrap();
        memory.blank(3 * PAGE, PAGE, true).unwrap();
        let rights = |page: u64| memory.rights(page * PAGE);
        assert_eq!(
            [0, 1, 2, 3, 4].map(rights),
            ["---p", "rw-s", "r--s", "rw-p", "---p"].map(str::to_owned)
        );
        memory.hide(PAGE, PAGE).unwrap();
        assert_eq!([rights(1), rights(2)], ["---p", "r--s"].map(str::to_owned));
        memory.hide_all().unwrap();
        assert_eq!([rights(2), rights(3)], ["---p", "---p"].map(str::to_owned));
    }

    #[test]
    fn numbers_that_lead_outside_are_refused() {
        let memory = memory();
        let file = file_of(b"");
        for (at, len) in [
            (0, 0),
            (0, 1),
            (1, PAGE),
            (0, LEN + PAGE),
            (LEN, PAGE),
            (LEN - PAGE, 2 * PAGE),
            (u64::MAX - PAGE + 1, PAGE),
            (PAGE, u64::MAX - PAGE + 1),
            (u64::MAX, u64::MAX),
        ] {
            for refused in [
                memory.show(at, len, file.as_fd(), 0, true),
                memory.blank(at, len, true),
                memory.hide(at, len),
            ] {
                let code = refused.unwrap_err().raw_os_error();
                assert_eq!(code, Some(libc::EINVAL), "{at:#x} {len:#x}");
            }
        }
        for from in [1, PAGE - 1, i64::MAX as u64 - PAGE + 1, 1 << 63, u64::MAX] {
            let shown = memory.show(0, 2 * PAGE, file.as_fd(), from, true);
            assert_eq!(
                shown.unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "{from:#x}"
            );
        }
        assert_eq!(memory.rights(0), "---p");
    }

    #[test]
    fn a_file_that_is_open_to_be_read_is_not_shown_to_be_written() {
        let memory = memory();
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(PAGE).unwrap();
        let file = File::open(path.path()).unwrap();
        let refused = memory.show(0, PAGE, file.as_fd(), 0, true).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        memory.show(0, PAGE, file.as_fd(), 0, false).unwrap();
    }

    #[test]
    fn a_region_has_a_sensible_place_and_length() {
        for (at, len) in [
            (AT.0, 0),
            (AT.0, PAGE),
            (AT.0, SharedMemory::UNIT + PAGE),
            (AT.0, 1 << 62),
            (AT.0 + PAGE, SharedMemory::UNIT),
            (u64::MAX - SharedMemory::UNIT + 1, 2 * SharedMemory::UNIT),
        ] {
            assert!(
                SharedMemory::new(GuestAddress(at), len).is_err(),
                "{at:#x} {len:#x}"
            );
        }
        assert!(memory().region().as_ptr().addr().is_multiple_of(2 << 20));
    }

    #[test]
    fn a_device_that_touches_what_is_not_there_goes_on() {
        let memory = memory();
        let file = file_of(b"gone");
        memory.show(0, 4 * PAGE, file.as_fd(), 0, true).unwrap();
        file.set_len(PAGE).unwrap();
        // SIGBUS.
        assert_eq!(memory.peek(PAGE), 0);
        memory.poke(2 * PAGE, 7);
        assert_eq!((memory.peek(2 * PAGE), memory.filled()), (7, 2));
        // SIGSEGV.
        memory.show(0, PAGE, file.as_fd(), 0, false).unwrap();
        memory.poke(3, 7);
        assert_eq!(memory.peek(LEN - 1), 0);
        assert_eq!((memory.peek(3), memory.filled()), (7, 4));
        assert_eq!(file.metadata().unwrap().len(), PAGE);
        // Until it is shown again.
        file.set_len(4 * PAGE).unwrap();
        memory.show(0, 4 * PAGE, file.as_fd(), 0, true).unwrap();
        file.write_all_at(b"back", PAGE).unwrap();
        assert_eq!(memory.peek(PAGE), b'b');
    }

    /// Set where the test that follows is its own child.
    const CHILD: &str = "HUSK_TEST_FAULT";

    #[test]
    fn a_fault_elsewhere_ends_the_process() {
        use std::os::unix::process::ExitStatusExt;

        if std::env::var_os(CHILD).is_some() {
            let memory = memory();
            assert_eq!(memory.peek(0), 0);
            let other = MmapRegion::<()>::build(None, 4096, libc::PROT_NONE, ANONYMOUS).unwrap();
            // SAFETY: none: this process is to end here.
            unsafe { other.as_ptr().write_volatile(1) };
            return;
        }
        let own = std::env::current_exe().unwrap();
        let name = "virtio::shared_memory::tests::a_fault_elsewhere_ends_the_process";
        let child = Command::new(own)
            .args(["--exact", name])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(child.status.signal(), Some(libc::SIGSEGV), "{child:?}");
    }
}
