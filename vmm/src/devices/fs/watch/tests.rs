//! Tests of what is told of the host's changes, with a guest that is played by calls of the file system.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::sync::mpsc::{Receiver, channel};

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions, ROOT_ID};
use tempfile::TempDir;

use super::*;
use crate::config::{CachePolicy, NoticeGids, WatchConfig};

const LIMIT: Duration = Duration::from_secs(10);
/// Long enough for what should not come.
const QUIET: Duration = Duration::from_millis(300);

const GUEST: Context = Context {
    uid: 0,
    gid: 0,
    pid: 0,
};

struct Scene {
    folder: TempDir,
    share: Arc<Share>,
    changes: Arc<Changes>,
    told: Receiver<()>,
    watch: Watch,
}

/// Not by eprintln!, whose output is only shown for a test that fails.
fn without_fanotify() -> bool {
    let Err(err) = Group::new() else {
        return false;
    };
    let _ = writeln!(std::io::stderr(), "SKIPPED: no fanotify: {err}");
    true
}

impl Scene {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join(".volume-0")).unwrap();
        let mut share = Share::new(folder.path(), CachePolicy::Auto, false).unwrap();
        let config = WatchConfig {
            prefix: ".volume-".to_owned(),
            gids: NoticeGids::EXAMPLE,
        };
        let news = share.watch(config).unwrap();
        share.init(FsOptions::all()).unwrap();
        let share = Arc::new(share);
        let changes = Arc::new(Changes::default());
        let (tell, told) = channel();
        changes.tell(move || {
            let _ = tell.send(());
        });
        let watch =
            Watch::spawn(Arc::clone(&share), news, Arc::clone(&changes), || Ok(())).unwrap();
        Self {
            folder,
            share,
            changes,
            told,
            watch,
        }
    }

    /// Has another process change the folder by a script, as the host does: what this process does is the guest's doing.
    fn host(&self, script: &str) {
        let mut shell = std::process::Command::new("sh");
        let shell = shell.args(["-ec", script]).current_dir(&self.folder);
        assert!(shell.status().unwrap().success(), "{script}");
    }

    /// The node at the end of a path, with a reference to each node on the way, once it is watched.
    fn walk(&self, path: &str) -> u64 {
        let known = path.split('/').fold(ROOT_ID, |parent, name| {
            let name = CString::new(name).unwrap();
            self.share.lookup(&GUEST, parent, &name).unwrap().inode
        });
        self.settle();
        known
    }

    /// Waits until the thread is through with all that is known: it changes the folder until that is told.
    fn settle(&self) {
        self.share
            .lookup(&GUEST, ROOT_ID, c".volume-0")
            .expect("it is there");
        let until = Instant::now() + LIMIT;
        while self.told.recv_timeout(Duration::from_millis(20)).is_err() {
            assert!(Instant::now() < until, "nothing is watched");
            self.host("echo > .volume-0/probe");
        }
        self.host("rm .volume-0/probe");
        self.wait_for(|change| change.ends_with("probe") && change.starts_with("Gone"));
    }

    fn take(&self) -> Vec<String> {
        let mut taken = Vec::new();
        loop {
            let (changes, more) = self.changes.take();
            taken.extend(changes.iter().map(|change| {
                let text = |path: &[u8]| String::from_utf8(path.to_vec()).unwrap();
                let (path, to) = (text(&change.path), text(&change.to));
                let folder = if change.file_type == libc::S_IFDIR {
                    "/"
                } else {
                    ""
                };
                match change.kind {
                    ChangeKind::Moved => format!("Moved {path}{folder} > {to}"),
                    kind => format!("{kind:?} {path}{folder}"),
                }
            }));
            if !more {
                return taken;
            }
        }
    }

    /// All that is told up to the change that is `last`. The same twice in a row counts once: it depends on when it is taken.
    fn wait_for(&self, last: impl Fn(&str) -> bool) -> Vec<String> {
        let mut all = self.take();
        while !all.iter().any(|change| last(change)) {
            if self.told.recv_timeout(LIMIT).is_err() {
                panic!("told no more than {all:?}");
            }
            all.extend(self.take());
        }
        while self.told.try_recv().is_ok() {}
        all.dedup();
        all
    }

    fn tells(&self, last: &str) -> Vec<String> {
        self.wait_for(|change| change == last)
    }

    fn tells_nothing(&self) {
        std::thread::sleep(QUIET);
        assert_eq!(self.take(), Vec::<String>::new());
    }
}

#[test]
fn files_that_the_host_makes_writes_and_removes_are_told() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    scene.walk(".volume-0");
    scene.host("echo content > .volume-0/a");
    let told = scene.tells("Written .volume-0/a");
    assert_eq!(
        told,
        [
            "Created .volume-0/a",
            "Modified .volume-0/a",
            "Written .volume-0/a"
        ]
    );
    scene.host("chmod 600 .volume-0/a");
    assert_eq!(
        scene.tells("Attributes .volume-0/a"),
        ["Attributes .volume-0/a"]
    );
    scene.host("rm .volume-0/a");
    assert_eq!(scene.tells("Gone .volume-0/a"), ["Gone .volume-0/a"]);
    scene.host("mkdir .volume-0/a; rmdir .volume-0/a");
    let told = scene.tells("Gone .volume-0/a/");
    assert_eq!(told, ["Created .volume-0/a/", "Gone .volume-0/a/"]);
}

#[test]
fn update_of_a_config_map_is_told() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    scene.host(
        "cd .volume-0; mkdir ..1; echo old > ..1/key; ln -s ..1 ..data; ln -s ..data/key key",
    );
    scene.walk(".volume-0/..1/key");
    scene.walk(".volume-0/..data");
    scene.host(
        "cd .volume-0; mkdir ..2; echo new > ..2/key; ln -s ..2 ..data_tmp; mv -T ..data_tmp ..data; rm -r ..1",
    );
    let told = scene.tells("Gone .volume-0/..1/");
    let expected = [
        "Created .volume-0/..2/",
        "Moved .volume-0/..data_tmp > .volume-0/..data",
        "Gone .volume-0/..1/key",
        "Gone .volume-0/..1/",
    ];
    for change in expected {
        assert!(told.iter().any(|told| told == change), "{change}: {told:?}");
    }
    // What the guest did not know was watched by nobody.
    assert!(
        !told.iter().any(|told| told.contains("..2/key")),
        "{told:?}"
    );
}

#[test]
fn move_is_told_as_far_as_the_guest_knows_the_folders() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    scene.host("cd .volume-0; mkdir -p one two unknown/a");
    scene.walk(".volume-0/one");
    scene.walk(".volume-0/two");
    for (from, to, told) in [
        ("unknown/a", "one/b", "Moved / > .volume-0/one/b"),
        ("one/b", "two/c", "Moved .volume-0/one/b/ > .volume-0/two/c"),
        ("two/c", "unknown/d", "Moved .volume-0/two/c/ > "),
    ] {
        scene.host(&format!("cd .volume-0; mv {from} {to}"));
        let all = scene.wait_for(|change| change.starts_with("Moved"));
        assert!(all.iter().any(|change| change == told), "{told}: {all:?}");
    }
}

#[test]
fn what_the_guest_does_is_not_told() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    let volume = scene.walk(".volume-0");
    let args = CreateIn {
        flags: libc::O_RDWR.cast_unsigned(),
        mode: 0o644,
        ..CreateIn::default()
    };
    let (entry, handle, ..) = scene.share.create(&GUEST, volume, c"a", args).unwrap();
    let handle = handle.unwrap();
    for size in 0..10_000 {
        let mut attr = entry.attr;
        attr.st_size = size;
        let valid = fuse_backend_rs::api::filesystem::SetattrValid::SIZE;
        scene
            .share
            .setattr(&GUEST, entry.inode, attr, Some(handle), valid)
            .unwrap();
    }
    scene
        .share
        .release(&GUEST, entry.inode, 0, handle, false, false, None)
        .unwrap();
    scene
        .share
        .rename(&GUEST, volume, c"a", volume, c"b", 0)
        .unwrap();
    scene.share.unlink(&GUEST, volume, c"b").unwrap();
    scene.tells_nothing();
    scene.host("echo > .volume-0/a");
    let told = scene.tells("Written .volume-0/a");
    assert_eq!(told[0], "Created .volume-0/a");
}

#[test]
fn what_the_guest_does_not_know_or_has_forgotten_is_not_told() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    scene.host("mkdir -p .volume-0/a/b rootfs");
    scene.walk("rootfs");
    let known = scene.walk(".volume-0/a");
    scene.host("echo > .volume-0/a/b/file; echo > rootfs/file");
    scene.tells_nothing();
    scene.host("echo > .volume-0/a/file");
    scene.tells("Written .volume-0/a/file");

    scene.share.forget(&GUEST, known, 1);
    scene.settle();
    scene.host("echo > .volume-0/a/file");
    scene.tells_nothing();

    scene.share.destroy();
    // It has no other to wait for.
    std::thread::sleep(QUIET);
    scene.host("echo > .volume-0/file");
    scene.tells_nothing();
    scene.walk(".volume-0");
}

#[test]
fn file_that_is_shared_by_itself_is_watched() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    // As a bind mount, it is in a folder that nobody watches.
    scene.host("echo > hosts; ln hosts .volume-1");
    scene.walk(".volume-1");
    scene.host("echo content > hosts");
    let told = scene.tells("Written .volume-1");
    assert_eq!(told, ["Modified .volume-1", "Written .volume-1"]);
}

#[test]
fn more_than_can_wait_is_said_to_be_lost() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    scene.walk(".volume-0");
    scene.host("cd .volume-0; seq 17000 | xargs touch");
    // Nobody takes anything meanwhile.
    let until = Instant::now() + LIMIT;
    while scene.changes.len() <= 16 * 1024 {
        assert!(Instant::now() < until, "{:?}", scene.changes);
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = scene.wait_for(|change| change == "Attributes .volume-0/");
    // Each is made, closed, and has its times set.
    assert!(told.len() < 3 * 17_000, "{}", told.len());
}

#[test]
fn end_does_not_wait_for_anything() {
    if without_fanotify() {
        return;
    }
    let scene = Scene::new();
    scene.walk(".volume-0");
    drop(scene.watch);
}
