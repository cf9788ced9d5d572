//! What the fuzz targets share, and who records their seeds: how an input stands for what a guest sends, and what must hold
//! after it.

pub mod fuse;
pub mod p9;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use tempfile::TempDir;

/// Most requests that are taken from one input.
pub const MAX_RECORDS: usize = 256;

/// One request of an input.
#[derive(Debug, Clone, Copy)]
pub struct Record<'d> {
    /// What is asked for: an opcode of FUSE, a message type of 9P, a request type of virtio-blk.
    pub kind: u8,
    /// Whom it is about, in a way that each target has of its own.
    pub to: u8,
    /// Bytes that the answer has room for.
    pub room: usize,
    /// What follows the request's header.
    pub body: &'d [u8],
}

/// The requests of an input: kind and `to`, a byte each; room and length of the body, 16 bits each, little-endian; the body.
pub fn records(mut data: &[u8]) -> Vec<Record<'_>> {
    let mut records = Vec::new();
    while let &[kind, to, a, b, c, d, ref rest @ ..] = data
        && records.len() < MAX_RECORDS
    {
        let len = usize::from(u16::from_le_bytes([c, d])).min(rest.len());
        let (body, rest) = rest.split_at(len);
        records.push(Record {
            kind,
            to,
            room: u16::from_le_bytes([a, b]).into(),
            body,
        });
        data = rest;
    }
    records
}

impl Record<'_> {
    /// As bytes of an input.
    ///
    /// # Panics
    /// When the body is longer than an input can say.
    pub fn to_bytes(self) -> Vec<u8> {
        let word = |len: usize| u16::try_from(len).expect("of 16 bits").to_le_bytes();
        let header = [self.kind, self.to];
        let (room, len) = (word(self.room), word(self.body.len()));
        [&header[..], &room, &len, self.body].concat()
    }
}

/// A folder to share, beside something that must stay as it is.
#[derive(Debug)]
pub struct Folder {
    outer: TempDir,
    /// What is first the folder `dir` in it.
    dir: File,
}

const SECRET: &str = "not shared";

impl Folder {
    /// With a file, a folder with a file, and a symbolic link that leads out of it.
    pub fn new() -> Self {
        let outer = TempDir::new().expect("a temporary folder");
        let dir = outer.path().join("shared/dir");
        fs::create_dir_all(&dir).expect("folders");
        let dir = File::open(dir).expect("it was made");
        let folder = Self { outer, dir };
        fs::write(folder.shared().join("file"), "content").expect("a file");
        fs::write(folder.shared().join("dir/inner"), "").expect("a file");
        fs::write(folder.secret(), SECRET).expect("a file");
        std::os::unix::fs::symlink("../secret", folder.shared().join("link")).expect("a link");
        folder
    }

    /// What is shared.
    pub fn shared(&self) -> PathBuf {
        self.outer.path().join("shared")
    }

    /// What somebody else on the host does in what was first the folder `dir`, of a few things.
    ///
    /// # Errors
    /// When it cannot be done, as the guest has done something else.
    pub fn change(&self, what: u8) -> io::Result<()> {
        // One name below the folder, wherever that is by now, and no link is followed: it changes nothing outside.
        let dir = PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd()));
        let at = |name| dir.join(name);
        match what % 10 {
            0 => OpenOptions::new()
                .write(true)
                .create(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(at("inner"))?
                .write_all(b"changed"),
            1 => fs::remove_file(at("inner")),
            2 => fs::rename(at("inner"), at("moved")),
            3 => fs::rename(at("moved"), at("inner")),
            4 => fs::create_dir(at("sub")),
            5 => fs::remove_dir(at("sub")),
            6 => fs::rename(at("sub"), at("moved")),
            7 => fs::rename(at("moved"), at("sub")),
            8 => std::os::unix::fs::symlink("inner", at("link")),
            _ => fs::remove_file(at("link")),
        }
    }

    fn secret(&self) -> PathBuf {
        self.outer.path().join("secret")
    }

    /// That nothing outside of the shared folder has changed.
    pub fn check(&self) {
        let names = fs::read_dir(self.outer.path()).expect("the folder is there");
        assert_eq!(names.count(), 2, "a file was made outside");
        let secret = fs::read_to_string(self.secret()).expect("it is there");
        assert_eq!(secret, SECRET);
    }
}

impl Default for Folder {
    fn default() -> Self {
        Self::new()
    }
}
