//! FUSE requests, through the file system device. An input names nodes and open files by their position among those that
//! answers told of, as their numbers are random.
#![no_main]

use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn};
use fuse_backend_rs::api::filesystem::{FsOptions, ROOT_ID};
use husk_vmm::config::CachePolicy;
use husk_vmm::devices::fs::{FsDevice, HIPRIO_QUEUE, REQUEST_QUEUE, Share, Tag};
use husk_vmm::virtio::testing::Driver;
use husk_vmm::virtio::{SharedMemory, VirtioDevice};
use husk_vmm_fuzz::{Folder, Record, records};
use libfuzzer_sys::fuzz_target;
use vm_memory::{ByteValued, GuestAddress};

const INIT: u32 = 26;

/// Requests with a node at the beginning of their body: RENAME, LINK, RENAME2.
const NODES: [u32; 3] = [12, 13, 45];

/// Requests with an open file there, or eight bytes after: READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, READDIR, RELEASEDIR,
/// FSYNCDIR, FALLOCATE, READDIRPLUS, LSEEK, COPY_FILE_RANGE; GETATTR, SETATTR, STATX.
const FILES: [u32; 12] = [15, 16, 18, 20, 25, 28, 29, 30, 43, 44, 46, 47];
const FILES_AT_8: [u32; 3] = [3, 4, 52];

/// Requests answered with a node: LOOKUP, SYMLINK, MKNOD, MKDIR, LINK, CREATE, TMPFILE.
const TELL_NODE: [u32; 7] = [1, 6, 8, 9, 13, 35, 51];

/// FORGET, INTERRUPT, BATCH_FORGET.
const SILENT: [u32; 3] = [2, 36, 42];

/// Room for four mappings.
const WINDOW: u64 = 4 * SharedMemory::UNIT;

const OUT_HEADER: usize = 16;
const ENTRY: usize = 128;

struct Guest {
    driver: Driver,
    nodes: Vec<u64>,
    files: Vec<u64>,
}

impl Guest {
    fn ask(&mut self, opcode: u32, nodeid: u64, body: &[u8], room: usize) {
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).expect("it is short"),
            opcode,
            unique: 1,
            nodeid,
            ..InHeader::default()
        };
        let request = [header.as_slice(), body];
        if SILENT.contains(&opcode) {
            self.driver.request(HIPRIO_QUEUE, &request, &[]);
            return;
        }
        let used = self
            .driver
            .request(REQUEST_QUEUE, &request, &[OUT_HEADER, room]);
        let answer = used.bytes;
        let word = |at: usize| {
            let bytes = answer.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        if answer.get(4..8) != Some(&[0; 4]) {
            return;
        }
        let tells_node = TELL_NODE.contains(&opcode);
        if tells_node {
            self.nodes.extend(word(OUT_HEADER));
        }
        match opcode {
            // OPEN, OPENDIR; CREATE, TMPFILE.
            14 | 27 => self.files.extend(word(OUT_HEADER)),
            35 | 51 => self.files.extend(word(OUT_HEADER + ENTRY)),
            _ => {}
        }
    }

    fn send(&mut self, record: Record<'_>) {
        let opcode = u32::from(record.kind);
        let node = *self
            .nodes
            .get(usize::from(record.to))
            .unwrap_or(&record.to.into());
        let mut body = record.body.to_vec();
        let mut put = |numbers: &[u64], at: usize| {
            let position = body.get(at).copied().map(usize::from);
            if let Some(number) = position.and_then(|position| numbers.get(position))
                && let Some(place) = body.get_mut(at..at + 8)
            {
                place.copy_from_slice(&number.to_le_bytes());
            }
        };
        if NODES.contains(&opcode) {
            put(&self.nodes, 0);
        } else if FILES.contains(&opcode) {
            put(&self.files, 0);
        } else if FILES_AT_8.contains(&opcode) {
            put(&self.files, 8);
        }
        // COPY_FILE_RANGE: the other node and its file.
        if opcode == 47 {
            put(&self.nodes, 16);
            put(&self.files, 24);
        }
        self.ask(opcode, node, &body, record.room);
    }
}

fuzz_target!(|data: &[u8]| {
    let folder = Folder::new();
    let mut share = Share::new(&folder.shared(), CachePolicy::Auto, true).expect("a shared folder");
    let window = SharedMemory::new(GuestAddress(1 << 36), WINDOW).expect("a window");
    share.set_window(Arc::new(window)).expect("a window");
    let tag = Tag::try_from("fuzz".to_owned()).expect("a tag");
    let mut device = FsDevice::new(tag, share, 1, |_| Ok(())).expect("a device");
    let mut guest = Guest {
        driver: Driver::activate(&mut device),
        nodes: vec![0, ROOT_ID],
        files: Vec::new(),
    };
    let init = InitIn {
        major: 7,
        minor: 38,
        max_readahead: 0,
        flags: u32::try_from(FsOptions::all().bits() & 0x3fff_ffff).expect("it was masked"),
    };
    guest.ask(INIT, 0, init.as_slice(), 256);
    for record in records(data) {
        guest.send(record);
    }
    device.reset();
    folder.check();
});
