//! The 9P server: the fids of the guest, and what each request is in the words of the [`Share`].
//!
//! A fid stands for a file by its number in the share: the file lives on while a fid stands for it, whatever becomes of its
//! name, and which names it has nobody knows. That is why Trename and Tremove, which
//! name a file by its fid only, are refused with the error upon which Linux uses Trenameat and Tunlinkat; it tries those
//! first.
//!
//! Who may do what is for the guest's kernel to say, as with the file system device. A fid belongs to the user who
//! attached the one that it was walked from, and files are made as that user, with the group that comes with the request.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, ROOT_ID,
};
use rustix::io::Errno;

use super::data::{Data, Room};
use super::failures::Failures;
use super::fid::{Fid, NewValue, Node, OpenFile, SERVER, State};
use super::message::{Answer, Attributes, HEADER_LEN, NONE, Qid, Request};
use super::translate::{open_flags, qid_kind, to_fuse};
use crate::devices::fs::{MAX_NODES, Share};
use crate::virtio::queue::{Readable, Writable};

/// Most bytes of a message: 512 KiB of data and what stands before it. Linux's transport takes 500 KiB at most.
pub(super) const MAX_MSIZE: usize = 512 * 1024 + 24;

/// Fewest bytes that a guest may agree to: Linux refuses less as well.
const MIN_MSIZE: usize = 4096;

/// Most fids: a client that keeps all that it knows has one for each file, and the share knows no more files.
/// A test that makes them all one message at a time would take a minute.
const MAX_FIDS: usize = if cfg!(test) { 4096 } else { MAX_NODES };

/// Most fids that hold the value of an extended attribute, of [`MAX_VALUE`] bytes each. A client has one for as long as it
/// takes to read or write the attribute.
const MAX_VALUES: usize = 256;

/// XATTR_SIZE_MAX of Linux.
const MAX_VALUE: usize = 64 * 1024;

const VERSION: &[u8] = b"9P2000.L";

/// The magic number of 9P file systems in statfs(2).
const MAGIC: u32 = 0x0102_1997;

/// P9_GETATTR_BASIC: all that stat(2) tells. Times of birth, generations and versions are not known.
const BASIC_ATTRIBUTES: u64 = 0x7ff;

/// Header and count before the data of an answer.
const DATA_HEADER: usize = HEADER_LEN + size_of::<u32>();

/// Qid, position, type and length before the name of an entry of a folder.
const ENTRY_HEADER: usize = 13 + 8 + 1 + 2;

/// The answer to a request that succeeded.
#[derive(Debug)]
pub(super) enum Reply {
    /// What follows the header.
    Body(Answer),
    /// So many bytes are in the room that was given, behind header and count.
    Data(usize),
}

/// The fids of a guest.
#[derive(Debug)]
pub(super) struct Server {
    share: Arc<Share>,
    /// What was agreed on with the version. Zero before that.
    msize: usize,
    fids: HashMap<u32, Fid>,
    /// How many of them hold the value of an extended attribute.
    values: usize,
    failures: Failures,
}

impl Server {
    pub(super) fn new(share: Share) -> Self {
        Self {
            share: Arc::new(share),
            msize: 0,
            fids: HashMap::new(),
            values: 0,
            failures: Failures::new(),
        }
    }

    /// How many fids there are.
    pub(super) fn fids(&self) -> usize {
        self.fids.len()
    }

    /// How many files and folders are open.
    pub(super) fn open_files(&self) -> usize {
        self.share.open_files()
    }

    /// What was agreed on with the version. `None` before that.
    pub(super) fn msize(&self) -> Option<usize> {
        Some(self.msize).filter(|msize| *msize != 0)
    }

    /// The fids that stand for the folder itself, with their users.
    pub(super) fn roots(&self) -> Vec<(u32, u32)> {
        let roots = self
            .fids
            .iter()
            .filter(|(_, fid)| fid.node.number == ROOT_ID && matches!(fid.state, State::Closed));
        let mut roots: Vec<_> = roots.map(|(number, fid)| (*number, fid.user)).collect();
        roots.sort_unstable();
        roots
    }

    /// Goes on where a guest has agreed on a version and has these fids for the folder itself.
    pub(super) fn restore(&mut self, msize: usize, roots: &[(u32, u32)]) -> io::Result<()> {
        if !(MIN_MSIZE..=MAX_MSIZE).contains(&msize) || roots.len() > MAX_FIDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.reset();
        self.share.init(FsOptions::empty())?;
        self.msize = msize;
        for (fid, user) in roots {
            self.attach(*fid, NONE, *user)?;
        }
        Ok(())
    }

    /// Gives up every fid, and forgets the version.
    pub(super) fn reset(&mut self) {
        self.fids.clear();
        self.values = 0;
        self.failures.clear();
        if self.msize != 0 {
            self.msize = 0;
            self.share.destroy();
        }
    }

    /// Serves one request. `data` is what a write writes, `room` is for what is read, and nothing else.
    ///
    /// # Errors
    /// What the guest is to be told.
    pub(super) fn serve(
        &mut self,
        request: Request,
        mut data: Readable<'_>,
        room: &mut Writable<'_>,
    ) -> io::Result<Reply> {
        if let Request::Version { msize, version } = request {
            return self.version(msize, &version).map(Reply::Body);
        }
        if self.msize == 0 {
            return Err(Errno::PROTO.into());
        }
        let body = match request {
            Request::Read { fid, offset, count } => {
                let mut room = self.limited(count, room);
                return self.read(fid, offset, &mut room).map(Reply::Data);
            }
            Request::ReadDir { fid, offset, count } => {
                let mut room = self.limited(count, room);
                return self.read_dir(fid, offset, &mut room).map(Reply::Data);
            }
            Request::Write { fid, offset, count } => {
                if usize::try_from(count) != Ok(data.len()) {
                    return Err(Errno::PROTO.into());
                }
                self.write(fid, offset, count, &mut data)?
            }
            other => self.answer(other)?,
        };
        if HEADER_LEN + body.as_bytes().len() > self.msize {
            return Err(Errno::MSGSIZE.into());
        }
        Ok(Reply::Body(body))
    }

    /// The room for data that the guest wants so much of.
    fn limited<'m>(&self, count: u32, room: &mut Writable<'m>) -> Writable<'m> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        room.take(count.min(self.msize - DATA_HEADER))
    }

    fn answer(&mut self, request: Request) -> io::Result<Answer> {
        let done = |()| Answer::default();
        match request {
            Request::Attach { fid, afid, user } => self.attach(fid, afid, user),
            // Requests are served one after the other: what is to be flushed has been answered.
            Request::Flush => Ok(Answer::default()),
            Request::Walk {
                fid,
                new_fid,
                names,
            } => self.walk(fid, new_fid, &names),
            Request::Open { fid, flags } => self.open(fid, flags),
            Request::Create {
                fid,
                name,
                flags,
                mode,
                gid,
            } => {
                let args = CreateIn {
                    flags: open_flags(flags),
                    mode: mode & 0o7777,
                    ..CreateIn::default()
                };
                self.create(fid, &name, args, gid)
            }
            Request::Clunk { fid } => self.clunk(fid).map(done),
            Request::Remove { fid } => {
                self.clunk(fid)?;
                Err(Errno::OPNOTSUPP.into())
            }
            Request::GetAttr { fid, mask } => self.get_attributes(fid, mask),
            Request::SetAttr { fid, attributes } => self.set_attributes(fid, attributes).map(done),
            Request::StatFs { fid } => self.stat_fs(fid),
            Request::Fsync { fid, data_only } => self.fsync(fid, data_only).map(done),
            Request::ReadLink { fid } => {
                let target = self.share.readlink(&SERVER, self.file(fid)?.node.number)?;
                Ok(Answer::default().string(&target))
            }
            Request::AttributeWalk { fid, new_fid, name } => {
                self.attribute_walk(fid, new_fid, name.as_deref())
            }
            Request::AttributeCreate {
                fid,
                name,
                size,
                flags,
            } => self.attribute_create(fid, name, size, flags).map(done),
            // The guest's kernel has found that no process of its own minds. Those of the host do not know of its locks,
            // as with the file system device.
            Request::Lock { fid } => self.file(fid).map(|_| Answer::default().u8(LOCK_SUCCESS)),
            Request::GetLock {
                fid,
                start,
                length,
                process,
                client,
            } => self.file(fid).map(|_| {
                Answer::default()
                    .u8(UNLOCKED)
                    .u64(start)
                    .u64(length)
                    .u32(process)
                    .string(&client)
            }),
            other => self.change_dir(other),
        }
    }

    /// What makes, moves and removes names.
    fn change_dir(&self, request: Request) -> io::Result<Answer> {
        let share = &self.share;
        let made = |entry: io::Result<Entry>| {
            let entry = entry?;
            let qid = Node::new(share, &entry).qid(&entry.attr);
            Ok(Answer::default().qid(qid))
        };
        let done = |()| Answer::default();
        match request {
            Request::Symlink {
                dir,
                name,
                target,
                gid,
            } => {
                let (ctx, dir) = self.maker(dir, gid)?;
                made(share.symlink(&ctx, &target, dir, &name))
            }
            Request::MakeNode {
                dir,
                name,
                mode,
                major,
                minor,
                gid,
            } => {
                let (ctx, dir) = self.maker(dir, gid)?;
                let device = u32::try_from(libc::makedev(major, minor)).or(Err(Errno::INVAL))?;
                made(share.mknod(&ctx, dir, &name, mode, device, 0))
            }
            Request::MakeDir {
                dir,
                name,
                mode,
                gid,
            } => {
                let (ctx, dir) = self.maker(dir, gid)?;
                made(share.mkdir(&ctx, dir, &name, mode & 0o7777, 0))
            }
            Request::Link { dir, fid, name } => {
                let (dir, file) = (self.dir(dir)?, self.file(fid)?.node.number);
                let entry = share.link(&SERVER, file, dir, &name)?;
                drop(Node::new(share, &entry));
                Ok(Answer::default())
            }
            Request::Rename {
                old_dir,
                old_name,
                new_dir,
                new_name,
            } => {
                let (old, new) = (self.dir(old_dir)?, self.dir(new_dir)?);
                share
                    .rename(&SERVER, old, &old_name, new, &new_name, 0)
                    .map(done)
            }
            Request::Unlink { dir, name, flags } => {
                let dir = self.dir(dir)?;
                match flags.cast_signed() {
                    0 => share.unlink(&SERVER, dir, &name).map(done),
                    libc::AT_REMOVEDIR => share.rmdir(&SERVER, dir, &name).map(done),
                    _ => Err(Errno::INVAL.into()),
                }
            }
            _ => Err(Errno::OPNOTSUPP.into()),
        }
    }

    fn version(&mut self, msize: u32, version: &[u8]) -> io::Result<Answer> {
        self.reset();
        let agreed = usize::try_from(msize).unwrap_or(usize::MAX).min(MAX_MSIZE);
        if agreed < MIN_MSIZE {
            return Err(Errno::MSGSIZE.into());
        }
        let size = u32::try_from(agreed).expect("MAX_MSIZE is far below 4 GiB");
        let answer = Answer::default().u32(size);
        if version != VERSION {
            return Ok(answer.string(b"unknown"));
        }
        self.share.init(FsOptions::empty())?;
        self.msize = agreed;
        Ok(answer.string(VERSION))
    }

    /// There is nobody to authenticate to: `afid` is none.
    fn attach(&mut self, fid: u32, afid: u32, user: u32) -> io::Result<Answer> {
        if afid != NONE {
            return Err(Errno::INVAL.into());
        }
        self.vacant(fid)?;
        let (stat, _) = self.share.getattr(&SERVER, ROOT_ID, None)?;
        // The share does not count references to its root.
        let node = Node::numbered(&self.share, ROOT_ID, &stat);
        let qid = node.qid(&stat);
        // Linux mounts as nobody in particular, and attaches again for each user.
        let user = if user == NONE { 0 } else { user };
        self.insert(fid, Arc::new(node), user, State::Closed);
        Ok(Answer::default().qid(qid))
    }

    fn walk(&mut self, fid: u32, new_fid: u32, names: &[CString]) -> io::Result<Answer> {
        let from = self.file(fid)?;
        let user = from.user;
        let mut node = Arc::clone(&from.node);
        if new_fid != fid {
            self.vacant(new_fid)?;
        } else if matches!(from.state, State::Open(_)) {
            return Err(Errno::BUSY.into());
        }
        let mut qids = Vec::new();
        for name in names {
            match self.share.walk(node.number, name) {
                Ok(entry) => {
                    node = Arc::new(Node::new(&self.share, &entry));
                    qids.push(node.qid(&entry.attr));
                }
                Err(err) if qids.is_empty() => return Err(err),
                Err(_) => break,
            }
        }
        if qids.len() == names.len() {
            self.insert(new_fid, node, user, State::Closed);
        }
        let count = u16::try_from(qids.len()).expect("the message has 16 names at most");
        Ok(qids
            .into_iter()
            .fold(Answer::default().u16(count), Answer::qid))
    }

    fn open(&mut self, fid: u32, flags: u32) -> io::Result<Answer> {
        let node = Arc::clone(&self.closed(fid)?.node);
        let flags = open_flags(flags);
        let handle = if node.is_dir() {
            node.share.opendir(&SERVER, node.number, flags)?.0
        } else {
            node.share.open(&SERVER, node.number, flags, 0)?.0
        };
        let open = OpenFile {
            node: Arc::clone(&node),
            handle: handle.ok_or(Errno::IO)?,
            flags,
            heard: self.failures.heard(node.number),
        };
        let qid = node.qid(&node.attributes()?);
        self.closed(fid)?.state = State::Open(open);
        Ok(opened(qid))
    }

    /// Makes a file, for which the fid of its folder stands from then on.
    fn create(&mut self, fid: u32, name: &CStr, args: CreateIn, gid: u32) -> io::Result<Answer> {
        let share = Arc::clone(&self.share);
        let dir = self.closed(fid)?;
        let ctx = maker(dir.user, gid);
        let (entry, handle, ..) = share.create(&ctx, dir.node.number, name, args)?;
        let node = Arc::new(Node::new(&share, &entry));
        let heard = self.failures.heard(node.number);
        let file = self.closed(fid)?;
        file.state = State::Open(OpenFile {
            node: Arc::clone(&node),
            handle: handle.ok_or(Errno::IO)?,
            flags: args.flags,
            heard,
        });
        let qid = node.qid(&entry.attr);
        file.node = node;
        Ok(opened(qid))
    }

    fn read(&self, fid: u32, offset: u64, room: &mut Writable<'_>) -> io::Result<usize> {
        let open = match &self.fid(fid)?.state {
            State::Value(value) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                return Ok(room.write(value.get(start..).unwrap_or_default()));
            }
            State::Open(open) if open.node.is_dir() => return Err(Errno::ISDIR.into()),
            State::Open(open) => open,
            State::Closed | State::NewValue(_) => return Err(Errno::BADF.into()),
        };
        let size = u32::try_from(room.len()).expect("at most msize");
        let (number, handle) = (open.node.number, open.handle);
        let mut room = Room(room);
        self.share.read(
            &SERVER, number, handle, &mut room, size, offset, None, open.flags,
        )
    }

    fn write(
        &mut self,
        fid: u32,
        offset: u64,
        count: u32,
        data: &mut Readable<'_>,
    ) -> io::Result<Answer> {
        let file = self.fids.get_mut(&fid).ok_or(Errno::BADF)?;
        let written = match &mut file.state {
            State::NewValue(new) => new.write(offset, data)?,
            State::Open(open) => {
                let (number, handle, mut data) = (open.node.number, open.handle, Data(data));
                // What the client has kept looks like what it has not.
                let kept = true;
                let written = self.share.write(
                    &SERVER, number, handle, &mut data, count, offset, None, kept, open.flags, 0,
                );
                written.inspect_err(|err| self.failures.add(number, err))?
            }
            State::Closed | State::Value(_) => return Err(Errno::BADF.into()),
        };
        let written = u32::try_from(written).expect("at most what there was");
        Ok(Answer::default().u32(written))
    }

    fn read_dir(&self, fid: u32, offset: u64, room: &mut Writable<'_>) -> io::Result<usize> {
        let open = self.opened(fid)?;
        if !open.node.is_dir() {
            return Err(Errno::NOTDIR.into());
        }
        let size = room.len();
        let host_size = u32::try_from(size).expect("at most msize");
        let (mut entries, mut no_room) = (Answer::default(), false);
        let mut add = |entry: DirEntry<'_>| {
            let len = ENTRY_HEADER + entry.name.len();
            if entries.as_bytes().len() + len > size {
                no_room = true;
                return Ok(0);
            }
            let kind = u8::try_from(entry.type_).unwrap_or(libc::DT_UNKNOWN);
            let qid = Qid {
                kind: qid_kind(u32::from(kind) << 12),
                version: 0,
                path: self.share.fingerprint(open.node.number, Some(entry.ino))?,
            };
            entries = std::mem::take(&mut entries)
                .qid(qid)
                .u64(entry.offset)
                .u8(kind)
                .string(entry.name);
            Ok(len)
        };
        let (number, handle) = (open.node.number, open.handle);
        self.share
            .readdir(&SERVER, number, handle, host_size, offset, &mut add)?;
        // Nothing at all would mean the end.
        if no_room && entries.as_bytes().is_empty() {
            return Err(Errno::INVAL.into());
        }
        Ok(room.write(entries.as_bytes()))
    }

    fn clunk(&mut self, fid: u32) -> io::Result<()> {
        let Fid { node, state, .. } = self.fids.remove(&fid).ok_or(Errno::BADF)?;
        if matches!(state, State::Value(_) | State::NewValue(_)) {
            self.values -= 1;
        }
        match state {
            State::NewValue(new) => new.set(&node),
            State::Closed | State::Open(_) | State::Value(_) => Ok(()),
        }
    }

    fn get_attributes(&self, fid: u32, mask: u64) -> io::Result<Answer> {
        let node = &self.file(fid)?.node;
        let stat = node.attributes()?;
        let answer = Answer::default()
            .u64(mask & BASIC_ATTRIBUTES)
            .qid(node.qid(&stat))
            .u32(stat.st_mode)
            .u32(stat.st_uid)
            .u32(stat.st_gid)
            .u64(stat.st_nlink)
            .u64(stat.st_rdev);
        let numbers = [
            stat.st_size,
            stat.st_blksize,
            stat.st_blocks,
            stat.st_atime,
            stat.st_atime_nsec,
            stat.st_mtime,
            stat.st_mtime_nsec,
            stat.st_ctime,
            stat.st_ctime_nsec,
        ];
        let answer = numbers
            .into_iter()
            .fold(answer, |answer, number| answer.u64(number.cast_unsigned()));
        // Birth in seconds and nanoseconds, generation and version of the data.
        Ok([0; 4].into_iter().fold(answer, Answer::u64))
    }

    /// A change of ctime alone is none: the host keeps that.
    fn set_attributes(&self, fid: u32, attributes: Attributes) -> io::Result<()> {
        let number = self.file(fid)?.node.number;
        let (attr, valid) = to_fuse(attributes)?;
        if !valid.is_empty() {
            self.share.setattr(&SERVER, number, attr, None, valid)?;
        }
        Ok(())
    }

    fn stat_fs(&self, fid: u32) -> io::Result<Answer> {
        let stat = self.share.statfs(&SERVER, self.file(fid)?.node.number)?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(Answer::default()
            .u32(MAGIC)
            // What the numbers of blocks count.
            .u32(narrow(stat.f_frsize))
            .u64(stat.f_blocks)
            .u64(stat.f_bfree)
            .u64(stat.f_bavail)
            .u64(stat.f_files)
            .u64(stat.f_ffree)
            .u64(stat.f_fsid)
            .u32(narrow(stat.f_namemax)))
    }

    /// Also tells of writes of the file that have failed, by whatever fid.
    fn fsync(&mut self, fid: u32, data_only: bool) -> io::Result<()> {
        let file = self.fids.get_mut(&fid).ok_or(Errno::BADF)?;
        let State::Open(open) = &mut file.state else {
            return Err(Errno::BADF.into());
        };
        let (number, handle) = (open.node.number, open.handle);
        if open.node.is_dir() {
            return self.share.fsyncdir(&SERVER, number, data_only, handle);
        }
        self.share.fsync(&SERVER, number, data_only, handle)?;
        self.failures.tell(number, &mut open.heard)
    }

    fn attribute_walk(
        &mut self,
        fid: u32,
        new_fid: u32,
        name: Option<&CStr>,
    ) -> io::Result<Answer> {
        let file = self.file(fid)?;
        let (node, user) = (Arc::clone(&file.node), file.user);
        self.vacant(new_fid)?;
        self.another_value()?;
        // The share gives it room for what Linux can have.
        let value = match name {
            None => match self.share.listxattr(&SERVER, node.number, u32::MAX)? {
                ListxattrReply::Names(names) => names,
                ListxattrReply::Count(_) => return Err(Errno::IO.into()),
            },
            Some(name) => match self.share.getxattr(&SERVER, node.number, name, u32::MAX)? {
                GetxattrReply::Value(value) => value,
                GetxattrReply::Count(_) => return Err(Errno::IO.into()),
            },
        };
        let answer = Answer::default().u64(value.len() as u64);
        self.values += 1;
        self.insert(new_fid, node, user, State::Value(value.as_slice().into()));
        Ok(answer)
    }

    fn attribute_create(
        &mut self,
        fid: u32,
        name: CString,
        size: u64,
        flags: u32,
    ) -> io::Result<()> {
        self.another_value()?;
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        if len > MAX_VALUE {
            return Err(Errno::TOOBIG.into());
        }
        self.closed(fid)?.state = State::NewValue(NewValue::new(name, len, flags));
        self.values += 1;
        Ok(())
    }

    /// That one more fid may hold the value of an extended attribute.
    fn another_value(&self) -> io::Result<()> {
        if self.values < MAX_VALUES {
            Ok(())
        } else {
            Err(Errno::NFILE.into())
        }
    }

    /// That `fid` is free, and may be taken.
    fn vacant(&self, fid: u32) -> io::Result<()> {
        if fid == NONE || self.fids.contains_key(&fid) {
            Err(Errno::INVAL.into())
        } else if self.fids.len() >= MAX_FIDS {
            Err(Errno::NFILE.into())
        } else {
            Ok(())
        }
    }

    fn insert(&mut self, fid: u32, node: Arc<Node>, user: u32, state: State) {
        self.fids.insert(fid, Fid { node, user, state });
    }

    fn fid(&self, fid: u32) -> io::Result<&Fid> {
        Ok(self.fids.get(&fid).ok_or(Errno::BADF)?)
    }

    /// A fid that stands for a file, and not for an extended attribute.
    fn file(&self, fid: u32) -> io::Result<&Fid> {
        let found = self.fid(fid)?;
        match found.state {
            State::Closed | State::Open(_) => Ok(found),
            State::Value(_) | State::NewValue(_) => Err(Errno::BADF.into()),
        }
    }

    /// A fid that may become something else.
    fn closed(&mut self, fid: u32) -> io::Result<&mut Fid> {
        let found = self.fids.get_mut(&fid).ok_or(Errno::BADF)?;
        match found.state {
            State::Closed => Ok(found),
            _ => Err(Errno::BADF.into()),
        }
    }

    fn opened(&self, fid: u32) -> io::Result<&OpenFile> {
        match &self.fid(fid)?.state {
            State::Open(open) => Ok(open),
            _ => Err(Errno::BADF.into()),
        }
    }

    /// The number of a folder.
    fn dir(&self, fid: u32) -> io::Result<u64> {
        Ok(self.file(fid)?.node.number)
    }

    /// The number of a folder, and who makes a file in it.
    fn maker(&self, dir: u32, gid: u32) -> io::Result<(Context, u64)> {
        let dir = self.file(dir)?;
        Ok((maker(dir.user, gid), dir.node.number))
    }
}

/// P9_LOCK_SUCCESS and P9_LOCK_TYPE_UNLCK.
const LOCK_SUCCESS: u8 = 0;
const UNLOCKED: u8 = 2;

fn maker(uid: u32, gid: u32) -> Context {
    Context { uid, gid, pid: 0 }
}

/// A qid, and that the guest may read and write as much at once as a message holds.
fn opened(qid: Qid) -> Answer {
    Answer::default().qid(qid).u32(0)
}
