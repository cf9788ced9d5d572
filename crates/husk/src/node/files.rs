//! The files that a node has of Husk.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::NamedTempFile;

const PROGRAM: u32 = 0o755;
const DATA: u32 = 0o644;

/// Name in the folder of what was built, folder on a node, permissions. The programs' folder is one of containerd's PATH;
/// the others are the defaults of the configuration.
const FILES: [(&str, &str, u32); 4] = [
    ("vmlinux", GUEST_FOLDER, DATA),
    ("initramfs.cpio", GUEST_FOLDER, DATA),
    ("husk", PROGRAMS_FOLDER, PROGRAM),
    // The last, because containerd can start virtual machines from then on.
    ("containerd-shim-husk-v2", PROGRAMS_FOLDER, PROGRAM),
];
const PROGRAMS_FOLDER: &str = "usr/local/bin";
const GUEST_FOLDER: &str = "usr/share/husk";

/// Copies those that differ.
pub(super) fn install(from: &Path, root: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    // All are read before one is changed.
    let sources = FILES
        .iter()
        .map(|(name, _, _)| {
            let path = from.join(name);
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    for ((name, folder, mode), content) in FILES.iter().zip(sources) {
        let path = root.join(folder).join(name);
        if is(&path, &content, *mode) {
            continue;
        }
        replace(&path, &content, Some(*mode))?;
        writeln!(out, "installed {}", path.display())?;
    }
    Ok(())
}

/// Removes them, and the folder that is Husk's alone.
pub(super) fn uninstall(root: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    for (name, folder, _) in FILES.iter().rev() {
        let path = root.join(folder).join(name);
        match fs::remove_file(&path) {
            Ok(()) => writeln!(out, "removed {}", path.display())?,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => {
                return Err(err).with_context(|| format!("cannot remove {}", path.display()));
            }
        }
    }
    let folder = root.join(GUEST_FOLDER);
    match fs::remove_dir(&folder) {
        // Somebody else's files are in it.
        Err(err) if err.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.with_context(|| format!("cannot remove {}", folder.display())),
    }
}

/// Puts `content` at `path` at once, whatever is there, with the permissions `mode`, or else those that were there.
pub(super) fn replace(path: &Path, content: &[u8], mode: Option<u32>) -> anyhow::Result<()> {
    let write = || -> io::Result<()> {
        let path = resolve(path)?;
        let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(folder)?;
        let mode = match (mode, path.metadata()) {
            (Some(mode), _) => mode,
            (None, Ok(there)) => there.permissions().mode(),
            (None, Err(_)) => DATA,
        };
        let mut file = NamedTempFile::new_in(folder)?;
        file.write_all(content)?;
        file.as_file()
            .set_permissions(Permissions::from_mode(mode))?;
        // A name that leads to half a file after a power cut is worse than no file.
        file.as_file().sync_all()?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Where a configuration is that is kept elsewhere and linked to; renaming onto a link would replace the link.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(path.to_owned()),
        resolved => resolved,
    }
}

fn is(path: &Path, content: &[u8], mode: u32) -> bool {
    let same_mode = path
        .metadata()
        .is_ok_and(|metadata| metadata.permissions().mode() & 0o7777 == mode);
    same_mode && fs::read(path).is_ok_and(|there| there == content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_program_can_be_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sleep");
        fs::copy("/bin/sleep", &path).unwrap();
        let mut running = std::process::Command::new(&path).arg("60").spawn().unwrap();
        let replaced = replace(&path, b"new", None);
        running.kill().unwrap();
        running.wait().unwrap();
        replaced.unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (link, target) = (folder.path().join("link"), folder.path().join("target"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink("target", &link).unwrap();
        replace(&link, b"new", None).unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"new");
    }

    #[test]
    fn files_of_others_keep_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(GUEST_FOLDER);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("vmlinux"), "").unwrap();
        fs::write(folder.join("own-kernel"), "").unwrap();
        uninstall(root.path(), &mut Vec::new()).unwrap();
        assert!(!folder.join("vmlinux").exists());
        assert!(folder.join("own-kernel").exists());
    }
}
