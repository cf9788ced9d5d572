//! What plays a guest with a 9P client, for the fuzz target, which repeats inputs, and for who records them.
//!
//! In an input, `kind` is a message's type and `to` its tag. The client itself chooses the numbers of fids.

use husk_vmm::config::CachePolicy;
use husk_vmm::devices::fs::{Share, Tag};
use husk_vmm::devices::p9::{P9Device, REQUEST_QUEUE};
use husk_vmm::virtio::VirtioDevice;
use husk_vmm::virtio::testing::Driver;

use crate::{Folder, Record};

/// Most bytes of a message.
pub const MSIZE: usize = 8192;

/// Length, type and tag.
pub const HEADER_LEN: usize = 7;

const VERSION: u8 = 100;
const ATTACH: u8 = 104;

/// A guest that has a [`Folder`], and the device by which it has it.
#[derive(Debug)]
pub struct Guest {
    folder: Folder,
    device: P9Device,
    driver: Driver,
}

impl Guest {
    /// One that has sent nothing yet.
    ///
    /// # Panics
    /// When the device cannot be made.
    pub fn new() -> Self {
        let folder = Folder::new();
        let share =
            Share::new(&folder.shared(), CachePolicy::Always, false).expect("a shared folder");
        let tag = Tag::try_from("fuzz".to_owned()).expect("a tag");
        let mut device = P9Device::new(tag, share, |_| Ok(())).expect("a device");
        Self {
            folder,
            driver: Driver::activate(&mut device),
            device,
        }
    }

    /// Agrees on the version, and has fid 0 stand for the root.
    pub fn attach(&mut self) {
        let msize = u32::try_from(MSIZE).expect("it is small").to_le_bytes();
        let version = [&msize[..], b"\x08\09P2000.L"].concat();
        self.send(VERSION, 0, &version, 64);
        // Fid 0, no authentication, no names, user 0.
        let attach = [&[0; 4][..], &[0xff; 4], &[0; 8]].concat();
        self.send(ATTACH, 0, &attach, 64);
    }

    /// Sends the message that a record stands for.
    pub fn play(&mut self, record: Record<'_>) {
        self.send(record.kind, record.to.into(), record.body, record.room);
    }

    /// Sends a message as a real client has made it. Returns the answer, and the record for which [`Self::play`] does the same,
    /// unless [`Self::attach`] has done it.
    ///
    /// # Panics
    /// When an input cannot have such a message.
    pub fn pass_on(&mut self, kind: u8, tag: u16, body: &[u8]) -> (Vec<u8>, Option<Vec<u8>>) {
        let begins = kind == VERSION || kind == ATTACH && body.starts_with(&[0; 4]);
        let record = (!begins).then(|| {
            let record = Record {
                kind,
                to: u8::try_from(tag).expect("few are sent at the same time"),
                room: MSIZE,
                body,
            };
            record.to_bytes()
        });
        (self.send(kind, tag, body, MSIZE), record)
    }

    /// Resets the device, and looks what has become of the host.
    pub fn end(mut self) {
        self.device.reset();
        self.folder.check();
    }

    fn send(&mut self, kind: u8, tag: u16, body: &[u8], room: usize) -> Vec<u8> {
        let len = u32::try_from(HEADER_LEN + body.len()).expect("it is short");
        let header = [&len.to_le_bytes()[..], &[kind], &tag.to_le_bytes()].concat();
        let request = [&header[..], body];
        self.driver.request(REQUEST_QUEUE, &request, &[room]).bytes
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}
