//! Tests of notices: what is answered to who tells the guest's kernel what the host has changed.

use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{AttrOut, GetattrIn, RenameIn};
use vm_memory::GuestAddress;

use super::*;
use crate::changes::Changes;
use crate::config::{NoticeGids, WatchConfig};
use crate::virtio::SharedMemory;

const GIDS: NoticeGids = NoticeGids::EXAMPLE;

fn watched(writeback: bool) -> Guest {
    let folder = TempDir::new().unwrap();
    let device = device_with(folder.path(), CachePolicy::Auto, writeback);
    watching(device, folder)
}

fn watching(mut device: FsDevice, folder: TempDir) -> Guest {
    let config = WatchConfig {
        prefix: ".volume-".to_owned(),
        gids: GIDS,
    };
    device
        .watch(config, Arc::new(Changes::default()), || Ok(()))
        .unwrap();
    let driver = Driver::activate(&mut device);
    let mut guest = Guest {
        device,
        driver,
        folder,
        uid: 0,
        gid: 0,
    };
    guest.init();
    fs::create_dir(guest.path(".volume-0")).unwrap();
    guest
}

impl Guest {
    fn host_writes(&self, name: &str, content: &str) {
        fs::write(self.path(".volume-0").join(name), content).unwrap();
    }

    fn volume(&mut self) -> u64 {
        self.lookup(ROOT_ID, ".volume-0").unwrap().nodeid
    }

    /// Sends requests as a notice of this group.
    fn notify<T>(&mut self, gid: u32, notify: impl FnOnce(&mut Self) -> T) -> T {
        self.gid = gid;
        let result = notify(self);
        self.gid = 0;
        result
    }

    fn make(&mut self, opcode: Opcode, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let body = match opcode {
            Opcode::Mkdir => MkdirIn {
                mode: 0o755,
                ..MkdirIn::default()
            }
            .as_slice()
            .to_vec(),
            Opcode::Mknod => MknodIn {
                mode: libc::S_IFREG | 0o644,
                ..MknodIn::default()
            }
            .as_slice()
            .to_vec(),
            _ => Vec::new(),
        };
        let mut body = named(&body, name);
        if let Opcode::Symlink = opcode {
            body.extend(b"target\0");
        }
        self.ask(opcode, parent, &body, 256)
            .map(|bytes| object(&bytes))
    }

    fn rename(&mut self, parent: u64, from: &str, to: &str) -> Answer {
        let body = named(RenameIn { newdir: parent }.as_slice(), from);
        self.ask(Opcode::Rename, parent, &named(&body, to), 0)
    }
}

/// The guest's kernel asks for them before it removes the file.
#[test]
fn a_file_that_is_gone_has_attributes_for_a_notice_with_a_window_and_without() {
    let folder = TempDir::new().unwrap();
    let window = SharedMemory::new(GuestAddress(1 << 36), SharedMemory::UNIT).unwrap();
    let mut share = Share::new(folder.path(), CachePolicy::Auto, false).unwrap();
    share.set_window(Arc::new(window)).unwrap();
    let tag = Tag::try_from("husk".to_owned()).unwrap();
    let device = FsDevice::new(tag, share, VCPUS, |_| Ok(())).unwrap();
    for mut guest in [watching(device, folder), watched(false)] {
        let volume = guest.volume();
        // The first file of a file system is looked at whether it can be mapped, and so has a descriptor.
        for name in ["first", "gone"] {
            guest.host_writes(name, "content");
            guest.lookup(volume, name).unwrap();
        }
        let gone = guest.lookup(volume, "gone").unwrap().nodeid;
        fs::remove_file(guest.path(".volume-0/gone")).unwrap();
        let ask = |guest: &mut Guest| {
            let asked = GetattrIn::default();
            let answer = guest.ask(Opcode::Getattr, gone, asked.as_slice(), 256)?;
            Ok::<AttrOut, i32>(object(&answer))
        };
        let told = guest.notify(GIDS.gone_file, ask).unwrap();
        assert_eq!(told.attr.mode & libc::S_IFMT, libc::S_IFREG);
        assert_eq!(ask(&mut guest).map(drop), Err(libc::ESTALE));
    }
}

#[test]
fn what_is_made_for_a_notice_is_what_the_host_has_made() {
    let mut guest = watched(false);
    let volume = guest.volume();
    guest.host_writes("file", "content");
    fs::create_dir(guest.path(".volume-0/folder")).unwrap();
    symlink("elsewhere", guest.path(".volume-0/link")).unwrap();
    for (name, opcode) in [
        ("file", Opcode::Mknod),
        ("folder", Opcode::Mkdir),
        ("link", Opcode::Symlink),
    ] {
        let known = guest.lookup(volume, name).unwrap();
        guest.notify(GIDS.created, |guest| {
            assert_eq!(guest.lookup(volume, name).unwrap_err(), libc::ENOENT);
            let made = guest.make(opcode, volume, name).unwrap();
            assert_eq!(made.nodeid, known.nodeid, "{name}");
            assert_eq!(made.attr.mode, known.attr.mode, "{name}");
        });
        // Where it is no notice, it fails.
        let made = guest.make(opcode, volume, name);
        assert_eq!(made.unwrap_err(), libc::EEXIST);
    }
    // What is gone again, or something else by now.
    for (name, opcode, kind) in [
        ("gone", Opcode::Mknod, libc::S_IFREG),
        ("file", Opcode::Mkdir, libc::S_IFDIR),
    ] {
        let made = guest.notify(GIDS.created, |guest| {
            guest.make(opcode, volume, name).unwrap()
        });
        assert_eq!(made.attr.mode & libc::S_IFMT, kind);
        assert_eq!((made.entry_valid, made.entry_valid_nsec), (0, 0));
        let known = guest.lookup(volume, name);
        assert_ne!(known.map(|known| known.nodeid), Ok(made.nodeid));
    }
    assert!(!guest.path(".volume-0/gone").exists());
}

#[test]
fn what_is_gone_is_found_once_more_to_be_removed() {
    let mut guest = watched(false);
    let volume = guest.volume();
    guest.host_writes("file", "content");
    let known = guest.lookup(volume, "file").unwrap();
    fs::remove_file(guest.path(".volume-0/file")).unwrap();
    for name in ["file", "never-known"] {
        let found = guest.notify(GIDS.gone_file, |guest| {
            let found = guest.lookup(volume, name).unwrap();
            guest.unlink(volume, name).unwrap();
            found
        });
        assert_eq!(found.nodeid == known.nodeid, name == "file");
        assert_eq!(found.attr.nlink, 1);
        assert_eq!(found.attr.mode & libc::S_IFMT, libc::S_IFREG);
        assert_eq!((found.entry_valid, found.entry_valid_nsec), (0, 0));
        // The kernel looks whether it may.
        let attr = guest.notify(GIDS.gone_file, |guest| {
            let asked = GetattrIn::default();
            guest.ask(Opcode::Getattr, found.nodeid, asked.as_slice(), 256)
        });
        let attr = object::<AttrOut>(&attr.unwrap()).attr;
        assert_eq!(attr.mode & libc::S_IFMT, libc::S_IFREG);
        guest.forget(found.nodeid, 1);
        assert_eq!(guest.lookup(volume, name).unwrap_err(), libc::ENOENT);
    }
    // A file that was a folder is nothing that the kernel could remove as one.
    let found = guest.notify(GIDS.gone_folder, |guest| guest.lookup(volume, "file"));
    let found = found.unwrap();
    assert_ne!(found.nodeid, known.nodeid);
    assert_eq!(found.attr.mode & libc::S_IFMT, libc::S_IFDIR);
}

#[test]
fn folder_that_is_gone_is_found_with_what_was_in_it() {
    let mut guest = watched(false);
    let volume = guest.volume();
    fs::create_dir(guest.path(".volume-0/folder")).unwrap();
    guest.host_writes("folder/file", "content");
    let folder = guest.lookup(volume, "folder").unwrap().nodeid;
    let file = guest.lookup(folder, "file").unwrap().nodeid;
    fs::remove_dir_all(guest.path(".volume-0/folder")).unwrap();
    // The guest's kernel has looked for it and dropped it, but not the file, which is watched.
    assert_eq!(guest.lookup(volume, "folder").unwrap_err(), libc::ENOENT);
    guest.forget(folder, 1);
    guest.notify(GIDS.changed, |guest| {
        assert_eq!(guest.lookup(volume, "folder").unwrap().nodeid, folder);
        assert_eq!(guest.lookup(volume, "unknown").unwrap_err(), libc::ENOENT);
        let asked = GetattrIn::default();
        let attr = guest.ask(Opcode::Getattr, folder, asked.as_slice(), 256);
        let attr = object::<AttrOut>(&attr.unwrap()).attr;
        assert_eq!(attr.mode & libc::S_IFMT, libc::S_IFDIR);
    });
    guest.notify(GIDS.gone_file, |guest| {
        assert_eq!(guest.lookup(folder, "file").unwrap().nodeid, file);
        guest.unlink(folder, "file").unwrap();
    });
    guest.notify(GIDS.gone_folder, |guest| {
        assert_eq!(guest.lookup(volume, "folder").unwrap().nodeid, folder);
        guest
            .ask(Opcode::Rmdir, volume, &named(&[], "folder"), 0)
            .unwrap();
    });
    // Two references each, and none after that.
    guest.forget(file, 2);
    guest.forget(folder, 2);
    let gone = guest.notify(GIDS.changed, |guest| guest.lookup(volume, "folder"));
    assert_eq!(gone.unwrap_err(), libc::ENOENT);
}

#[test]
fn name_that_is_a_new_file_s_leads_to_the_former_one_for_a_notice() {
    let mut guest = watched(false);
    let volume = guest.volume();
    guest.host_writes("file", "old");
    let old = guest.lookup(volume, "file").unwrap().nodeid;
    guest.host_writes("new", "new");
    fs::rename(guest.path(".volume-0/new"), guest.path(".volume-0/file")).unwrap();
    for seen in [false, true] {
        if seen {
            assert_ne!(guest.lookup(volume, "file").unwrap().nodeid, old);
        }
        guest.notify(GIDS.moved_file, |guest| {
            let source = guest.lookup(volume, "new").unwrap();
            assert_ne!(source.nodeid, old);
            assert_eq!(guest.lookup(volume, "file").unwrap().nodeid, old);
            guest.rename(volume, "new", "file").unwrap();
        });
        let content = fs::read_to_string(guest.path(".volume-0/file")).unwrap();
        assert_eq!(content, "new");
    }
    // A file that nobody has taken the place of.
    let target = guest.notify(GIDS.moved_file, |guest| {
        fs::write(guest.path(".volume-0/other"), "").unwrap();
        guest.lookup(volume, "other").unwrap_err()
    });
    assert_eq!(target, libc::ENOENT);
}

#[test]
fn move_of_a_known_file_keeps_it() {
    let mut guest = watched(false);
    let volume = guest.volume();
    guest.host_writes("a", "content");
    let known = guest.lookup(volume, "a").unwrap().nodeid;
    fs::rename(guest.path(".volume-0/a"), guest.path(".volume-0/b")).unwrap();
    guest.notify(GIDS.moved_file, |guest| {
        assert_eq!(guest.lookup(volume, "a").unwrap().nodeid, known);
        assert_eq!(guest.lookup(volume, "b").unwrap_err(), libc::ENOENT);
        guest.rename(volume, "a", "b").unwrap();
    });
    assert!(guest.open(known, libc::O_RDONLY).is_ok());
    assert_eq!(guest.lookup(volume, "b").unwrap().nodeid, known);
}

#[test]
fn notice_of_a_change_changes_nothing() {
    let mut guest = watched(false);
    let volume = guest.volume();
    guest.host_writes("file", "content");
    let file = guest.lookup(volume, "file").unwrap();
    let set = SetattrIn {
        // FATTR_MODE, FATTR_SIZE, FATTR_MTIME
        valid: 1 | 8 | 32,
        ..SetattrIn::default()
    };
    let fh = guest.notify(GIDS.changed, |guest| {
        let answer = guest.ask(Opcode::Setattr, file.nodeid, set.as_slice(), 256);
        let attr = object::<AttrOut>(&answer.unwrap()).attr;
        assert_eq!((attr.size, attr.mode), (7, file.attr.mode));
        let flags = libc::O_WRONLY | libc::O_TRUNC;
        let fh = guest.open(file.nodeid, flags).unwrap().fh;
        let refused = guest.write(file.nodeid, fh, 0, b"other");
        assert_eq!(refused.unwrap_err(), libc::EPERM);
        fh
    });
    assert_eq!(
        guest.write(file.nodeid, fh, 0, b"other").unwrap_err(),
        libc::EBADF
    );
    let content = fs::read_to_string(guest.path(".volume-0/file")).unwrap();
    assert_eq!(content, "content");
}

#[test]
fn notice_opens_nothing_by_which_the_kernel_could_write_what_it_keeps() {
    let mut guest = watched(true);
    let volume = guest.volume();
    guest.host_writes("file", "content");
    let file = guest.lookup(volume, "file").unwrap().nodeid;
    let opened = guest.notify(GIDS.changed, |guest| guest.open(file, libc::O_WRONLY));
    assert_eq!(opened.unwrap_err(), libc::EACCES);
}

#[test]
fn groups_of_notices_are_root_s_and_of_a_watched_share_only() {
    let mut guest = watched(false);
    let volume = guest.volume();
    guest.host_writes("file", "content");
    guest.notify(GIDS.created, |guest| {
        guest.uid = 1;
        assert!(guest.lookup(volume, "file").is_ok());
        guest.uid = 0;
    });
    let mut guest = Guest::mounted();
    fs::write(guest.path("file"), "content").unwrap();
    guest.gid = GIDS.gone_file;
    guest.unlink(ROOT_ID, "file").unwrap();
    assert!(!guest.path("file").exists());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is asked as a notice, the folder stays as it is.
    #[test]
    fn no_notice_changes_the_folder(
        requests in prop::collection::vec(
            (0_u32..53, 0_usize..3, 0_u32..6, prop::collection::vec(any::<u8>(), 0..200), any::<bool>()),
            1..40,
        )
    ) {
        let mut guest = watched(false);
        let volume = guest.volume();
        guest.host_writes("file", "content");
        let file = guest.lookup(volume, "file").unwrap().nodeid;
        let fh = guest.open(file, libc::O_RDWR).unwrap().fh;
        let state = |guest: &Guest| {
            let metadata = fs::metadata(guest.path(".volume-0/file")).unwrap();
            let names = fs::read_dir(guest.path(".volume-0")).unwrap().count();
            let content = fs::read(guest.path(".volume-0/file")).unwrap();
            (content, metadata.mode(), metadata.ctime(), metadata.ctime_nsec(), names)
        };
        let before = state(&guest);
        for (opcode, node, gid, mut body, honest) in requests {
            // Not DESTROY and INIT, which are no request about a file.
            if [26, 38].contains(&opcode) {
                continue;
            }
            let node = [volume, file, ROOT_ID][node];
            if honest {
                // A handle, or names that exist and do not.
                body.splice(0..0, fh.to_le_bytes());
                body.extend(b"\0file\0new\0");
            }
            guest.gid = GIDS.changed + gid;
            let header = guest.header(opcode, node, body.len());
            guest.driver.request(REQUEST_QUEUE, &[header.as_slice(), &body], &[16, 4096]);
        }
        prop_assert_eq!(state(&guest), before);
    }
}
