//! Whether the guest's kernel and initramfs are there, and are what they should be.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::report::Problem;

const MAKE_KERNEL: &str = "Install the package's guest kernel, or build one with ci/guest; vm.kernel in husk.toml says where it is.";
const MAKE_INITRAMFS: &str = "Install the package's initramfs, or build one with ci/guest; vm.initramfs in husk.toml says where it is.";

/// Where the kinds of kernel show what they are: the boot protocol's header of a bzImage ends before this.
const KERNEL_HEAD: usize = 0x240;

pub(super) fn check_kernel(path: &Path) -> Result<String, Problem> {
    let problem = |what: String| Problem::new(format!("{}: {what}", path.display()), MAKE_KERNEL);
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(KERNEL_HEAD as u64).read_to_end(&mut head))
        .map_err(|err| problem(err.to_string()))?;
    match kernel_format(&head) {
        Ok(format) => Ok(format!("{}, {format}", path.display())),
        Err(what) => Err(problem(what.to_owned())),
    }
}

/// The format of the kernel that begins with `head`.
fn kernel_format(head: &[u8]) -> Result<&'static str, &'static str> {
    // Linux, Documentation/arch/x86/boot.rst: the real-mode kernel header.
    const SIGNATURE: usize = 0x202;
    const VERSION: usize = 0x206;
    const XLOADFLAGS: usize = 0x236;
    const XLF_KERNEL_64: u16 = 1;

    let bytes = |at: usize, len: usize| head.get(at..at + len);
    let u16_at = |at: usize| {
        bytes(at, 2)
            .and_then(|b| b.try_into().ok())
            .map(u16::from_le_bytes)
    };
    if bytes(0, 4) == Some(b"\x7fELF") {
        const CLASS_64: u8 = 2;
        const MACHINE_X86_64: u16 = 62;
        return if head.get(4) == Some(&CLASS_64) && u16_at(18) == Some(MACHINE_X86_64) {
            Ok("ELF")
        } else {
            Err("is ELF, but not for x86_64")
        };
    }
    if bytes(SIGNATURE, 4) == Some(b"HdrS") {
        // The field came with version 2.12 of the protocol.
        let has_64_bit_entry = u16_at(VERSION).is_some_and(|version| version >= 0x020c)
            && u16_at(XLOADFLAGS).is_some_and(|flags| flags & XLF_KERNEL_64 != 0);
        return if has_64_bit_entry {
            Ok("bzImage")
        } else {
            Err("is a bzImage without a 64-bit entry point")
        };
    }
    Err("is neither an ELF vmlinux nor a bzImage")
}

pub(super) fn check_initramfs(path: &Path) -> Result<String, Problem> {
    let problem =
        |what: String| Problem::new(format!("{}: {what}", path.display()), MAKE_INITRAMFS);
    let file = File::open(path).map_err(|err| problem(err.to_string()))?;
    match find_init(&mut BufReader::new(file)) {
        Ok(Some(size)) => Ok(format!(
            "{}, a cpio archive with an /init of {size} bytes",
            path.display()
        )),
        Ok(None) => Err(problem("has no executable /init".to_owned())),
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
            Err(problem("is cut short".to_owned()))
        }
        Err(err) => Err(problem(err.to_string())),
    }
}

/// The size of the executable file `init` in a cpio archive of the "new" format (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn find_init(archive: &mut (impl Read + Seek)) -> io::Result<Option<u32>> {
    const HEADER_LEN: usize = 110;
    const PATH_MAX: usize = 4096;
    const IS_FILE_WITH_EXECUTE_BIT: (u32, u32) = (0o170_000, 0o111);

    let not_cpio = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    loop {
        let mut header = [0; HEADER_LEN];
        archive.read_exact(&mut header)?;
        if !matches!(&header[..6], b"070701" | b"070702") {
            return Err(not_cpio("is not an uncompressed cpio archive (newc)"));
        }
        // Thirteen numbers of eight hexadecimal digits.
        let number = |index: usize| {
            let digits = &header[6 + 8 * index..][..8];
            std::str::from_utf8(digits)
                .ok()
                .and_then(|text| u32::from_str_radix(text, 16).ok())
                .ok_or_else(|| not_cpio("is a broken cpio archive: a number is none"))
        };
        let (mode, file_size, name_size) = (number(1)?, number(6)?, number(11)?);
        let name_len = usize::try_from(name_size)
            .ok()
            .filter(|len| (1..=PATH_MAX).contains(len))
            .ok_or_else(|| not_cpio("is a broken cpio archive: a name is too long"))?;
        let mut name = vec![0; name_len];
        archive.read_exact(&mut name)?;
        match name.strip_suffix(b"\0") {
            Some(b"init") => {
                let (kind, execute) = IS_FILE_WITH_EXECUTE_BIT;
                let fits = mode & kind == 0o100_000 && mode & execute != 0 && file_size > 0;
                return Ok(fits.then_some(file_size));
            }
            Some(b"TRAILER!!!") => return Ok(None),
            Some(_) => {}
            None => return Err(not_cpio("is a broken cpio archive: a name does not end")),
        }
        // Header with name, and file, are each padded to four bytes.
        let padding = |len: u64| len.next_multiple_of(4) - len;
        let skip = padding(HEADER_LEN as u64 + u64::from(name_size))
            + u64::from(file_size)
            + padding(file_size.into());
        archive.seek(SeekFrom::Current(i64::try_from(skip).expect("below 2^33")))?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn entry(name: &str, mode: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{name}\0",
            1,
            0,
            0,
            1,
            0,
            data.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0
        )
        .into_bytes();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn trailer() -> Vec<u8> {
        entry("TRAILER!!!", 0, b"")
    }

    fn look(archive: Vec<u8>) -> Result<Option<u32>, io::ErrorKind> {
        find_init(&mut Cursor::new(archive)).map_err(|err| err.kind())
    }

    #[test]
    fn init_is_found_after_other_entries() {
        let archive = [
            entry("dev", 0o040_755, b""),
            entry("odd", 0o100_644, b"12345"),
            entry("init", 0o100_755, b"#!/bin/sh"),
            trailer(),
        ];
        assert_eq!(look(archive.concat()), Ok(Some(9)));
    }

    #[test]
    fn archive_without_init_has_none() {
        assert_eq!(
            look([entry("dev", 0o040_755, b""), trailer()].concat()),
            Ok(None)
        );
    }

    #[test]
    fn init_that_cannot_be_run_is_none() {
        for (mode, data) in [(0o100_644, "x"), (0o040_755, "x"), (0o100_755, "")] {
            let archive = [entry("init", mode, data.as_bytes()), trailer()].concat();
            assert_eq!(look(archive), Ok(None), "{mode:o}");
        }
    }

    #[test]
    fn archive_that_is_cut_short_is_an_error() {
        assert_eq!(
            look(entry("dev", 0o040_755, b"")),
            Err(io::ErrorKind::UnexpectedEof)
        );
    }

    #[test]
    fn compressed_archive_is_an_error() {
        assert_eq!(look(vec![0x1f; 200]), Err(io::ErrorKind::InvalidData));
    }

    #[test]
    fn broken_numbers_are_an_error() {
        let mut archive = entry("init", 0o100_755, b"x");
        archive[54..62].copy_from_slice(b"00000zzz");
        assert_eq!(look(archive), Err(io::ErrorKind::InvalidData));
        let mut archive = entry("init", 0o100_755, b"x");
        archive[94..102].copy_from_slice(b"ffffffff");
        assert_eq!(look(archive), Err(io::ErrorKind::InvalidData));
    }

    fn elf(class: u8, machine: u16) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..4].copy_from_slice(b"\x7fELF");
        head[4] = class;
        head[18..20].copy_from_slice(&machine.to_le_bytes());
        head
    }

    fn bz_image(version: u16, xloadflags: u16) -> Vec<u8> {
        let mut head = vec![0; KERNEL_HEAD];
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        head[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        head
    }

    #[test]
    fn kernels_for_x86_64_are_known() {
        assert_eq!(kernel_format(&elf(2, 62)), Ok("ELF"));
        assert_eq!(kernel_format(&bz_image(0x020f, 0x3f)), Ok("bzImage"));
    }

    #[test]
    fn other_kernels_are_refused() {
        assert!(kernel_format(&elf(1, 3)).is_err());
        assert!(kernel_format(&elf(2, 183)).is_err());
        assert!(kernel_format(&bz_image(0x020f, 0)).is_err());
        assert!(kernel_format(&bz_image(0x0200, 1)).is_err());
        assert!(kernel_format(b"\x7fELF").is_err());
        assert!(kernel_format(b"").is_err());
        assert!(kernel_format(&[0; KERNEL_HEAD]).is_err());
    }

    #[test]
    fn missing_file_is_named_with_what_to_do() {
        let problem = check_kernel(Path::new("/does/not/exist")).unwrap_err();
        assert!(problem.what.starts_with("/does/not/exist: "));
        assert!(problem.remedy.contains("vm.kernel"));
        let problem = check_initramfs(Path::new("/does/not/exist")).unwrap_err();
        assert!(problem.remedy.contains("vm.initramfs"));
    }
}
