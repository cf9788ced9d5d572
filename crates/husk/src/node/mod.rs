//! `husk install` and `husk uninstall`: puts Husk on a node, and takes it away again.
//!
//! Both may be run at any time, and again: files are replaced by renaming, so virtual machines that run keep what they
//! run with, and what is as it should be is left alone. Neither restarts containerd, which reads its configuration only
//! at its start: that is for the caller, who knows how the node starts it.

mod containerd;
mod files;

use std::io::Write;
use std::path::Path;

use anyhow::Context;

/// Where containerd's configuration is, below the node's root.
const CONTAINERD_CONFIG: &str = "etc/containerd/config.toml";

/// Copies the programs and the guest's files from the folder `from` to the node whose file system is at `root`, and adds
/// the runtime handler to its containerd's configuration. Says on `out` what it changes.
pub(crate) fn install(from: &Path, root: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    files::install(from, root, out)?;
    edit(root, containerd::register, out)
}

/// Takes the runtime handler out of containerd's configuration, and then removes the files.
///
/// Containers that run are left alone: they need none of the files. Only containerd can no longer delete them, so drain
/// the node first.
pub(crate) fn uninstall(root: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    edit(root, containerd::unregister, out)?;
    files::uninstall(root, out)
}

/// Replaces containerd's configuration by what `change` makes of it, if that is something else.
fn edit(
    root: &Path,
    change: impl Fn(&str) -> Result<String, containerd::Refusal>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let path = root.join(CONTAINERD_CONFIG);
    let before = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(err) => return Err(err).with_context(|| format!("cannot read {}", path.display())),
    };
    let after = change(&before).with_context(|| path.display().to_string())?;
    if after == before {
        return Ok(());
    }
    files::replace(&path, after.as_bytes(), None)?;
    writeln!(out, "changed {}: restart containerd", path.display())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn built() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "containerd-shim-husk-v2",
            "husk",
            "vmlinux",
            "initramfs.cpio",
        ] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        folder
    }

    /// Every file below `root` with its content and mode.
    fn tree(root: &Path) -> BTreeMap<String, (String, u32)> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(root).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(tree(&path));
            } else {
                let mode = path.metadata().unwrap().permissions().mode() & 0o777;
                let text = fs::read_to_string(&path).unwrap();
                found.insert(path.display().to_string(), (text, mode));
            }
        }
        found
    }

    #[test]
    fn all_files_are_put_where_a_node_looks_for_them() {
        let (from, root) = (built(), tempfile::tempdir().unwrap());
        install(from.path(), root.path(), &mut Vec::new()).unwrap();
        let tree = tree(root.path());
        let at = |path: &str| tree[&root.path().join(path).display().to_string()].clone();
        let shim = ("containerd-shim-husk-v2".to_owned(), 0o755);
        assert_eq!(at("usr/local/bin/containerd-shim-husk-v2"), shim);
        assert_eq!(at("usr/local/bin/husk"), ("husk".to_owned(), 0o755));
        assert_eq!(at("usr/share/husk/vmlinux"), ("vmlinux".to_owned(), 0o644));
        assert!(at(CONTAINERD_CONFIG).0.contains("io.containerd.husk.v2"));
    }

    #[test]
    fn a_second_time_changes_nothing_and_says_so() {
        let (from, root) = (built(), tempfile::tempdir().unwrap());
        install(from.path(), root.path(), &mut Vec::new()).unwrap();
        let before = tree(root.path());
        let mut said = Vec::new();
        install(from.path(), root.path(), &mut said).unwrap();
        assert_eq!(String::from_utf8(said).unwrap(), "");
        assert_eq!(tree(root.path()), before);
    }

    #[test]
    fn removal_leaves_what_was_there_before() {
        let (from, root) = (built(), tempfile::tempdir().unwrap());
        let config = root.path().join(CONTAINERD_CONFIG);
        fs::create_dir_all(config.parent().unwrap()).unwrap();
        fs::write(&config, "version = 2 # ours\n").unwrap();
        let before = tree(root.path());
        install(from.path(), root.path(), &mut Vec::new()).unwrap();
        assert_ne!(tree(root.path()), before);
        uninstall(root.path(), &mut Vec::new()).unwrap();
        assert_eq!(tree(root.path()), before);
        uninstall(root.path(), &mut Vec::new()).unwrap();
    }

    #[test]
    fn a_missing_file_is_named_before_anything_is_changed() {
        let (from, root) = (built(), tempfile::tempdir().unwrap());
        fs::remove_file(from.path().join("vmlinux")).unwrap();
        let err = install(from.path(), root.path(), &mut Vec::new()).unwrap_err();
        assert!(format!("{err:#}").contains("vmlinux"), "{err:#}");
        assert!(tree(root.path()).is_empty());
    }
}
