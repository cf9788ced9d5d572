//! A shared memory region of a device (virtio 1.3, 2.10): addresses of the guest at which the device shows it files of the
//! host.
//!
//! It is a reservation of address space that is never given back while the region lives. Where no file is mapped, nothing
//! can be accessed. It is no part of the guest's memory as devices see it: a descriptor that points into it is refused, so
//! no device reads or writes what may be gone (SIGBUS) in the next moment.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::MmapRegion;

const PAGE: u64 = 4096;

/// A region, and what is mapped there. Its length is a multiple of the page's.
#[derive(Debug)]
pub struct SharedMemory {
    reservation: MmapRegion,
}

impl SharedMemory {
    /// Longest region: the transport keeps this much for each device.
    pub const MAX_LEN: u64 = 2 << 30;

    /// Reserves a region of `len` bytes.
    ///
    /// # Errors
    /// When `len` is zero, no multiple of the page's size or more than [`Self::MAX_LEN`]; when there is no room.
    pub fn new(len: u64) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(PAGE) || len > Self::MAX_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let reservation = MmapRegion::build(None, as_usize(len)?, libc::PROT_NONE, flags)
            .map_err(io::Error::other)?;
        Ok(Self { reservation })
    }

    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "none is empty")]
    pub fn len(&self) -> u64 {
        self.reservation.size() as u64
    }

    /// Where the region begins in this process. What is there may go away at any time: it is for KVM to follow, and for
    /// nobody to read.
    pub(crate) fn address(&self) -> u64 {
        self.reservation.as_ptr() as u64
    }

    /// Shows `len` bytes of `file` from `from` on at `at`, in the place of what was there.
    ///
    /// # Errors
    /// EINVAL if the pieces are empty, not of whole pages, or not inside the region or a file; what mmap(2) says else. What
    /// was there may be gone even so.
    pub fn map(
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
        let protection = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let fd = file.as_raw_fd();
        self.replace(place, protection, libc::MAP_SHARED, fd, from_signed)
    }

    /// Lets go of what is shown in `len` bytes at `at`, if anything is.
    ///
    /// # Errors
    /// EINVAL as for [`Self::map`]; what mmap(2) says else.
    pub fn unmap(&self, at: u64, len: u64) -> io::Result<()> {
        let place = self.place(at, len)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.replace(place, libc::PROT_NONE, flags, -1, 0)
    }

    /// Lets go of all that is shown.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn unmap_all(&self) -> io::Result<()> {
        self.unmap(0, self.len())
    }

    /// The part of the reservation that is `len` bytes from `at` on, if it is one of whole pages.
    fn place(&self, at: u64, len: u64) -> io::Result<Range<usize>> {
        let end = at.checked_add(len).ok_or_else(invalid)?;
        let whole_pages = at.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        if len == 0 || !whole_pages || end > self.len() {
            return Err(invalid());
        }
        Ok(as_usize(at)?..as_usize(end)?)
    }

    /// Maps something in the place of a part of the reservation, as [`Self::place`] returned it.
    fn replace(
        &self,
        place: Range<usize>,
        protection: i32,
        flags: i32,
        fd: i32,
        from: i64,
    ) -> io::Result<()> {
        let start = self.reservation.as_ptr().wrapping_add(place.start);
        let flags = flags | libc::MAP_FIXED;
        let mapped =
            // SAFETY: the part lies in the reservation, which this type owns. Nothing in this process refers to what is
            // there: the pointer is only ever given to KVM, which follows each change.
            unsafe { libc::mmap(start.cast(), place.len(), protection, flags, fd, from) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
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
    use super::SharedMemory;

    impl SharedMemory {
        /// What the guest would read at `at`, which must be mapped; no other thread changes it.
        pub(crate) fn peek(&self, at: usize) -> u8 {
            assert!(at < self.reservation.size());
            let byte = self.reservation.as_ptr().wrapping_add(at);
            // SAFETY: the byte lies in the reservation, and the test has mapped a file there.
            unsafe { byte.read_volatile() }
        }

        /// What the guest would do by a store at `at`, which must be mapped to be written.
        pub(crate) fn poke(&self, at: usize, value: u8) {
            assert!(at < self.reservation.size());
            let byte = self.reservation.as_ptr().wrapping_add(at);
            // SAFETY: the byte lies in the reservation, and the test has mapped a file there.
            unsafe { byte.write_volatile(value) };
        }

        /// The rights of the mapping at `at` as Linux shows them, such as `rw-s`.
        pub(crate) fn rights(&self, at: u64) -> String {
            let address = self.address() + at;
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

    use super::*;

    fn file_of(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE).unwrap();
        file.write_all_at(bytes, PAGE).unwrap();
        file
    }

    #[test]
    fn a_file_is_seen_and_changed_both_ways() {
        let memory = SharedMemory::new(8 * PAGE).unwrap();
        let file = file_of(b"seven");
        memory
            .map(2 * PAGE, 2 * PAGE, file.as_fd(), PAGE, true)
            .unwrap();
        assert_eq!(memory.peek(2 * 4096), b's');
        file.write_all_at(b"e", PAGE).unwrap();
        assert_eq!(memory.peek(2 * 4096), b'e');
        memory.poke(2 * 4096 + 1, b'L');
        let mut seen = [0; 5];
        file.read_exact_at(&mut seen, PAGE).unwrap();
        assert_eq!(&seen, b"eLven");
    }

    #[test]
    fn what_is_not_mapped_has_no_rights() {
        let memory = SharedMemory::new(8 * PAGE).unwrap();
        assert_eq!(memory.rights(0), "---p");
        let file = file_of(b"");
        memory.map(PAGE, PAGE, file.as_fd(), 0, true).unwrap();
        memory.map(2 * PAGE, PAGE, file.as_fd(), 0, false).unwrap();
        let rights = |page: u64| memory.rights(page * PAGE);
        assert_eq!(
            [0, 1, 2, 3].map(rights),
            ["---p", "rw-s", "r--s", "---p"].map(str::to_owned)
        );
        memory.unmap(PAGE, PAGE).unwrap();
        assert_eq!([rights(1), rights(2)], ["---p", "r--s"].map(str::to_owned));
        memory.unmap_all().unwrap();
        assert_eq!(rights(2), "---p");
    }

    #[test]
    fn numbers_that_lead_outside_are_refused() {
        let memory = SharedMemory::new(8 * PAGE).unwrap();
        let file = file_of(b"");
        for (at, len) in [
            (0, 0),
            (0, 1),
            (1, PAGE),
            (0, 9 * PAGE),
            (8 * PAGE, PAGE),
            (7 * PAGE, 2 * PAGE),
            (u64::MAX - PAGE + 1, PAGE),
            (PAGE, u64::MAX - PAGE + 1),
            (u64::MAX, u64::MAX),
        ] {
            let mapped = memory.map(at, len, file.as_fd(), 0, true).unwrap_err();
            assert_eq!(
                mapped.raw_os_error(),
                Some(libc::EINVAL),
                "{at:#x} {len:#x}"
            );
            let unmapped = memory.unmap(at, len).unwrap_err();
            assert_eq!(
                unmapped.raw_os_error(),
                Some(libc::EINVAL),
                "{at:#x} {len:#x}"
            );
        }
        for from in [1, PAGE - 1, i64::MAX as u64 - PAGE + 1, 1 << 63, u64::MAX] {
            let mapped = memory.map(0, 2 * PAGE, file.as_fd(), from, true);
            assert_eq!(
                mapped.unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "{from:#x}"
            );
        }
        assert_eq!(memory.rights(0), "---p");
    }

    #[test]
    fn a_file_that_is_open_to_be_read_is_not_mapped_to_be_written() {
        let memory = SharedMemory::new(PAGE).unwrap();
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(PAGE).unwrap();
        let file = File::open(path.path()).unwrap();
        let refused = memory.map(0, PAGE, file.as_fd(), 0, true).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        memory.map(0, PAGE, file.as_fd(), 0, false).unwrap();
    }

    #[test]
    fn a_region_has_a_sensible_length() {
        for len in [0, 1, PAGE + 1, SharedMemory::MAX_LEN + PAGE, u64::MAX] {
            assert!(SharedMemory::new(len).is_err(), "{len:#x}");
        }
        assert_eq!(
            SharedMemory::new(SharedMemory::MAX_LEN).unwrap().len(),
            SharedMemory::MAX_LEN
        );
    }
}
