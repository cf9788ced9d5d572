//! Tests of what the file system keeps of the guest's files, by calls of the library's trait.

use std::ffi::CString;
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::time::Instant;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{FileSystem, FsOptions};
use rustix::fs::{FileType, RenameFlags};
use tempfile::TempDir;

use super::*;

const ROOT: Context = Context {
    uid: 0,
    gid: 0,
    pid: 0,
};

struct Folder {
    share: Share,
    folder: TempDir,
}

impl Folder {
    fn new() -> Self {
        Self::with(CachePolicy::Auto, None)
    }

    fn with(cache: CachePolicy, limits: Option<Limits>) -> Self {
        let folder = TempDir::new().unwrap();
        let mut share = Share::new(folder.path(), cache, false).unwrap();
        if let Some(limits) = limits {
            let root = fs::File::open(folder.path()).unwrap();
            share.nodes = Nodes::new(root.into(), limits).unwrap();
            share.open = OpenFiles::new(limits.used);
        }
        share.init(FsOptions::all()).unwrap();
        Self { share, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes the folders of a path, and a file at its end.
    fn write(&self, path: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "content").unwrap();
    }

    fn lookup(&self, parent: u64, name: &str) -> io::Result<Entry> {
        self.share
            .lookup(&ROOT, parent, &CString::new(name).unwrap())
    }

    /// The node at the end of a path, with a reference to each node on the way.
    fn walk(&self, path: &str) -> u64 {
        path.split('/').fold(ROOT_ID, |parent, name| {
            self.lookup(parent, name).unwrap().inode
        })
    }

    fn size(&self, inode: u64) -> Result<i64, i32> {
        self.share
            .getattr(&ROOT, inode, None)
            .map(|(attr, _)| attr.st_size)
            .map_err(errno)
    }

    fn open(&self, inode: u64, flags: i32) -> io::Result<u64> {
        let (handle, ..) = self.share.open(&ROOT, inode, flags.cast_unsigned(), 0)?;
        Ok(handle.unwrap())
    }

    fn unlink(&self, parent: u64, name: &CStr) {
        self.share.unlink(&ROOT, parent, name).unwrap();
    }

    fn rename(&self, old: (u64, &CStr), new: (u64, &CStr), flags: u32) {
        self.share
            .rename(&ROOT, old.0, old.1, new.0, new.1, flags)
            .unwrap();
    }

    /// The names in a folder, and the nodes that came with them.
    fn list(&self, inode: u64) -> Vec<(String, u64)> {
        let (handle, _) = self.share.opendir(&ROOT, inode, 0).unwrap();
        let handle = handle.unwrap();
        let (mut place, mut all) = (0, Vec::new());
        loop {
            // As if an answer had room for two.
            let mut room = 2;
            let before = all.len();
            self.share
                .readdirplus(&ROOT, inode, handle, 0, place, &mut |entry, node| {
                    if room == 0 {
                        return Ok(0);
                    }
                    room -= 1;
                    place = entry.offset;
                    let name = String::from_utf8(entry.name.to_vec()).unwrap();
                    all.push((name, node.inode));
                    Ok(1)
                })
                .unwrap();
            if all.len() == before {
                self.share.releasedir(&ROOT, inode, 0, handle).unwrap();
                all.sort();
                return all;
            }
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is there to be mapped")]
fn errno(err: io::Error) -> i32 {
    err.raw_os_error().unwrap()
}

/// Room for next to nothing, so that files have to be found again.
fn few() -> Option<Limits> {
    Some(Limits {
        used: 3,
        recent: NonZeroUsize::MIN,
    })
}

#[test]
fn nothing_is_kept_of_files_that_are_forgotten() {
    let folder = Folder::new();
    for number in 0..20 {
        folder.write(&format!("a/b/file{number}"));
    }
    let (a, b) = (folder.walk("a"), folder.walk("a/b"));
    let files: Vec<_> = (0..20)
        .map(|number| folder.lookup(b, &format!("file{number}")).unwrap().inode)
        .collect();
    assert_eq!(folder.share.nodes.len(), 23);
    // The folders first: they are needed to find the files.
    folder.share.forget(&ROOT, a, 2);
    folder.share.forget(&ROOT, b, 1);
    assert_eq!(folder.share.nodes.len(), 23);
    assert_eq!(folder.size(files[7]), Ok(7));
    for file in files {
        folder.share.forget(&ROOT, file, 1);
        assert_eq!(folder.size(file), Err(libc::ESTALE));
    }
    assert_eq!(folder.share.nodes.len(), 1);
    // More than there is, and what cannot be forgotten.
    folder.share.forget(&ROOT, ROOT_ID, u64::MAX);
    folder.share.forget(&ROOT, b, u64::MAX);
    assert!(folder.lookup(ROOT_ID, "a").is_ok());
}

#[test]
fn file_is_one_node_under_all_its_names() {
    let folder = Folder::new();
    folder.write("file");
    fs::hard_link(folder.path("file"), folder.path("other")).unwrap();
    let node = folder.walk("file");
    assert_eq!(folder.walk("other"), node);
    folder.share.forget(&ROOT, node, 1);
    assert_eq!(folder.size(node), Ok(7));
}

#[test]
fn numbers_are_never_used_again() {
    let folder = Folder::new();
    folder.write("file");
    let first = folder.walk("file");
    let handle = folder.open(first, libc::O_RDONLY).unwrap();
    folder.share.destroy();
    assert_eq!(folder.size(first), Err(libc::ESTALE));
    let second = folder.walk("file");
    assert_ne!(second, first);
    assert_ne!(folder.open(second, libc::O_RDONLY).unwrap(), handle);
    // Nor by another process, which a guest may find itself with.
    let other = Share::new(folder.folder.path(), CachePolicy::Auto, false).unwrap();
    assert_eq!(
        errno(other.getattr(&ROOT, first, None).unwrap_err()),
        libc::ESTALE
    );
    assert_ne!(other.lookup(&ROOT, ROOT_ID, c"file").unwrap().inode, first);
}

#[test]
fn files_are_found_again_without_descriptors() {
    let folder = Folder::with(CachePolicy::Auto, few());
    for path in ["a/b/c/deep", "a/x/wide"] {
        folder.write(path);
    }
    let (deep, wide) = (folder.walk("a/b/c/deep"), folder.walk("a/x/wide"));
    for _ in 0..3 {
        for file in [deep, wide] {
            assert_eq!(folder.size(file), Ok(7));
            let handle = folder.open(file, libc::O_RDWR).unwrap();
            folder
                .share
                .release(&ROOT, file, 0, handle, false, false, None)
                .unwrap();
        }
    }
}

#[test]
fn files_are_found_where_the_guest_has_moved_them() {
    let folder = Folder::with(CachePolicy::Auto, few());
    for path in ["a/file", "a/sub/file", "b/other"] {
        folder.write(path);
    }
    let (a, b) = (folder.walk("a"), folder.walk("b"));
    let (file, below) = (folder.walk("a/file"), folder.walk("a/sub/file"));
    let other = folder.walk("b/other");
    folder.rename((a, c"file"), (b, c"moved"), 0);
    folder.rename((a, c"sub"), (b, c"sub"), 0);
    // A whole folder at a time, and what was in the other's place.
    folder.rename((b, c"moved"), (b, c"other"), RenameFlags::EXCHANGE.bits());
    folder.rename((ROOT_ID, c"b"), (a, c"inside"), 0);
    for (node, path) in [
        (file, "a/inside/other"),
        (below, "a/inside/sub/file"),
        (other, "a/inside/moved"),
    ] {
        let (attr, _) = folder.share.getattr(&ROOT, node, None).unwrap();
        assert_eq!(attr.st_ino, fs::metadata(folder.path(path)).unwrap().ino());
    }
}

#[test]
fn what_the_host_moves_is_stale_until_it_is_looked_up() {
    let folder = Folder::new();
    folder.write("a/file");
    let (a, file) = (folder.walk("a"), folder.walk("a/file"));
    fs::rename(folder.path("a/file"), folder.path("a/moved")).unwrap();
    folder.write("a/file");
    assert_eq!(folder.size(file), Err(libc::ESTALE));
    assert_eq!(
        errno(folder.open(file, libc::O_RDWR).unwrap_err()),
        libc::ESTALE
    );
    assert_ne!(folder.lookup(a, "file").unwrap().inode, file);
    assert_eq!(folder.lookup(a, "moved").unwrap().inode, file);
    assert_eq!(folder.size(file), Ok(7));
}

/// As kubelet does with a ConfigMap: the guest still takes the name of the old link for valid.
#[test]
fn link_that_the_host_has_replaced_leads_nowhere_and_the_guest_is_to_look_again() {
    let folder = Folder::new();
    let make = |target, name| symlink(target, folder.path(name)).unwrap();
    make("old", "data");
    let old = folder.walk("data");
    let read = |link| {
        let target = folder.share.readlink(&ROOT, link).map_err(errno)?;
        Ok(String::from_utf8(target).unwrap())
    };
    assert_eq!(read(old).as_deref(), Ok("old"));
    make("new", "data_tmp");
    fs::rename(folder.path("data_tmp"), folder.path("data")).unwrap();
    assert_eq!(read(old), Err(libc::ESTALE));
    let new = folder.walk("data");
    assert_eq!(read(new).as_deref(), Ok("new"));
    // What the guest itself removes it may go on to use.
    folder.unlink(ROOT_ID, c"data");
    assert_eq!(read(new).as_deref(), Ok("new"));
}

/// A file system that has few numbers gives that of a removed file to the next one: it must not be opened in its place.
#[test]
fn what_has_another_type_is_another_file() {
    let folder = Folder::new();
    folder.write("dir/file");
    let (dir, file) = (folder.walk("dir"), folder.walk("dir/file"));
    let mut other = node::stat(fs::File::open(folder.path("dir")).unwrap(), c"file").unwrap();
    other.stx_mode = 0o020_600;
    let device = folder.share.nodes.refer(dir, c"file", &other).unwrap();
    assert_ne!(device, file);
    assert_eq!(
        errno(folder.open(device, libc::O_RDWR).unwrap_err()),
        libc::ESTALE
    );
    folder.share.forget(&ROOT, device, 1);
    assert_eq!(folder.size(file), Ok(7));
}

#[test]
fn folders_that_the_host_turns_inside_out_do_no_harm() {
    let folder = Folder::new();
    folder.write("outer/inner/file");
    let (outer, inner) = (folder.walk("outer"), folder.walk("outer/inner"));
    folder.share.nodes.descriptor(inner).unwrap();
    fs::rename(folder.path("outer/inner"), folder.path("inner")).unwrap();
    fs::rename(folder.path("outer"), folder.path("inner/outer")).unwrap();
    // To who has not looked yet, each is in the other.
    assert_eq!(folder.lookup(inner, "outer").unwrap().inode, outer);
    assert_eq!(folder.walk("inner/outer"), outer);
    assert_eq!(folder.walk("inner"), inner);
    for node in [outer, inner] {
        folder.share.getattr(&ROOT, node, None).unwrap();
    }
    for node in [inner, outer] {
        folder.share.forget(&ROOT, node, 10);
    }
    assert_eq!(folder.share.nodes.len(), 1);
}

#[test]
fn open_file_outlives_its_names() {
    let folder = Folder::with(CachePolicy::Auto, few());
    for path in ["host", "guest", "replaced", "another"] {
        folder.write(path);
    }
    let nodes = ["host", "guest", "replaced"].map(|name| folder.walk(name));
    let handles = nodes.map(|node| folder.open(node, libc::O_RDWR).unwrap());
    fs::remove_file(folder.path("host")).unwrap();
    folder.unlink(ROOT_ID, c"guest");
    folder.rename((ROOT_ID, c"another"), (ROOT_ID, c"replaced"), 0);
    for (node, handle) in nodes.into_iter().zip(handles) {
        let (attr, _) = folder.share.getattr(&ROOT, node, None).unwrap();
        assert_eq!((attr.st_size, attr.st_nlink), (7, 0));
        let (attr, _) = folder.share.getattr(&ROOT, node, Some(handle)).unwrap();
        assert_eq!(attr.st_nlink, 0);
    }
}

/// As a process does that has a FIFO open, or a folder as its working directory, of which FUSE knows nothing.
#[test]
fn removed_file_lives_until_it_is_forgotten() {
    let folder = Folder::with(CachePolicy::Auto, few());
    folder.write("dir/file");
    fs::create_dir(folder.path("empty")).unwrap();
    let fifo = folder
        .share
        .mknod(&ROOT, ROOT_ID, c"fifo", libc::S_IFIFO | 0o600, 0, 0)
        .unwrap()
        .inode;
    let empty = folder.walk("empty");
    folder.unlink(ROOT_ID, c"fifo");
    folder.share.rmdir(&ROOT, ROOT_ID, c"empty").unwrap();
    // Others come in between.
    folder
        .open(folder.walk("dir/file"), libc::O_RDONLY)
        .unwrap();
    for node in [fifo, empty] {
        let (attr, _) = folder.share.getattr(&ROOT, node, None).unwrap();
        assert_eq!(attr.st_nlink, 0);
        folder.share.forget(&ROOT, node, 1);
        assert_eq!(folder.size(node), Err(libc::ESTALE));
    }
}

#[test]
fn so_many_files_are_open_and_removed_as_there_may_be() {
    let folder = Folder::with(CachePolicy::Auto, few());
    let names: Vec<_> = (0..5).map(|number| format!("file{number}")).collect();
    for name in &names {
        folder.write(name);
    }
    let nodes: Vec<_> = names.iter().map(|name| folder.walk(name)).collect();
    for node in &nodes[..3] {
        folder.open(*node, libc::O_RDONLY).unwrap();
    }
    let refused = folder.open(nodes[3], libc::O_RDONLY).unwrap_err();
    assert_eq!(errno(refused), libc::ENFILE);
    let refused = folder
        .share
        .create(&ROOT, ROOT_ID, c"new", CreateIn::default());
    assert_eq!(errno(refused.unwrap_err()), libc::ENFILE);
    assert!(!folder.path("new").exists());
    for name in &names {
        folder.unlink(ROOT_ID, &CString::new(name.as_str()).unwrap());
    }
    let known = nodes.iter().filter(|node| folder.size(**node).is_ok());
    assert_eq!(known.count(), 3);
}

#[test]
fn guest_keeps_fewer_names_where_it_knows_many_files() {
    let folder = Folder::new();
    folder.write("dir/known");
    folder.write("dir/new");
    let dir = folder.walk("dir");
    assert_eq!(folder.lookup(dir, "known").unwrap().entry_timeout, TIMEOUT);
    // Files that need not exist: nobody looks for them again.
    let stat = node::stat(&*folder.share.nodes.descriptor(dir).unwrap(), c"").unwrap();
    let mut next = stat;
    for inode in 0..u64::MAX {
        next.stx_ino = inode << 32;
        next.stx_mode = 0o100_644;
        match folder.share.nodes.refer(dir, c"x", &next) {
            Ok(_) => {}
            Err(err) => {
                assert_eq!(errno(err), libc::ENFILE);
                break;
            }
        }
    }
    assert_eq!(folder.share.nodes.len(), MAX_NODES);
    let known = folder.lookup(dir, "known").unwrap();
    assert_eq!(known.entry_timeout, Duration::ZERO);
    assert_eq!(errno(folder.lookup(dir, "new").unwrap_err()), libc::ENFILE);
    // It can still be listed.
    let (handle, _) = folder.share.opendir(&ROOT, dir, 0).unwrap();
    let mut names = 0;
    folder
        .share
        .readdirplus(&ROOT, dir, handle.unwrap(), 0, 0, &mut |_, node| {
            assert_eq!(node.inode, 0);
            names += 1;
            Ok(1)
        })
        .unwrap();
    assert_eq!(names, 4);
}

#[test]
fn folder_is_listed_whole_with_a_reference_for_each_name() {
    let folder = Folder::new();
    let names = ["file", "link", "socket", "sub"];
    folder.write("dir/file");
    fs::create_dir(folder.path("dir/sub")).unwrap();
    symlink("nowhere", folder.path("dir/link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.path("dir/socket")).unwrap();
    let dir = folder.walk("dir");
    let listed = folder.list(dir);
    let listed_names: Vec<_> = listed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(listed_names[..2], [".", ".."]);
    assert_eq!(listed_names[2..], names);
    assert_eq!((listed[0].1, listed[1].1), (0, 0));
    // What found no room was not referred to.
    for (name, node) in &listed[2..] {
        assert_eq!(folder.lookup(dir, name).unwrap().inode, *node);
        folder.share.forget(&ROOT, *node, 2);
    }
    assert_eq!(folder.share.nodes.len(), 2);
}

#[test]
fn existing_fifo_is_not_opened_by_create_and_not_kept() {
    let folder = Folder::new();
    let fifo = folder.path("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    symlink("fifo", folder.path("link")).unwrap();
    for name in [c"fifo", c"link"] {
        let args = CreateIn {
            flags: libc::O_RDWR.cast_unsigned(),
            ..CreateIn::default()
        };
        let refused = folder.share.create(&ROOT, ROOT_ID, name, args);
        assert_eq!(errno(refused.unwrap_err()), libc::EBADF);
    }
    assert_eq!(folder.share.nodes.len(), 1);
}

#[test]
fn fingerprints_tell_files_apart_and_stay() {
    let folder = Folder::new();
    folder.write("dir/file");
    let (dir, file) = (folder.walk("dir"), folder.walk("dir/file"));
    let of = |node| folder.share.fingerprint(node, None).unwrap();
    let (of_dir, of_file) = (of(dir), of(file));
    assert_ne!(of_dir, of_file);
    let inode = fs::metadata(folder.path("dir/file")).unwrap().ino();
    assert_eq!(folder.share.fingerprint(dir, Some(inode)).unwrap(), of_file);
    folder.share.forget(&ROOT, file, 1);
    assert_eq!(of(folder.walk("dir/file")), of_file);
}

#[test]
fn guest_keeps_what_is_written_only_if_it_said_so() {
    let folder = TempDir::new().unwrap();
    let share = Share::new(folder.path(), CachePolicy::Auto, true).unwrap();
    for (capable, keeps) in [
        (FsOptions::WRITEBACK_CACHE, true),
        (FsOptions::empty(), false),
    ] {
        share.init(capable).unwrap();
        assert_eq!(share.writeback.load(Ordering::Relaxed), keeps);
        share.destroy();
    }
}

#[test]
fn names_of_watched_files_are_forgotten_with_them() {
    let mut scene = Folder::new();
    let config = WatchConfig {
        prefix: "volume".to_owned(),
        gids: NoticeGids::EXAMPLE,
    };
    scene.share.watch(config).unwrap();
    scene.write("volume/file");
    let folder = scene.walk("volume");
    let first = scene.lookup(folder, "file").unwrap().inode;
    fs::rename(scene.path("volume/file"), scene.path("volume/moved")).unwrap();
    scene.write("volume/file");
    let second = scene.lookup(folder, "file").unwrap().inode;
    assert_eq!(scene.lookup(folder, "moved").unwrap().inode, first);
    assert_eq!(scene.share.nodes.names(), 3);
    // The one that had its name before has another now.
    scene.share.forget(&ROOT, second, 1);
    assert_eq!(scene.share.nodes.names(), 2);
    scene.share.forget(&ROOT, first, 2);
    scene.share.forget(&ROOT, folder, 1);
    assert_eq!(scene.share.nodes.names(), 0);
}

#[test]
fn what_was_read_is_kept_until_the_file_changes() {
    let folder = Folder::new();
    folder.write("file");
    let node = folder.walk("file");
    let keeps = || {
        let (_, options, _) = folder.share.open(&ROOT, node, 0, 0).unwrap();
        options.contains(OpenOptions::KEEP_CACHE)
    };
    // While the file is so new that another change could have the same time, that does not tell.
    let settles = || {
        let begun = Instant::now();
        while !keeps() {
            assert!(begun.elapsed() < Duration::from_secs(10), "never kept");
        }
    };
    assert!(!keeps(), "nothing was read");
    settles();
    assert!(keeps());
    fs::write(folder.path("file"), "another").unwrap();
    assert!(!keeps(), "the host has changed it");
    settles();
    // As whoever puts the times back.
    let before = fs::metadata(folder.path("file")).unwrap();
    fs::write(folder.path("file"), "like it").unwrap();
    let file = fs::File::options()
        .write(true)
        .open(folder.path("file"))
        .unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    assert!(!keeps(), "the host has changed it behind its back");
}

#[test]
fn ten_thousand_files_are_open_at_once() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
    // Each takes two descriptors, and other tests some more.
    let most = limit
        .maximum
        .map_or(usize::MAX, |most| usize::try_from(most).unwrap());
    let count = 10_000.min(most / 2 - 1_000);
    let limits = Limits {
        used: count,
        recent: NonZeroUsize::MIN,
    };
    let folder = Folder::with(CachePolicy::Auto, Some(limits));
    let handles: Vec<_> = (0..count)
        .map(|number| {
            let name = number.to_string();
            fs::write(folder.path(&name), &name).unwrap();
            let node = folder.walk(&name);
            (node, folder.open(node, libc::O_RDONLY).unwrap(), name)
        })
        .collect();
    assert_eq!(folder.share.open_files(), count);
    let refused = folder.open(handles[0].0, libc::O_RDONLY).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENFILE));
    for (node, handle, name) in handles {
        // By what is open, whatever has become of the name.
        fs::remove_file(folder.path(&name)).unwrap();
        let (attr, _) = folder.share.getattr(&ROOT, node, Some(handle)).unwrap();
        assert_eq!(attr.st_size, i64::try_from(name.len()).unwrap());
        folder
            .share
            .release(&ROOT, node, 0, handle, false, false, None)
            .unwrap();
    }
    assert_eq!(folder.share.open_files(), 0);
}
