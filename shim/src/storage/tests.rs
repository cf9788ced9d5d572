//! With real mounts, in a mount namespace of the test's own thread. They need root; without it they say so and stop.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::spec::Access;

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

/// Puts a container together, as [`Share::prepare`] does.
fn built(share: &Share, root: &Path, binds: &[Bind]) -> Result<ContainerStorage, Error> {
    let mut storage = share.storage("x");
    storage.build(&[], root)?;
    storage.volumes = share.volumes(binds)?;
    Ok(storage)
}

fn root(dir: &Path) -> PathBuf {
    let root = dir.join("bundle/rootfs");
    fs::create_dir_all(root.join("etc")).unwrap();
    root
}

fn bind(source: &Path, access: Access) -> Bind {
    Bind {
        source: source.to_owned(),
        destination: "/data".into(),
        recursive: true,
        access,
        follows_host: true,
        owners: None,
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

        let binds = [bind(&folder, Access::Write), bind(&file, Access::Read)];
        let storage = built(share, &root(dir), &binds).unwrap();
        storage.publish().unwrap();
        let container = share.exported().join("x");
        assert_eq!(names(&container), ["rootfs"]);
        let volumes: Vec<_> = storage
            .volumes()
            .map(|name| share.exported().join(name))
            .collect();
        assert!(container.join("rootfs/etc").is_dir());
        fs::write(volumes[0].join("new"), "written").unwrap();
        assert_eq!(fs::read_to_string(folder.join("new")).unwrap(), "written");
        assert_eq!(fs::read_to_string(&volumes[1]).unwrap(), "text");
        let err = fs::write(&volumes[1], "no").unwrap_err();
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
        let storage = built(share, &root(dir), &[]).unwrap();
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
        let binds = [
            bind(dir, Access::Write),
            bind(Path::new("/absent"), Access::Write),
        ];
        let err = built(share, &root(dir), &binds).unwrap_err();
        assert!(
            err.chain()
                .starts_with("cannot bind /absent of the host to /data")
        );
        assert_eq!(mounts_below(&share.root), before);
        assert!(names(&share.exported()).is_empty());
        assert!(names(&share.staging()).is_empty());
    });
}

#[test]
fn volume_of_two_containers_is_one_mount() {
    with_share(|share, dir| {
        let folder = dir.join("folder");
        fs::create_dir(&folder).unwrap();
        let volumes = |binds: &[Bind]| share.volumes(binds).unwrap();
        let first = volumes(&[bind(&folder, Access::Write)]);
        let second = volumes(&[Bind {
            destination: "/elsewhere".into(),
            ..bind(&folder, Access::Write)
        }]);
        assert!(Arc::ptr_eq(&first[0], &second[0]));
        let read_only = volumes(&[bind(&folder, Access::Read)]);
        assert!(!Arc::ptr_eq(&first[0], &read_only[0]));
        for volume in first.iter().chain(&second).chain(&read_only) {
            volume.publish().unwrap();
        }

        let place = share.exported().join(first[0].name());
        drop(first);
        fs::write(place.join("still"), "there").unwrap();
        drop((second, read_only));
        assert!(names(&share.exported()).is_empty());
        assert!(names(&share.staging()).is_empty());
    });
}

#[test]
fn volume_whose_source_was_replaced_is_mounted_anew() {
    with_share(|share, dir| {
        let file = dir.join("file");
        fs::write(&file, "old").unwrap();
        let binds = [bind(&file, Access::Write)];
        let old = share.volumes(&binds).unwrap();
        fs::write(dir.join("new"), "new").unwrap();
        fs::rename(dir.join("new"), &file).unwrap();
        let new = share.volumes(&binds).unwrap();
        assert!(!Arc::ptr_eq(&old[0], &new[0]));
    });
}

#[test]
fn read_only_is_recursive_only_if_asked() {
    with_share(|share, dir| {
        let folder = dir.join("folder");
        fs::create_dir_all(folder.join("below")).unwrap();
        mount(
            Some("tmpfs"),
            &folder.join("below"),
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let binds = [bind(&folder, Access::Read), bind(&folder, Access::ReadAll)];
        let storage = built(share, &root(dir), &binds).unwrap();
        storage.publish().unwrap();
        let volumes: Vec<_> = storage
            .volumes()
            .map(|name| share.exported().join(name))
            .collect();
        let writable = |path: PathBuf| fs::write(path.join("new"), "").is_ok();
        assert!(!writable(volumes[0].clone()));
        assert!(writable(volumes[0].join("below")));
        assert!(!writable(volumes[1].join("below")));
        umount2(&folder.join("below"), MntFlags::MNT_DETACH).unwrap();
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
        let mut storage = share.storage("x");
        storage.build(&[component, tmpfs], &root(dir)).unwrap();
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
        let mut storage = share.storage("x");
        let err = storage.build(&[component], &root(dir)).unwrap_err();
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
            let err = fs::write(exported.join(".volume-0"), "no").unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
        });
        is_ready.recv().unwrap();
        let binds = [bind(&file, Access::Read)];
        let storage = built(&share, &root(&dir), &binds).unwrap();
        storage.publish().unwrap();
        ask.send(()).unwrap();
        worker.join().unwrap();
    });
}
