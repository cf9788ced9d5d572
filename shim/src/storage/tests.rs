//! With real mounts, in a mount namespace of the test's own thread. They need root; without it they say so and stop.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;

/// Runs `test` with a share, on a thread whose mounts nobody else sees.
fn with_share(test: impl FnOnce(&Share, &Path) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting needs root");
        return;
    }
    std::thread::spawn(|| {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("husk");
        fs::create_dir(&root).unwrap();
        let share = Share::set_up(&root).unwrap();
        test(&share, dir.path());
        umount2(&root, MntFlags::MNT_DETACH).unwrap();
    })
    .join()
    .unwrap();
}

fn storage(share: &Share, id: &str) -> ContainerStorage {
    ContainerStorage {
        staging: share.staging().join(id),
        point: share.points().join(id),
        published: share.exported().join(id),
    }
}

fn root(dir: &Path) -> PathBuf {
    let root = dir.join("bundle/rootfs");
    fs::create_dir_all(root.join("etc")).unwrap();
    root
}

fn bind(source: &Path, read_only: bool) -> Bind {
    Bind {
        source: source.to_owned(),
        destination: "/data".into(),
        recursive: true,
        read_only,
        follows_host: true,
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn mounts_below(root: &Path) -> usize {
    fs::read_to_string("/proc/thread-self/mountinfo")
        .unwrap()
        .lines()
        .filter(|line| line.contains(&format!(" {}/", root.display())))
        .count()
}

#[test]
fn container_appears_whole_and_leaves_nothing() {
    with_share(|share, dir| {
        let (folder, file) = (dir.join("folder"), dir.join("file"));
        fs::create_dir(&folder).unwrap();
        fs::write(&file, "text").unwrap();
        let before = mounts_below(&share.root);

        let storage = storage(share, "x");
        let binds = [bind(&folder, false), bind(&file, true)];
        storage.build(&[], &root(dir), &binds).unwrap();
        storage.publish().unwrap();
        let container = share.exported().join("x");
        assert_eq!(names(&container), ["mounts", "rootfs"]);
        assert!(container.join("rootfs/etc").is_dir());
        fs::write(container.join("mounts/0/new"), "written").unwrap();
        assert_eq!(fs::read_to_string(folder.join("new")).unwrap(), "written");
        assert_eq!(
            fs::read_to_string(container.join("mounts/1")).unwrap(),
            "text"
        );
        let err = fs::write(container.join("mounts/1"), "no").unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);

        drop(storage);
        assert_eq!(mounts_below(&share.root), before);
        assert!(names(&share.exported()).is_empty());
        assert!(names(&share.staging()).is_empty());
        assert_eq!(names(&folder), ["new"]);
    });
}

#[test]
fn guest_can_write_to_mounts_only() {
    with_share(|share, dir| {
        let storage = storage(share, "x");
        storage.build(&[], &root(dir), &[]).unwrap();
        storage.publish().unwrap();
        for folder in [share.exported(), share.exported().join("x")] {
            let err = fs::write(folder.join("new"), "").unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
        fs::write(share.exported().join("x/rootfs/new"), "").unwrap();
    });
}

#[test]
fn failure_half_way_leaves_nothing() {
    with_share(|share, dir| {
        let before = mounts_below(&share.root);
        let storage = storage(share, "x");
        let err = storage
            .build(&[], &root(dir), &[bind(Path::new("/absent"), false)])
            .unwrap_err();
        assert!(
            err.chain()
                .starts_with("cannot bind /absent of the host to /data")
        );
        drop(storage);
        assert_eq!(mounts_below(&share.root), before);
        assert!(names(&share.exported()).is_empty());
        assert!(names(&share.staging()).is_empty());
    });
}

#[test]
fn rootfs_mounts_of_containerd_are_done_in_order() {
    with_share(|share, dir| {
        let lower = dir.join("lower");
        fs::create_dir_all(lower.join("etc")).unwrap();
        let component = Mount {
            type_: "bind".into(),
            source: lower.display().to_string(),
            options: vec!["rbind".into(), "ro".into()],
            ..Mount::default()
        };
        let tmpfs = Mount {
            type_: "tmpfs".into(),
            source: "tmpfs".into(),
            target: "etc".into(),
            ..Mount::default()
        };
        let storage = storage(share, "x");
        storage.build(&[component, tmpfs], &root(dir), &[]).unwrap();
        storage.publish().unwrap();
        let rootfs = share.exported().join("x/rootfs");
        assert!(fs::write(rootfs.join("new"), "").is_err());
        fs::write(rootfs.join("etc/new"), "").unwrap();
        assert_ne!(
            fs::metadata(rootfs.join("etc")).unwrap().dev(),
            fs::metadata(&rootfs).unwrap().dev()
        );
    });
}

#[test]
fn rootfs_that_cannot_be_mounted_is_told() {
    with_share(|share, dir| {
        let component = Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec!["lowerdir=/absent".into()],
            ..Mount::default()
        };
        let err = storage(share, "x")
            .build(&[component], &root(dir), &[])
            .unwrap_err();
        assert!(
            err.chain()
                .starts_with("failed to mount rootfs component 0")
        );
    });
}

/// A worker's namespace is a copy with slave propagation, made before most containers come.
#[test]
fn later_container_reaches_a_slave_namespace_with_its_flags() {
    with_share(|share, dir| {
        let (share, dir) = (share.clone(), dir.to_owned());
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel::<()>();
        let file = dir.join("file");
        fs::write(&file, "text").unwrap();
        let exported = share.exported();
        let worker = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            change(Path::new("/"), MsFlags::MS_SLAVE | MsFlags::MS_REC).unwrap();
            ready.send(()).unwrap();
            asked.recv().unwrap();
            assert!(exported.join("x/rootfs/etc").is_dir());
            let err = fs::write(exported.join("x/mounts/0"), "no").unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
        });
        is_ready.recv().unwrap();
        let storage = storage(&share, "x");
        storage
            .build(&[], &root(&dir), &[bind(&file, true)])
            .unwrap();
        storage.publish().unwrap();
        ask.send(()).unwrap();
        worker.join().unwrap();
    });
}
