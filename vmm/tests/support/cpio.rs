//! Writes a cpio archive as the kernel's initramfs wants it ("newc"; Documentation/driver-api/early-userspace).

/// An archive that grows.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    pub(crate) fn folder(&mut self, name: &str) {
        self.entry(name, FOLDER, (0, 0), b"");
    }

    pub(crate) fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, PROGRAM, (0, 0), content);
    }

    /// The device that the kernel opens for the first process's standard streams.
    pub(crate) fn console(&mut self, name: &str) {
        self.entry(name, CHARACTER_DEVICE, (5, 1), b"");
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let len = u32::try_from(content.len()).unwrap();
        let name_len = u32::try_from(name.len() + 1).unwrap();
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            len,
            0,
            0,
            major,
            minor,
            name_len,
            0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}
