//! What the fuzz targets share: how an input stands for what a guest sends, and what must hold after it.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

/// Most requests that are taken from one input.
const MAX_RECORDS: usize = 64;

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

/// A folder to share, beside something that must stay as it is.
#[derive(Debug)]
pub struct Folder {
    outer: TempDir,
}

const SECRET: &str = "not shared";

impl Folder {
    /// With a file, a folder with a file, and a symbolic link that leads out of it.
    pub fn new() -> Self {
        let folder = Self {
            outer: TempDir::new().expect("a temporary folder"),
        };
        fs::create_dir_all(folder.shared().join("dir")).expect("folders");
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
