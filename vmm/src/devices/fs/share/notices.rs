//! What the guest's agent does so that the guest's kernel tells its watchers (inotify) what somebody else has changed: it
//! does the same once more, as a user of whom no request changes anything here, and is answered as if it had been
//! done.
//!
//! The kernel raises its events for what it does itself, so a file is made in the guest that the host has made already, a
//! name is removed that is gone, and times are set to what they are. Such a *notice* is known by its group, of which there
//! is one for each kind: root of the guest, with the file system group id that [`NoticeGids`] has for it. Any other process of
//! the guest that takes such a group finds that nothing which it does is done, and deceives its own guest's kernel (see
//! docs/src/security.md); it gets nothing of the host by it that it had not got without, since a notice is served as less
//! than the same request of anybody: see [`may_serve`](Share::may_serve).

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, stat64};
use fuse_backend_rs::api::filesystem::{Context, Entry, ROOT_ID};
use rustix::fs::{OFlags, Statx};
use rustix::io::Errno;

use super::node::{self, stat64_of};
use super::{Opened, Share, check_name};
use crate::config::NoticeGids;

/// FUSE_STATX, which the library does not know.
const STATX: u32 = 52;

/// What a notice is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// A file's content or attributes.
    Changed,
    /// A name that there was not.
    Created,
    /// A name that there is no more, of a folder or of anything else.
    Gone { folder: bool },
    /// A name that is another now, of a folder or of anything else.
    Moved { folder: bool },
}

impl NoticeGids {
    fn kind(&self, uid: u32, gid: u32) -> Option<Notice> {
        let all = [
            (self.changed, Notice::Changed),
            (self.created, Notice::Created),
            (self.gone_file, Notice::Gone { folder: false }),
            (self.gone_folder, Notice::Gone { folder: true }),
            (self.moved_file, Notice::Moved { folder: false }),
            (self.moved_folder, Notice::Moved { folder: true }),
        ];
        let (_, kind) = all.into_iter().find(|&(of, _)| of == gid && uid == 0)?;
        Some(kind)
    }
}

impl Share {
    /// What `ctx` is a notice of, if it is one.
    pub(super) fn notice(&self, ctx: &Context) -> Option<Notice> {
        self.notices?.kind(ctx.uid, ctx.gid)
    }

    /// Whether the request is one that may be served: as a notice, nothing is that would change a file, or give away what is
    /// in one. Those that change something otherwise, and are on this list, ask [`Self::notice`].
    pub(in crate::devices::fs) fn may_serve(&self, header: &InHeader) -> bool {
        const HARMLESS: [Opcode; 19] = [
            Opcode::Lookup,
            Opcode::Forget,
            Opcode::BatchForget,
            Opcode::Getattr,
            Opcode::Setattr,
            Opcode::Readlink,
            Opcode::Symlink,
            Opcode::Mknod,
            Opcode::Mkdir,
            Opcode::Unlink,
            Opcode::Rmdir,
            Opcode::Rename,
            Opcode::Rename2,
            Opcode::Open,
            Opcode::Flush,
            Opcode::Release,
            Opcode::Getxattr,
            Opcode::Access,
            Opcode::Interrupt,
        ];
        self.notice(&Context::from(header)).is_none()
            || header.opcode == STATX
            || HARMLESS
                .iter()
                .any(|&opcode| opcode as u32 == header.opcode)
    }

    /// What a notice finds by `name` in the folder `parent`: what was there before the change of which it is.
    pub(super) fn lookup_for_notice(
        &self,
        notice: Notice,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let folder = match notice {
            // Where something is, or the folder that was there: what has happened in one that is gone is told as well.
            Notice::Changed => {
                return match self.look(parent, name)? {
                    Some(_) => self.walk(parent, name),
                    None => Ok(self.former(parent, name, None, true).ok_or(Errno::NOENT)?),
                };
            }
            // Were it there, the kernel could not make it.
            Notice::Created => return Err(Errno::NOENT.into()),
            Notice::Gone { folder } | Notice::Moved { folder } => folder,
        };
        let now = self.look(parent, name)?;
        match self.former(parent, name, now.as_ref(), folder) {
            Some(former) => Ok(former),
            // Where something has moved to, and nothing was before that the guest knew.
            None if now.is_some() && matches!(notice, Notice::Moved { .. }) => {
                Err(Errno::NOENT.into())
            }
            None => Ok(self.phantom(folder)),
        }
    }

    /// What a notice is told of a file. The kernel may ask for it before it moves or removes what is no longer there.
    pub(super) fn attr_for_notice(&self, notice: Notice, inode: u64) -> io::Result<stat64> {
        match (self.nodes.stat(inode), notice) {
            (Err(_), Notice::Gone { folder } | Notice::Moved { folder }) => {
                let kind = self.nodes.kind(inode);
                Ok(blank(kind.unwrap_or_else(|_| kind_of(folder))))
            }
            (Err(_), _)
                if self
                    .nodes
                    .kind(inode)
                    .is_ok_and(|kind| kind == libc::S_IFDIR) =>
            {
                Ok(blank(libc::S_IFDIR))
            }
            (stat, _) => stat.map(|stat| stat64_of(&stat)),
        }
    }

    /// Answers that `name`, of the type `kind` (S_IFMT), has been made in the folder `parent`: with what the host has made
    /// there, or, if that is gone again, with what there never was.
    pub(super) fn made_for_notice(&self, parent: u64, name: &CStr, kind: u32) -> io::Result<Entry> {
        check_name(name)?;
        if let Ok(made) = self.walk(parent, name) {
            if made.attr.st_mode & libc::S_IFMT == kind {
                return Ok(made);
            }
            self.nodes.forget(made.inode, 1);
        }
        Ok(passing(self.nodes.number(), blank(kind)))
    }

    /// Takes note of what has been moved to `name` in the folder `parent`.
    pub(super) fn moved_for_notice(&self, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        if parent != ROOT_ID
            && let Some(now) = self.look(parent, name)?
        {
            self.nodes.moved(parent, name, &now);
        }
        Ok(())
    }

    /// Opens the node `inode` as if for writing: at its close the kernel says that it has been written to.
    ///
    /// # Errors
    /// EACCES where the kernel might then use the file to write what it has kept of others' writes.
    pub(super) fn open_for_notice(&self, inode: u64) -> io::Result<Opened> {
        if self.writeback.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Errno::ACCESS.into());
        }
        self.open_node(inode, OFlags::RDONLY | OFlags::CLOEXEC, false)
    }

    /// What the host has by that name. Nothing, where the folder is gone.
    fn look(&self, parent: u64, name: &CStr) -> io::Result<Option<Statx>> {
        let found = self
            .nodes
            .descriptor(parent)
            .and_then(|folder| node::stat(&*folder, name));
        match found {
            Ok(stat) => Ok(Some(stat)),
            Err(err) if matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// What the guest knows by that name, and the host no longer has there, with one more reference to it.
    fn former(&self, parent: u64, name: &CStr, now: Option<&Statx>, folder: bool) -> Option<Entry> {
        let former = self.nodes.refer_to_former(parent, name, now, folder)?;
        let stat = former
            .descriptor
            .and_then(|descriptor| node::stat(descriptor, c"").ok());
        let mut attr = stat.map_or_else(|| blank(former.kind), |stat| stat64_of(&stat));
        // The name that the kernel is about to remove.
        attr.st_nlink = attr.st_nlink.max(1);
        Some(passing(former.number, attr))
    }

    /// A file that there never was, for the kernel to remove or move. The guest's references to it count for nothing.
    fn phantom(&self, folder: bool) -> Entry {
        passing(self.nodes.number(), blank(kind_of(folder)))
    }
}

fn kind_of(folder: bool) -> u32 {
    if folder { libc::S_IFDIR } else { libc::S_IFREG }
}

/// An entry that the guest is to ask for again before it uses it.
fn passing(inode: u64, attr: stat64) -> Entry {
    Entry {
        inode,
        attr,
        attr_timeout: Duration::ZERO,
        entry_timeout: Duration::ZERO,
        ..Entry::default()
    }
}

/// The attributes of a file of which nothing is known.
fn blank(kind: u32) -> stat64 {
    let mut attr = Entry::default().attr;
    attr.st_mode = kind;
    attr.st_nlink = 1;
    attr.st_blksize = 4096;
    attr
}
