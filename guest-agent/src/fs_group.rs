//! Kubernetes' `fsGroup`: the files of a volume are given to a group that may do with them what their owner may. What kubelet does to
//! a volume that is mounted on the host is done here to one that only the guest mounts.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use husk_protocol::agent::FsGroup;
use walkdir::WalkDir;

/// What the group may do with a file, and besides with a folder, in which new files are the group's, too.
const FILE: u32 = 0o660;
const FOLDER: u32 = 0o2770;

/// Gives what is below `root` to `group`. Nobody else may have it mounted. Links are not followed.
pub(crate) fn apply(root: &Path, group: &FsGroup) -> io::Result<()> {
    if group.on_root_mismatch && is_open(&root.metadata()?, group.gid) {
        return Ok(());
    }
    // The root last: it says that all is done.
    for entry in WalkDir::new(root)
        .same_file_system(true)
        .contents_first(true)
    {
        let entry = entry?;
        let found = entry.metadata()?;
        if is_open(&found, group.gid) {
            continue;
        }
        // One that cannot be changed (`chattr +i`) is no reason to give nobody the others.
        if let Err(error) = change(entry.path(), &found, group.gid) {
            tracing::warn!(%error, path = %entry.path().display(), "a file of a volume is not its group's");
        }
    }
    Ok(())
}

fn change(path: &Path, found: &Metadata, gid: u32) -> io::Result<()> {
    // This takes the bits for setuid and setgid away.
    lchown(path, None, Some(gid))?;
    if found.is_symlink() {
        return Ok(());
    }
    let mode = found.mode() & 0o7777 | wanted(found);
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn wanted(found: &Metadata) -> u32 {
    if found.is_dir() { FOLDER } else { FILE }
}

/// Whether there is nothing to be done.
fn is_open(found: &Metadata, gid: u32) -> bool {
    let mode = wanted(found);
    found.gid() == gid && (found.is_symlink() || found.mode() & mode == mode)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// With a group that whoever runs the test may give files to.
    fn group(on_root_mismatch: bool) -> FsGroup {
        FsGroup {
            gid: nix::unistd::getgid().as_raw(),
            on_root_mismatch,
            ..Default::default()
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("it is there").mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("ours");
    }

    #[test]
    fn all_below_the_root_is_open_to_the_group() {
        let outside = tempfile::NamedTempFile::new().expect("a file");
        set_mode(outside.path(), 0o600);
        let root = tempfile::tempdir().expect("a folder");
        set_mode(root.path(), 0o705);
        let folder = root.path().join("folder");
        fs::create_dir(&folder).expect("a folder");
        set_mode(&folder, 0o711);
        let file = folder.join("file");
        fs::write(&file, "").expect("a file");
        let is_root = nix::unistd::geteuid().is_root();
        if is_root {
            lchown(&file, None, Some(group(false).gid + 1)).expect("root");
        }
        set_mode(&file, 0o4701);
        symlink(outside.path(), root.path().join("link")).expect("a link");
        apply(root.path(), &group(false)).expect("ours");
        assert_eq!(
            [mode(root.path()), mode(&folder), mode(&file)],
            [0o2775, 0o2771, 0o4761]
        );
        assert_eq!(mode(outside.path()), 0o600);
        if is_root {
            let found = fs::metadata(&file).expect("it is there");
            assert_eq!(found.gid(), group(false).gid);
        }
    }

    #[test]
    fn root_says_whether_the_others_are_looked_at() {
        let root = tempfile::tempdir().expect("a folder");
        let file = root.path().join("file");
        fs::write(&file, "").expect("a file");
        set_mode(&file, 0o600);
        set_mode(root.path(), 0o2770);
        apply(root.path(), &group(true)).expect("ours");
        assert_eq!(mode(&file), 0o600);
        apply(root.path(), &group(false)).expect("ours");
        assert_eq!(mode(&file), 0o660);
        set_mode(&file, 0o600);
        set_mode(root.path(), 0o770);
        apply(root.path(), &group(true)).expect("ours");
        assert_eq!(mode(&file), 0o660);
    }
}
