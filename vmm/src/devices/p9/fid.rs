//! What fids stand for. A [`Node`] is a reference that the share counts, given back when the last fid for the file goes; an
//! [`OpenFile`] closes itself.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use rustix::io::Errno;

use super::failures::Heard;
use super::message::Qid;
use super::translate::{qid_kind, version_of};
use crate::devices::fs::Share;
use crate::virtio::queue::Readable;

/// The rights of all requests that make no file: the thread's own, since the guest's kernel has checked the user's.
pub(super) const SERVER: Context = Context {
    uid: 0,
    gid: 0,
    pid: 0,
};

/// A file that the share counts a reference to.
pub(super) struct Node {
    pub(super) share: Arc<Share>,
    pub(super) number: u64,
    path: u64,
    /// Of `st_mode`, the type, which a file keeps for life.
    kind: u32,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({}, {:o})", self.number, self.kind)
    }
}

impl Node {
    /// Takes over the reference that came with an entry.
    pub(super) fn new(share: &Arc<Share>, entry: &Entry) -> Self {
        Self::numbered(share, entry.inode, &entry.attr)
    }

    /// Takes over a reference to a file that is known by number.
    pub(super) fn numbered(share: &Arc<Share>, number: u64, stat: &stat64) -> Self {
        Self {
            share: Arc::clone(share),
            number,
            // It is known, since there is a reference to it.
            path: share.fingerprint(number, None).unwrap_or(number),
            kind: stat.st_mode & libc::S_IFMT,
        }
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn attributes(&self) -> io::Result<stat64> {
        Ok(self.share.getattr(&SERVER, self.number, None)?.0)
    }

    pub(super) fn qid(&self, stat: &stat64) -> Qid {
        Qid {
            kind: qid_kind(self.kind),
            version: version_of(stat, self.share.cache()),
            path: self.path,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.share.forget(&SERVER, self.number, 1);
    }
}

/// An open file or folder.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) node: Arc<Node>,
    pub(super) handle: u64,
    /// As at the open: the share gives the host's file other ones where a request has others.
    pub(super) flags: u32,
    pub(super) heard: Heard,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        let Self {
            node,
            handle,
            flags,
            ..
        } = self;
        let (share, number) = (&node.share, node.number);
        let closed = if node.is_dir() {
            share.releasedir(&SERVER, number, *flags, *handle)
        } else {
            share.release(&SERVER, number, *flags, *handle, false, false, None)
        };
        if let Err(err) = closed {
            log::debug!("open file {handle} of {node:?} was not there to be closed: {err}");
        }
    }
}

/// What the guest has given a number.
#[derive(Debug)]
pub(super) struct Fid {
    pub(super) node: Arc<Node>,
    pub(super) user: u32,
    pub(super) state: State,
}

/// What it is for.
#[derive(Debug)]
pub(super) enum State {
    Closed,
    Open(OpenFile),
    /// The value of an extended attribute, or the names of all, to be read.
    Value(Vec<u8>),
    NewValue(NewValue),
}

/// An extended attribute in the writing. It is set when its fid is clunked.
#[derive(Debug)]
pub(super) struct NewValue {
    name: CString,
    len: usize,
    flags: u32,
    value: Vec<u8>,
}

impl NewValue {
    /// One of `len` bytes, which the caller has bounded.
    pub(super) fn new(name: CString, len: usize, flags: u32) -> Self {
        Self {
            name,
            len,
            flags,
            value: Vec::new(),
        }
    }

    /// Appends the next piece of it.
    pub(super) fn write(&mut self, offset: u64, data: &mut Readable<'_>) -> io::Result<usize> {
        let end = self.value.len();
        if offset != end as u64 || data.len() > self.len - end {
            return Err(Errno::INVAL.into());
        }
        let count = data.len();
        self.value.resize(end + count, 0);
        data.read(&mut self.value[end..]);
        Ok(count)
    }

    /// 9P has no request to remove an attribute: Linux replaces it by nothing. An ACL of no bytes is none either.
    fn removes(&self) -> bool {
        let replaces = self.flags == libc::XATTR_REPLACE.cast_unsigned();
        self.len == 0 && (replaces || self.name.to_bytes().starts_with(b"system.posix_acl_"))
    }

    /// Sets it. The user is the server, whatever the fid's: where a change of an ACL takes the setgid bit away, Linux's client does
    /// it by a request of its own.
    pub(super) fn set(self, node: &Node) -> io::Result<()> {
        if self.value.len() != self.len {
            return Err(Errno::INVAL.into());
        }
        let (share, number) = (&node.share, node.number);
        if self.removes() {
            return share.removexattr(&SERVER, number, &self.name);
        }
        share.setxattr(&SERVER, number, &self.name, &self.value, self.flags)
    }
}
