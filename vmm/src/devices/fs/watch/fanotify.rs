//! fanotify(7), as far as a process without CAP_SYS_ADMIN may use it: marks on single folders and files, and events that name
//! them by their handles.
//!
//! Not inotify(7), which does not tell whose doing an event is: here the kernel says so of the process itself, and says
//! nothing of others.

use std::ffi::CStr;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::path::DecInt;

/// What is asked for of what happens to the names in a folder, and to the files behind them.
const IN_FOLDER: u64 =
    OF_FILE | libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_ONDIR | libc::FAN_EVENT_ON_CHILD;

/// What is asked for of a file that is watched by itself.
const OF_FILE: u64 = libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE | libc::FAN_ATTRIB;

/// Before Linux 5.17, a move is two events that nothing connects.
const OLD_MOVES: u64 = libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO;

/// What the C library defines of it ends at the first byte of the handle.
const MAX_HANDLE: usize = 128;

/// A file of the host, as the kernel tells it from others: its file system, and its handle there. Nothing can be opened by it
/// here: that takes open_by_handle_at(2), which no thread of the worker may call.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct FileKey(Vec<u8>);

impl FileKey {
    fn new(fs: &[u8], kind: &[u8], handle: &[u8]) -> Self {
        Self([fs, kind, handle].concat())
    }

    /// The key of what a descriptor stands for.
    ///
    /// # Errors
    /// As name_to_handle_at(2): EOPNOTSUPP for a file system whose files have no handles.
    pub(super) fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let (kind, handle) = match handle_of(file, libc::AT_HANDLE_FID) {
            // Before Linux 6.5, handles are only had to open files by.
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => handle_of(file, 0)?,
            result => result?,
        };
        Ok(Self::new(
            &file_system_of(file)?,
            &kind.to_ne_bytes(),
            &handle,
        ))
    }
}

#[repr(C)]
struct RawHandle {
    handle_bytes: libc::c_uint,
    handle_type: libc::c_int,
    handle: [u8; MAX_HANDLE],
}

fn handle_of(file: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<(libc::c_int, Vec<u8>)> {
    let mut raw = RawHandle {
        handle_bytes: u32::try_from(MAX_HANDLE).expect("it is small"),
        handle_type: 0,
        handle: [0; MAX_HANDLE],
    };
    let mut mount = 0;
    // SAFETY: the path is a string, `raw` has room for as many bytes of a handle as it says, and `mount` for a number.
    let result = unsafe {
        libc::name_to_handle_at(
            file.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut raw).cast(),
            &raw mut mount,
            libc::AT_EMPTY_PATH | flags,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let len = usize::try_from(raw.handle_bytes).unwrap_or(MAX_HANDLE);
    let handle = raw.handle.get(..len).unwrap_or(&raw.handle);
    Ok((raw.handle_type, handle.to_vec()))
}

/// Its f_fsid, which events have as well.
fn file_system_of(file: BorrowedFd<'_>) -> io::Result<[u8; 8]> {
    let mut stat = std::mem::MaybeUninit::<libc::statfs64>::zeroed();
    // SAFETY: the descriptor is open, and `stat` has room for what is written to it.
    if unsafe { libc::fstatfs64(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has filled it in.
    let stat = unsafe { stat.assume_init() };
    // SAFETY: two integers, of which the C library keeps the names to itself.
    Ok(unsafe { std::mem::transmute::<libc::fsid_t, [u8; 8]>(stat.f_fsid) })
}

/// What is marked, and what has happened to it.
#[derive(Debug)]
pub(super) struct Group(OwnedFd);

impl Group {
    /// A group without marks.
    ///
    /// # Errors
    /// As fanotify_init(2): EMFILE when the user has too many.
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DIR_FID
            | libc::FAN_REPORT_NAME;
        // SAFETY: the call takes numbers.
        match unsafe { libc::fanotify_init(flags, 0) } {
            // SAFETY: it is new, and nobody else's.
            fd @ 0.. => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Has events from now on of a folder and what is in it, or of a file. `descriptors` is /proc/self/fd.
    ///
    /// # Errors
    /// As fanotify_mark(2): ENOSPC when the user has too many marks.
    pub(super) fn mark(
        &self,
        descriptors: BorrowedFd<'_>,
        file: BorrowedFd<'_>,
        is_folder: bool,
    ) -> io::Result<()> {
        let change = |events| self.change(libc::FAN_MARK_ADD, events, descriptors, file);
        if !is_folder {
            return change(OF_FILE);
        }
        match change(IN_FOLDER | libc::FAN_RENAME) {
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => change(IN_FOLDER | OLD_MOVES),
            result => result,
        }
    }

    /// Has no more events of it.
    ///
    /// # Errors
    /// As fanotify_mark(2): ENOENT when there were none.
    pub(super) fn unmark(
        &self,
        descriptors: BorrowedFd<'_>,
        file: BorrowedFd<'_>,
    ) -> io::Result<()> {
        // All that there may be: what is not marked is passed over.
        let remove = |events| self.change(libc::FAN_MARK_REMOVE, events, descriptors, file);
        match remove(IN_FOLDER | OLD_MOVES | libc::FAN_RENAME) {
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => remove(IN_FOLDER | OLD_MOVES),
            result => result,
        }
    }

    fn change(
        &self,
        how: libc::c_uint,
        events: u64,
        descriptors: BorrowedFd<'_>,
        file: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let name = DecInt::from_fd(file);
        let name: &CStr = name.as_c_str();
        // SAFETY: the name is a string, and the rest are numbers.
        let result = unsafe {
            libc::fanotify_mark(
                self.0.as_raw_fd(),
                how,
                events,
                descriptors.as_raw_fd(),
                name.as_ptr(),
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Takes the next events into `buffer`; none if there are none.
    ///
    /// # Errors
    /// As read(2).
    pub(super) fn read<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Events<'b>> {
        let len = match rustix::io::read(&self.0, &mut *buffer) {
            Ok(len) => len,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(err) => return Err(err.into()),
        };
        Ok(Events(buffer.get(..len).unwrap_or_default()))
    }
}

impl AsFd for Group {
    /// Readable while there are events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A name in a folder. The name of the folder itself is `.`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place<'b> {
    pub(super) folder: FileKey,
    pub(super) name: &'b [u8],
}

/// What has happened to one file, once or more often: the kernel puts together what it can.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Event<'b> {
    /// Of FAN_CREATE and others.
    pub(super) mask: u64,
    /// The process whose doing it is, if it is this one.
    pub(super) pid: i32,
    pub(super) place: Option<Place<'b>>,
    /// Of a move: where to. `place` is where from.
    pub(super) to: Option<Place<'b>>,
    /// The file itself, if it is told.
    pub(super) file: Option<FileKey>,
}

/// The events in a buffer.
#[derive(Debug)]
pub(super) struct Events<'b>(&'b [u8]);

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

impl<'b> Iterator for Events<'b> {
    type Item = Event<'b>;

    fn next(&mut self) -> Option<Event<'b>> {
        type Metadata = libc::fanotify_event_metadata;
        let len = u32::from_ne_bytes(number(self.0, offset_of!(Metadata, event_len))?);
        let len = usize::try_from(len).ok()?;
        let (event, rest) = self.0.split_at_checked(len)?;
        let start = u16::from_ne_bytes(number(event, offset_of!(Metadata, metadata_len))?);
        let mut parsed = Event {
            mask: u64::from_ne_bytes(number(event, offset_of!(Metadata, mask))?),
            pid: i32::from_ne_bytes(number(event, offset_of!(Metadata, pid))?),
            ..Event::default()
        };
        let mut records = event.get(start.into()..)?;
        while let Some((kind, body, others)) = next_record(records) {
            records = others;
            let Some((key, name)) = parse_file(body) else {
                continue;
            };
            let place = Place { folder: key, name };
            match kind {
                libc::FAN_EVENT_INFO_TYPE_DFID_NAME
                | libc::FAN_EVENT_INFO_TYPE_DFID
                | libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => parsed.place = Some(place),
                libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => parsed.to = Some(place),
                libc::FAN_EVENT_INFO_TYPE_FID => parsed.file = Some(place.folder),
                _ => {}
            }
        }
        self.0 = rest;
        Some(parsed)
    }
}

/// A record that follows an event: its type, what is in it, and what follows.
fn next_record(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    type Header = libc::fanotify_event_info_header;
    let kind = *bytes.first()?;
    let len = u16::from_ne_bytes(number(bytes, offset_of!(Header, len))?);
    let (record, others) = bytes.split_at_checked(len.into())?;
    Some((kind, record.get(size_of::<Header>()..)?, others))
}

/// File system, handle and name, if there is one.
fn parse_file(body: &[u8]) -> Option<(FileKey, &[u8])> {
    let (fs, body) = body.split_at_checked(8)?;
    let len = u32::from_ne_bytes(number(body, 0)?);
    let (kind, body) = body.get(4..)?.split_at_checked(4)?;
    let (handle, name) = body.split_at_checked(usize::try_from(len).ok()?)?;
    let name = name.split(|&byte| byte == 0).next()?;
    let name = if name.is_empty() { b"." } else { name };
    Some((FileKey::new(fs, kind, handle), name))
}
