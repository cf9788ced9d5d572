//! Files as the guest's users know them, on a shared folder and on a disk.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something of its own fails"
)]

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};

use command_fds::{CommandFdExt, FdMapping};
use husk_vmm::config::{CachePolicy, DiskConfig, FileServerConfig, ShareConfig, ShareProtocol};
use husk_vmm::control::ExitReason;

use crate::support::{self, Guest};

/// Says which check has failed, and goes on with the next.
const PRELUDE: &str = "fail() { echo \"HUSK FAIL $1\"; }\n\
    is() { [ \"$2\" = \"$3\" ] || fail \"$1: $2, not $3\"; }\n\
    drop() { sync; echo 3 > /proc/sys/vm/drop_caches; }\n";

const FOLDER: &str = r#"
mkdir -p /etc
printf 'root:x:0:0::/:/bin/sh\nu:x:1000:2000::/:/bin/sh\nv:x:1001:1001::/:/bin/sh\nw:x:1002:1002::/:/bin/sh\n' > /etc/passwd
printf 'g:x:2000:w\n' > /etc/group
mount -t virtiofs husk /mnt || fail mount
cd /mnt

dd if=/dev/urandom of=big bs=1M count=3 2>/dev/null || fail write
sum=$(md5sum < big); drop
is content "$(md5sum < big)" "$sum"

mkdir d; i=0; while [ $i -lt 60 ]; do echo $i > d/f$i; i=$((i+1)); done; drop
is number "$(ls d | wc -l)" 60
is values "$(cat d/* | sort -n | tail -n1)" 59
ln d/f0 d/hard; is links $(stat -c %h d/f0) 2
ln -s f1 d/soft; is symlink "$(cat d/soft)" 1
mv d/f2 d/moved; is rename "$(cat d/moved)" 2
chmod 4755 d/f3; is mode $(stat -c %a d/f3) 4755
chown 12:34 d/f4; is owner $(stat -c %u:%g d/f4) 12:34
truncate -s 1000000 d/f6; is size $(stat -c %s d/f6) 1000000
touch -d 2001-02-03 d/f7; is time "$(stat -c %y d/f7 | cut -c1-10)" 2001-02-03
echo a > d/append; echo b >> d/append; is append "$(tr -d '\n' < d/append)" ab
mknod d/null c 1 3; [ -c d/null ] || fail device
mkfifo d/fifo; (echo through > d/fifo &); is fifo "$(cat d/fifo)" through

exec 3<>d/f5; rm d/f5; echo hello >&3
is 'unlinked content' "$(cat /proc/self/fd/3)" hello
is 'unlinked size' $(stat -L -c %s /proc/self/fd/3) 6
exec 3>&-

mkdir -m 0770 volume; chown 0:2000 volume
su u -c 'echo mine > volume/group' || fail 'by right of the group'
is 'owner by group' "$(stat -c %u:%g volume/group)" 1000:2000
su w -c 'echo mine > volume/supplementary' || fail 'by right of a supplementary group'
is 'owner by supplementary group' "$(stat -c %u:%g volume/supplementary)" 1002:1002
su v -c 'echo mine > volume/other' 2>/dev/null && fail 'others may write'
chmod 6777 d/f8; su u -c 'echo x >> d/f8'; is 'mode after a write' $(stat -c %a d/f8) 777

cat outside/host-secret 2>/dev/null && fail 'a link led out of the folder'
"#;

const REMOVED: &str = "rm -r d || fail 'rm -r'\n";

const END: &str = "cd /; umount /mnt || fail umount\necho HUSK END; poweroff -f\n";

const DISK: &str = r#"
disk=/dev/$(grep -l ^data /sys/block/*/serial | cut -d/ -f4)
is cache "$(cat /sys/block/${disk#/dev/}/queue/write_cache)" 'write back'
mke2fs $disk > /dev/null || fail mke2fs
mount -t ext4 $disk /mnt || fail mount
dd if=/dev/urandom of=/mnt/big bs=1M count=3 conv=fsync 2>/dev/null || fail write
sum=$(md5sum < /mnt/big)
umount /mnt; mount -t ext4 $disk /mnt || fail remount
is content "$(md5sum < /mnt/big)" "$sum"
rm /mnt/big; fstrim /mnt || fail fstrim
umount /mnt
dd if=/dev/zero of=$disk bs=1M count=1 oflag=direct 2>/dev/null || fail direct
echo HUSK END; poweroff -f
"#;

/// A folder for [`FOLDER`], and one that it leads to.
fn folder() -> [tempfile::TempDir; 2] {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("host-secret"), "HUSK FAIL").unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    symlink(outside.path(), folder.path().join("outside")).unwrap();
    [folder, outside]
}

/// Debian's virtiofsd, as the shim starts it, and the end of its client.
fn virtiofsd(folder: &Path) -> (Child, UnixStream) {
    let program = std::env::var_os("HUSK_TEST_VIRTIOFSD").expect("set by ci/test, as the other");
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let client = UnixStream::connect(&socket).unwrap();
    let server = Command::new(program)
        .args(["--fd=3", "--no-announce-submounts", "--posix-acl"])
        .arg("--shared-dir")
        .arg(folder)
        .fd_mappings(vec![FdMapping {
            parent_fd: listener.into(),
            child_fd: 3,
        }])
        .unwrap()
        .spawn()
        .unwrap();
    (server, client)
}

#[track_caller]
fn assert_passed(guest: Guest) {
    let (reason, output) = guest.start().end();
    assert_eq!(reason, ExitReason::PowerOff, "{output}");
    assert!(
        !output.contains("HUSK FAIL") && output.contains("HUSK END"),
        "{output}"
    );
}

#[test]
fn a_shared_folder_behaves_as_a_file_system() {
    support::require_kvm!();
    let [folder, _outside] = folder();
    let mut guest = Guest::new(&[PRELUDE, FOLDER, REMOVED, END].concat());
    guest.config.shares = vec![ShareConfig {
        tag: "husk".to_owned(),
        path: folder.path().to_owned(),
        cache: CachePolicy::Auto,
        protocol: ShareProtocol::Fuse {
            writeback: false,
            dax_window_mib: 0,
        },
        watch: None,
    }];
    assert_passed(guest);
}

#[test]
fn a_folder_that_another_process_serves_does_so_too() {
    support::require_kvm!();
    let [folder, _outside] = folder();
    let (mut server, client) = virtiofsd(folder.path());
    // virtiofsd asks the host where in a folder it was, which a tmpfs before Linux 6.6 forgets when files are removed.
    let mut guest = Guest::new(&[PRELUDE, FOLDER, END].concat());
    // With memory that is there, and is not.
    guest.config.max_memory_mib = 2 * guest.config.memory_mib;
    guest.config.file_servers = vec![FileServerConfig {
        tag: "husk".to_owned(),
    }];
    guest.file_servers = vec![client.into()];
    assert_passed(guest);
    assert!(server.wait().unwrap().success(), "it ends with its client");
}

#[test]
fn a_disk_holds_a_file_system_and_gives_up_what_is_trimmed() {
    support::require_kvm!();
    let disk = support::file_of(&vec![0xff; 8 << 20]);
    let before = disk.metadata().unwrap().blocks();
    let mut guest = Guest::new(&[PRELUDE, DISK].concat());
    guest.disks = vec![disk.try_clone().unwrap()];
    guest.config.disks = vec![DiskConfig {
        serial: "data".to_owned(),
        read_only: false,
    }];
    assert_passed(guest);
    let after = disk.metadata().unwrap();
    assert_eq!(after.len(), 8 << 20);
    assert!(
        after.blocks() < before / 2,
        "{} of {before} blocks",
        after.blocks()
    );
}
