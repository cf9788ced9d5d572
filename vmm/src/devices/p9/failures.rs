//! Errors of writes, kept for who syncs the file. Linux's client (6.12) loses some: what it writes in several messages,
//! as it does past its cache, it takes for written if the first of them was (`write_whole` of the share says how). But
//! wherever it knows of no error it asks for the host's fsync, so the answer to that tells. It goes by the file and not by
//! the fid, since the client writes by whichever it finds. An error that it does know of is told once more.
//!
//! As with Linux's own file systems (errseq_t), each who had the file open when a write failed is told once; if none of them
//! has been, so is the first who opens it later. A file that no fid stands for any more is another one when it comes back:
//! its number is new.

use std::io;
use std::num::NonZeroUsize;

use lru::LruCache;

/// Most files of which an error is kept. When there are more, that of the file for which it is the longest ago is
/// forgotten: a guest that has so many files fail at once is told by the others that the disk is full.
const MAX_FILES: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// The last error of each file, by the file's number.
#[derive(Debug)]
pub(super) struct Failures {
    files: LruCache<u64, Failure>,
    /// How many there have been.
    count: u64,
}

#[derive(Debug)]
struct Failure {
    errno: i32,
    /// How many there had been with it.
    count: u64,
    told: bool,
}

/// How many failures there had been when one who has a file open was told last, or had no need to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heard(u64);

impl Failures {
    pub(super) fn new() -> Self {
        Self {
            files: LruCache::new(MAX_FILES),
            count: 0,
        }
    }

    /// A write of the file has failed.
    pub(super) fn add(&mut self, file: u64, err: &io::Error) {
        self.count += 1;
        let failure = Failure {
            errno: err.raw_os_error().unwrap_or(libc::EIO),
            count: self.count,
            told: false,
        };
        self.files.put(file, failure);
    }

    /// What one who opens the file now need not be told.
    pub(super) fn heard(&self, file: u64) -> Heard {
        match self.files.peek(&file) {
            Some(failure) if !failure.told => Heard(failure.count - 1),
            _ => Heard(self.count),
        }
    }

    /// Tells one who has the file open.
    ///
    /// # Errors
    /// That of the file's last write that failed, if it is not `heard`.
    pub(super) fn tell(&mut self, file: u64, heard: &mut Heard) -> io::Result<()> {
        match self.files.peek_mut(&file) {
            Some(failure) if failure.count > heard.0 => {
                failure.told = true;
                heard.0 = failure.count;
                Err(io::Error::from_raw_os_error(failure.errno))
            }
            _ => Ok(()),
        }
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.files.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(failures: &mut Failures, file: u64, heard: &mut Heard) -> Option<i32> {
        let err = failures.tell(file, heard).err()?;
        err.raw_os_error()
    }

    #[test]
    fn each_who_had_the_file_open_is_told_once() {
        let mut failures = Failures::new();
        let (mut first, mut second) = (failures.heard(7), failures.heard(7));
        let mut other = failures.heard(8);
        for errno in [libc::ENOSPC, libc::EDQUOT] {
            failures.add(7, &io::Error::from_raw_os_error(errno));
            for heard in [&mut first, &mut second] {
                assert_eq!(told(&mut failures, 7, heard), Some(errno));
                assert_eq!(told(&mut failures, 7, heard), None);
            }
            assert_eq!(told(&mut failures, 8, &mut other), None);
        }
    }

    #[test]
    fn one_who_opens_the_file_later_is_told_what_nobody_has_been() {
        let mut failures = Failures::new();
        let mut writer = failures.heard(7);
        failures.add(7, &io::ErrorKind::WriteZero.into());
        let mut reader = failures.heard(7);
        for heard in [&mut reader, &mut writer] {
            assert_eq!(told(&mut failures, 7, heard), Some(libc::EIO));
        }
        let mut late = failures.heard(7);
        assert_eq!(told(&mut failures, 7, &mut late), None);
    }

    #[test]
    fn files_are_bounded_and_the_oldest_is_forgotten() {
        let mut failures = Failures::new();
        let mut heard = failures.heard(0);
        let most = MAX_FILES.get() as u64;
        for file in (0..most).chain([0, most]) {
            failures.add(file, &io::Error::from_raw_os_error(libc::ENOSPC));
            assert!(failures.files.len() <= MAX_FILES.get());
        }
        for (file, errno) in [(0, Some(libc::ENOSPC)), (1, None), (2, Some(libc::ENOSPC))] {
            let mut heard = heard;
            assert_eq!(told(&mut failures, file, &mut heard), errno, "{file}");
        }
        failures.clear();
        assert_eq!(told(&mut failures, most, &mut heard), None);
    }
}
