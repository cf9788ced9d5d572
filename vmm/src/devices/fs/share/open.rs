//! The files and folders that the guest has open.

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

/// Bytes of a folder that are read at once.
const FOLDER_BYTES: usize = 32 * 1024;

/// An open file or folder.
#[derive(Debug)]
pub(super) struct OpenFile {
    node: u64,
    file: File,
    /// So that the node has a descriptor while it is open, whatever the host does to its names.
    _anchor: Arc<OwnedFd>,
    /// Whether the host's file has O_APPEND. Held while it matters which.
    appends: Mutex<bool>,
    reading: Mutex<Reading>,
}

/// How far a folder has been read.
#[derive(Debug, Default)]
struct Reading {
    /// The place of the first of `ahead`.
    place: u64,
    ahead: VecDeque<FolderEntry>,
}

/// A name in a folder.
#[derive(Debug)]
pub(super) struct FolderEntry {
    pub(super) inode: u64,
    /// DT_*, if the file system knows.
    pub(super) kind: u32,
    pub(super) name: CString,
    /// The place of the next one.
    pub(super) next: u64,
}

/// A file of which the descriptor is another's: the library wants one to itself.
pub(super) struct Borrowed<'f> {
    file: ManuallyDrop<File>,
    _of: std::marker::PhantomData<&'f File>,
}

impl std::ops::Deref for Borrowed<'_> {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl std::ops::DerefMut for Borrowed<'_> {
    fn deref_mut(&mut self) -> &mut File {
        &mut self.file
    }
}

impl OpenFile {
    pub(super) fn new(node: u64, file: File, anchor: Arc<OwnedFd>, flags: OFlags) -> Self {
        Self {
            node,
            file,
            _anchor: anchor,
            appends: Mutex::new(flags.contains(OFlags::APPEND)),
            reading: Mutex::default(),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn borrowed(&self) -> Borrowed<'_> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed, and is not closed by what is made of it here.
        let file = unsafe { File::from_raw_fd(self.file.as_raw_fd()) };
        Borrowed {
            file: ManuallyDrop::new(file),
            _of: std::marker::PhantomData,
        }
    }

    /// Sees to it that writes are appended, or are not, while the result lives.
    ///
    /// # Errors
    /// As fcntl(2): a file that can only be appended to stays so.
    pub(super) fn appending(&self, append: bool) -> io::Result<MutexGuard<'_, bool>> {
        let mut appends = self.appends.lock().unwrap_or_else(PoisonError::into_inner);
        if *appends != append {
            let mut flags = rustix::fs::fcntl_getfl(&self.file)?;
            flags.set(OFlags::APPEND, append);
            rustix::fs::fcntl_setfl(&self.file, flags)?;
            *appends = append;
        }
        Ok(appends)
    }

    /// Hands the folder's entries from `place` on to `add`, until that has had enough (`false`).
    ///
    /// What is read of the host's folder and not taken is kept for the next call: to read it again, after a seek backwards,
    /// skips entries where places are counts (tmpfs before Linux 6.6) and some were removed meanwhile.
    ///
    /// # Errors
    /// As getdents64(2), and the first of `add`.
    pub(super) fn read_folder(
        &self,
        place: u64,
        mut add: impl FnMut(&FolderEntry) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if reading.place != place {
            // Past what the host has is the end.
            rustix::fs::seek(&self.file, SeekFrom::Start(place))?;
            reading.ahead.clear();
            reading.place = place;
        }
        loop {
            if reading.ahead.is_empty() {
                reading.ahead = read_ahead(&self.file)?;
            }
            let Some(entry) = reading.ahead.front() else {
                return Ok(());
            };
            if !add(entry)? {
                return Ok(());
            }
            reading.place = entry.next;
            reading.ahead.pop_front();
        }
    }
}

/// The next entries of a folder. None are left when there are none.
fn read_ahead(folder: impl AsFd) -> io::Result<VecDeque<FolderEntry>> {
    let mut buffer = vec![MaybeUninit::uninit(); FOLDER_BYTES];
    let mut raw = RawDir::new(folder, &mut buffer);
    let mut entries = VecDeque::new();
    while let Some(entry) = raw.next() {
        let entry = entry?;
        entries.push_back(FolderEntry {
            inode: entry.ino(),
            kind: u32::from(kind_of(entry.file_type())),
            name: entry.file_name().to_owned(),
            next: entry.next_entry_cookie(),
        });
        if raw.is_buffer_empty() {
            break;
        }
    }
    Ok(entries)
}

fn kind_of(kind: rustix::fs::FileType) -> u8 {
    use rustix::fs::FileType;
    match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    }
}

/// All open files, by the handle that the guest has.
#[derive(Debug)]
pub(super) struct OpenFiles {
    files: Mutex<HashMap<u64, Arc<OpenFile>>>,
    most: usize,
}

impl OpenFiles {
    /// `most`: how many there may be.
    pub(super) fn new(most: usize) -> Self {
        Self {
            files: Mutex::default(),
            most,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    /// That one more may be opened.
    ///
    /// # Errors
    /// ENFILE when it may not.
    pub(super) fn check_room(&self) -> io::Result<()> {
        if self.len() < self.most {
            Ok(())
        } else {
            Err(Errno::NFILE.into())
        }
    }

    pub(super) fn add(&self, handle: u64, file: OpenFile) {
        self.lock().insert(handle, Arc::new(file));
    }

    /// An open file, if it is one of the node `node`.
    ///
    /// # Errors
    /// EBADF.
    pub(super) fn get(&self, handle: u64, node: u64) -> io::Result<Arc<OpenFile>> {
        let files = self.lock();
        let file = files.get(&handle).filter(|file| file.node == node);
        Ok(Arc::clone(file.ok_or(Errno::BADF)?))
    }

    /// Closes a file.
    ///
    /// # Errors
    /// EBADF when it is not open.
    pub(super) fn remove(&self, handle: u64, node: u64) -> io::Result<()> {
        let mut files = self.lock();
        match files.get(&handle) {
            Some(file) if file.node == node => {
                let closed = files.remove(&handle);
                // close(2) may take its time.
                drop(files);
                drop(closed);
                Ok(())
            }
            _ => Err(Errno::BADF.into()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<OpenFile>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
