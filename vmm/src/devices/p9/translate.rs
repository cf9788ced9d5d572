//! Flags, attributes and types of files: from 9P2000.L to what the share takes, and back.

use std::io;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Entry, SetattrValid};
use rustix::io::Errno;

use super::message::Attributes;
use crate::config::CachePolicy;

/// The type of a file as qids have it.
pub(super) fn qid_kind(mode: u32) -> u8 {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => 0x80,
        libc::S_IFLNK => 0x02,
        _ => 0,
    }
}

/// A number that changes with the content. Never zero: Linux keeps no pages of files that have no version.
///
/// Where nobody else changes files it stays the same: a client that keeps all that it knows takes a file of another version
/// for another file, and so would keep the content twice of one that has two names.
pub(super) fn version_of(stat: &stat64, cache: CachePolicy) -> u32 {
    if cache == CachePolicy::Always {
        return 1;
    }
    let time = stat
        .st_mtime
        .wrapping_mul(1_000_000_000)
        .wrapping_add(stat.st_mtime_nsec);
    let mixed = (time ^ stat.st_size.rotate_left(40)).cast_unsigned();
    let folded = (mixed ^ mixed >> 32) & u64::from(u32::MAX);
    u32::try_from(folded).expect("it was masked").max(1)
}

/// What the host is asked for when the guest opens a file with these flags of 9P2000.L, which are the same on every kind
/// of machine.
///
/// Not O_APPEND: a write of the guest's carries the place that its kernel has found, and one that comes again, from a
/// page that has changed, is not to be appended again. Not O_DIRECT and O_NONBLOCK, which the guest means for itself, and
/// not O_CREAT, which is a request of its own.
pub(super) fn open_flags(flags: u32) -> u32 {
    const FLAGS: [(u32, i32); 6] = [
        (0o200, libc::O_EXCL),
        (0o1000, libc::O_TRUNC),
        (0o10000, libc::O_DSYNC),
        (0o200_000, libc::O_DIRECTORY),
        (0o1_000_000, libc::O_NOATIME),
        (0o4_000_000, libc::O_SYNC),
    ];
    let access = flags & libc::O_ACCMODE.cast_unsigned();
    FLAGS
        .into_iter()
        .filter(|(theirs, _)| flags & theirs != 0)
        .fold(access, |all, (_, ours)| all | ours.cast_unsigned())
}

/// What Tsetattr asks for as FUSE has it.
pub(super) fn to_fuse(attributes: Attributes) -> io::Result<(stat64, SetattrValid)> {
    /// The bits of Tsetattr, and those of FUSE. A time without "set" is now.
    const ACCESSED: u32 = 0x10;
    const MODIFIED: u32 = 0x20;
    const ACCESSED_SET: u32 = 0x80;
    const MODIFIED_SET: u32 = 0x100;
    let has = |bit| attributes.valid & bit != 0;
    let wanted = [
        (has(0x1), SetattrValid::MODE),
        (has(0x2), SetattrValid::UID),
        (has(0x4), SetattrValid::GID),
        (has(0x8), SetattrValid::SIZE),
        (has(ACCESSED), SetattrValid::ATIME),
        (has(MODIFIED), SetattrValid::MTIME),
        (has(ACCESSED) && !has(ACCESSED_SET), SetattrValid::ATIME_NOW),
        (has(MODIFIED) && !has(MODIFIED_SET), SetattrValid::MTIME_NOW),
    ];
    let valid = wanted
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(SetattrValid::empty(), |all, (_, bit)| all | bit);

    let mut attr = Entry::default().attr;
    attr.st_mode = attributes.mode & 0o7777;
    attr.st_uid = attributes.uid;
    attr.st_gid = attributes.gid;
    attr.st_size = i64::try_from(attributes.size).or(Err(Errno::INVAL))?;
    (attr.st_atime, attr.st_atime_nsec) = time(attributes.accessed)?;
    (attr.st_mtime, attr.st_mtime_nsec) = time(attributes.modified)?;
    Ok((attr, valid))
}

/// Seconds may be before 1970. Nanoseconds beyond a second would have a meaning of their own to utimensat(2).
fn time((seconds, nanoseconds): (u64, u64)) -> io::Result<(i64, i64)> {
    match i64::try_from(nanoseconds) {
        Ok(nanoseconds @ 0..1_000_000_000) => Ok((seconds.cast_signed(), nanoseconds)),
        _ => Err(Errno::INVAL.into()),
    }
}
