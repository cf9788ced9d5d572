//! What plays a guest with a FUSE client, for the fuzz target, which repeats inputs, and for who records them.
//!
//! The numbers of nodes and of open files are random. So an input names them by their position among those that answers told
//! of: a request's `to`, and in its body the first byte of where a number has its place.

use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn};
use fuse_backend_rs::api::filesystem::{FsOptions, ROOT_ID};
use husk_vmm::config::{CachePolicy, NoticeGids, WatchConfig};
use husk_vmm::devices::fs::{FsDevice, HIPRIO_QUEUE, REQUEST_QUEUE, Share, Tag};
use husk_vmm::virtio::testing::Driver;
use husk_vmm::virtio::{SharedMemory, VirtioDevice};
use vm_memory::{ByteValued, GuestAddress};

use crate::{Folder, Record};

/// Not a request: those that follow are by root with the group `to`, as those of notices are ([`NoticeGids::EXAMPLE`]).
const GROUP: u8 = 255;

/// Not a request: the host changes something ([`Folder::change`]).
const HOST: u8 = 254;

/// What the guest is told of the changes of: the folder, and not the file beside it.
const WATCHED: &str = "dir";

/// Room for four mappings.
const WINDOW: u64 = 4 * SharedMemory::UNIT;

const OUT_HEADER: usize = 16;
const ENTRY: usize = 128;
const DIRENT: usize = 24;

const BATCH_FORGET: u32 = 42;
const INIT: u32 = 26;
const READDIRPLUS: u32 = 44;

/// FORGET, INTERRUPT, BATCH_FORGET.
const SILENT: [u32; 3] = [2, 36, BATCH_FORGET];

#[derive(Debug, Clone, Copy)]
enum Number {
    Node,
    File,
}

/// Where the body of a request has the numbers of nodes and of open files.
fn places(opcode: u32, body: &[u8]) -> Vec<(usize, Number)> {
    use Number::{File, Node};
    match opcode {
        // RENAME, LINK, RENAME2.
        12 | 13 | 45 => vec![(0, Node)],
        // READ, WRITE, RELEASE, FSYNC, FLUSH, READDIR, RELEASEDIR, FSYNCDIR, FALLOCATE, READDIRPLUS, LSEEK.
        15 | 16 | 18 | 20 | 25 | 28 | 29 | 30 | 43 | READDIRPLUS | 46 => vec![(0, File)],
        // GETATTR, SETATTR, STATX.
        3 | 4 | 52 => vec![(8, File)],
        // COPY_FILE_RANGE: and the other node and its file.
        47 => vec![(0, File), (16, Node), (24, File)],
        BATCH_FORGET => (8..body.len()).step_by(16).map(|at| (at, Node)).collect(),
        _ => Vec::new(),
    }
}

/// The number at a place in a message.
fn number_at(message: &[u8], at: usize) -> Option<u64> {
    let bytes = message.get(at..at + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// The nodes in an answer to READDIRPLUS.
fn listed(answer: &[u8]) -> Vec<u64> {
    let mut nodes = Vec::new();
    let mut at = OUT_HEADER;
    while let Some(node) = number_at(answer, at)
        && let Some(len) = answer.get(at + ENTRY + 16..at + ENTRY + 20)
    {
        nodes.extend(Some(node).filter(|node| *node != 0));
        let name = u32::from_le_bytes(len.try_into().expect("four bytes"));
        at += ENTRY + (DIRENT + name as usize).next_multiple_of(8);
    }
    nodes
}

/// Room for the answer to a real request: what it asks for, or enough.
fn room_for(opcode: u32, body: &[u8]) -> usize {
    let size_at = match opcode {
        // READ, READDIR, READDIRPLUS.
        15 | 28 | READDIRPLUS => 16,
        // GETXATTR, LISTXATTR.
        22 | 23 => 0,
        // READLINK.
        5 => return 4096,
        _ => return 512,
    };
    let size = body.get(size_at..size_at + 4).map_or(0, |size| {
        u32::from_le_bytes(size.try_into().expect("four bytes"))
    });
    (size as usize).clamp(64, 0xf000)
}

/// A guest that has a [`Folder`], and the device by which it has it.
#[derive(Debug)]
pub struct Guest {
    folder: Folder,
    device: FsDevice,
    driver: Driver,
    nodes: Vec<u64>,
    files: Vec<u64>,
    gid: u32,
}

impl Guest {
    /// One that has sent nothing yet.
    ///
    /// # Panics
    /// When the device cannot be made.
    pub fn new() -> Self {
        let folder = Folder::new();
        let mut share =
            Share::new(&folder.shared(), CachePolicy::Auto, true).expect("a shared folder");
        let window = SharedMemory::new(GuestAddress(1 << 36), WINDOW).expect("a window");
        share.set_window(Arc::new(window)).expect("a window");
        let watch = WatchConfig {
            prefix: WATCHED.to_owned(),
            gids: NoticeGids::EXAMPLE,
        };
        share.take_notices(watch).expect("an eventfd");
        let tag = Tag::try_from("fuzz".to_owned()).expect("a tag");
        let mut device = FsDevice::new(tag, share, 1, |_| Ok(())).expect("a device");
        Self {
            folder,
            driver: Driver::activate(&mut device),
            device,
            nodes: vec![0, ROOT_ID],
            files: Vec::new(),
            gid: 0,
        }
    }

    /// Agrees on the protocol, with all abilities.
    pub fn init(&mut self) {
        let init = InitIn {
            major: 7,
            minor: 38,
            max_readahead: 0,
            flags: u32::try_from(FsOptions::all().bits() & 0x3fff_ffff).expect("it was masked"),
        };
        let header = InHeader {
            opcode: INIT,
            ..InHeader::default()
        };
        self.ask(header, init.as_slice(), 256);
    }

    /// Sends a request, or does what else the record stands for.
    pub fn play(&mut self, record: Record<'_>) {
        match record.kind {
            GROUP => self.gid = record.to.into(),
            HOST => drop(self.folder.change(record.to)),
            _ => {
                let opcode = record.kind.into();
                let mut body = record.body.to_vec();
                for (at, kind) in places(opcode, &body) {
                    let position = body.get(at).copied().map(usize::from);
                    let number = position.and_then(|position| self.known(kind).get(position));
                    if let Some(number) = number
                        && let Some(place) = body.get_mut(at..at + 8)
                    {
                        place.copy_from_slice(&number.to_le_bytes());
                    }
                }
                let node = self.nodes.get(usize::from(record.to));
                let header = InHeader {
                    opcode,
                    nodeid: *node.unwrap_or(&record.to.into()),
                    gid: self.gid,
                    ..InHeader::default()
                };
                self.ask(header, &body, record.room);
            }
        }
    }

    /// Sends a request as a real client has made it. Returns the answer, empty where there is none, and the records for which
    /// [`Self::play`] does the same.
    ///
    /// # Panics
    /// When an input cannot have such a request.
    pub fn pass_on(&mut self, header: InHeader, body: &[u8]) -> (Vec<u8>, Vec<Vec<u8>>) {
        let mut records = Vec::new();
        let mut record = |kind, to, room, body: &[u8]| {
            let record = Record {
                kind,
                to,
                room,
                body,
            };
            records.push(record.to_bytes());
        };
        let room = room_for(header.opcode, body);
        if header.opcode != INIT {
            // Whoever repeats it may not become another user.
            let gid = if header.uid == 0 { header.gid } else { 0 };
            if gid != self.gid {
                self.gid = gid;
                let group = u8::try_from(gid).expect("a group of notices");
                record(GROUP, group, 0, &[]);
            }
            let mut named = body.to_vec();
            for (at, kind) in places(header.opcode, body) {
                let number = number_at(body, at);
                let position = number.and_then(|number| position(self.known(kind), number));
                if let Some(position) = position
                    && let Some(place) = named.get_mut(at..at + 8)
                {
                    place.copy_from_slice(&u64::from(position).to_le_bytes());
                }
            }
            let node = position(&self.nodes, header.nodeid).expect("a node that it was told of");
            let opcode = u8::try_from(header.opcode).expect("there are no more");
            record(opcode, node, room, &named);
        }
        (self.ask(header, body, room), records)
    }

    /// The host changes something. Returns the record that says so.
    ///
    /// # Errors
    /// When it cannot be done.
    pub fn change(&mut self, what: u8) -> std::io::Result<Vec<u8>> {
        self.folder.change(what)?;
        let record = Record {
            kind: HOST,
            to: what,
            room: 0,
            body: &[],
        };
        Ok(record.to_bytes())
    }

    /// Resets the device, and looks what has become of the host.
    pub fn end(mut self) {
        self.device.reset();
        self.folder.check();
    }

    fn known(&self, number: Number) -> &[u64] {
        match number {
            Number::Node => &self.nodes,
            Number::File => &self.files,
        }
    }

    /// Sends a request, with room for `room` bytes behind the header of the answer.
    fn ask(&mut self, header: InHeader, body: &[u8], room: usize) -> Vec<u8> {
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).expect("it is short"),
            ..header
        };
        let request = [header.as_slice(), body];
        if SILENT.contains(&header.opcode) {
            self.driver.request(HIPRIO_QUEUE, &request, &[]);
            return Vec::new();
        }
        let rooms = [OUT_HEADER, room];
        let answer = self.driver.request(REQUEST_QUEUE, &request, &rooms).bytes;
        if answer.get(4..8) == Some(&[0; 4]) {
            self.learn(header.opcode, &answer);
        }
        answer
    }

    /// Takes from an answer what it tells of.
    fn learn(&mut self, opcode: u32, answer: &[u8]) {
        let first = number_at(answer, OUT_HEADER);
        match opcode {
            // LOOKUP, SYMLINK, MKNOD, MKDIR, LINK.
            1 | 6 | 8 | 9 | 13 => self.nodes.extend(first),
            // OPEN, OPENDIR.
            14 | 27 => self.files.extend(first),
            // CREATE, TMPFILE.
            35 | 51 => {
                self.nodes.extend(first);
                self.files.extend(number_at(answer, OUT_HEADER + ENTRY));
            }
            READDIRPLUS => self.nodes.extend(listed(answer)),
            _ => {}
        }
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a number stands among the first that an input can name. The last place, since a number may be told again.
fn position(known: &[u64], number: u64) -> Option<u8> {
    let position = known.iter().rposition(|known| *known == number)?;
    u8::try_from(position).ok()
}
