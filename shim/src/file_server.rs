//! The file server of a pod, where husk.toml names one (`storage.server`): a program with virtiofsd's options, beside the
//! worker, which is its only client. It is born into the pod's cgroup and in the shim's mount namespace, so that it can make
//! one of its own into which goes on to propagate what is mounted below the shared folder. It has no other files than
//! those: what else it gives up is its own to do.
//!
//! It ends when the worker does, whose end of the socket it serves; dies with the shim; and is killed if it stays.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use husk_config::{Cache, Storage};
use log::{info, warn};
use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::console::{LastLines, follow};
use crate::error::Error;
use crate::vmm::set_oom_score_adj;

/// The descriptor on which it finds its listening socket.
const SOCKET: i32 = 3;

/// How long it may take to end once its client is gone.
const END_LIMIT: Duration = Duration::from_secs(5);

/// How long its last words may take, once it is gone.
const WORDS_LIMIT: Duration = Duration::from_secs(1);

/// A server that runs. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct FileServer {
    child: Child,
    words: JoinHandle<()>,
    last: LastLines,
}

impl FileServer {
    /// Starts `program` on the folder `share`, and returns the client's end of its socket.
    ///
    /// It dies with the thread that called this, as the worker does: see [`crate::vmm::spawn`].
    pub(crate) fn spawn(
        program: &Path,
        share: &Path,
        storage: &Storage,
    ) -> Result<(Self, OwnedFd), Error> {
        let failed = |source| Error::FileServer {
            path: program.to_owned(),
            source,
        };
        let (listener, client) = listen(&share.with_file_name("server")).map_err(failed)?;
        let mut command = Command::new(program);
        command
            .arg(format!("--fd={SOCKET}"))
            .arg("--shared-dir")
            .arg(share)
            .args(options(storage))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .fd_mappings(vec![FdMapping {
                parent_fd: listener.into(),
                child_fd: SOCKET,
            }])
            .expect("one descriptor cannot collide");
        // SAFETY: between fork and exec it makes two system calls, and neither allocates nor takes a lock.
        unsafe { command.pre_exec(confine) };
        let mut child = command.spawn().map_err(failed)?;
        set_oom_score_adj(child.id().expect("not yet waited for"), 0)?;
        let last = LastLines::default();
        let stderr = child.stderr.take().expect("stderr is piped");
        let lines = last.clone();
        let words = tokio::spawn(async move { follow(stderr, "file server", lines).await });
        Ok((Self { child, words, last }, client))
    }

    /// Waits until it ends by itself. May be cancelled.
    pub(crate) async fn ended(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Returns when it is gone, after its client is; says how it ended, and what it said last.
    pub(crate) async fn finish(mut self) -> String {
        let ended = tokio::time::timeout(END_LIMIT, self.child.wait()).await;
        let status = match ended {
            Ok(status) => status,
            Err(_) => {
                warn!("the file server does not end, and is killed");
                self.kill();
                self.child.wait().await
            }
        };
        if tokio::time::timeout(WORDS_LIMIT, self.words).await.is_err() {
            warn!("somebody outlives the file server");
        }
        let how = match status {
            Ok(status) => status.to_string(),
            Err(err) => format!("nobody knows how: {err}"),
        };
        info!("the file server has ended ({how})");
        let words = self.last.epilogue("the file server's standard error");
        format!("the file server has ended ({how}){words}")
    }

    /// Kills it, and the process that it has put into a PID namespace, which would only be asked to end.
    fn kill(&mut self) {
        let Some(pid) = self.child.id() else { return };
        let path = PathBuf::from(format!("/proc/{pid}/task/{pid}/children"));
        let children = std::fs::read_to_string(path).unwrap_or_default();
        // Theirs as long as it has not ended, and waited for them.
        for child in children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
        {
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        let _ = self.child.start_kill();
    }
}

/// What virtiofsd is told. What the guest sees of mounts, extended attributes and ACLs is what the worker would show, and so is
/// what is cached, but that it has no word for a guest that maps what is not.
fn options(storage: &Storage) -> Vec<&'static str> {
    let mut options = vec![
        "--sandbox=namespace",
        "--no-announce-submounts",
        "--posix-acl",
    ];
    options.extend(match storage.cache() {
        Cache::Auto => &["--cache=auto"] as &[_],
        Cache::None => &["--cache=never", "--allow-mmap"],
        Cache::Always => &["--cache=always"],
    });
    if storage.writeback() && storage.cache() != Cache::None {
        options.push("--writeback");
    }
    options
}

/// A listening socket, and one that is connected to it before anybody else could be: virtiofsd takes no other kind. The path is
/// seen by nobody outside of the shim's mount namespace, and by nobody afterwards.
fn listen(path: &Path) -> io::Result<(UnixListener, OwnedFd)> {
    let listener = UnixListener::bind(path)?;
    let client = UnixStream::connect(path);
    std::fs::remove_file(path)?;
    Ok((listener, client?.into()))
}

/// Runs in the new process: it dies with the shim, and keeps nothing open that was not given to it.
fn confine() -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    const FIRST: libc::c_uint = SOCKET as libc::c_uint + 1;
    // SAFETY: nothing is closed before the new program runs.
    match unsafe {
        libc::close_range(
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC.cast_signed(),
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(keys: &str) -> Storage {
        let text = format!("[storage]\nserver = \"/server\"\n{keys}");
        let config = husk_config::Config::from_toml(&text, "test").unwrap();
        config.storage().clone()
    }

    /// A server that is a script, in a folder of its own, which is its argument.
    fn spawn(script: &str) -> (tempfile::TempDir, FileServer, OwnedFd) {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        // By another process: what another test starts meanwhile could inherit a file that is open for writing, which nobody can
        // run then.
        let written = std::process::Command::new("/bin/sh")
            .args([
                "-c",
                "printf '#!/bin/sh\n%s\n' \"$1\" >\"$2\"",
                "sh",
                script,
            ])
            .arg(&program)
            .status();
        assert!(written.unwrap().success());
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let share = folder.path().join("share");
        let (server, client) = FileServer::spawn(&program, &share, &storage("")).unwrap();
        (folder, server, client)
    }

    #[test]
    fn options_are_those_of_the_policy() {
        let with = |keys| options(&storage(keys))[3..].join(" ");
        assert_eq!(with(""), "--cache=auto");
        assert_eq!(with("cache = \"none\""), "--cache=never --allow-mmap");
        assert_eq!(
            with("cache = \"none\"\nwriteback = true"),
            with("cache = \"none\"")
        );
        assert_eq!(
            with("cache = \"always\"\nwriteback = true"),
            "--cache=always --writeback"
        );
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let share = folder.path().join("share");
        let err = FileServer::spawn(Path::new("/absent/server"), &share, &storage("")).unwrap_err();
        assert_eq!(
            err.chain(),
            "cannot start the file server /absent/server, the one of storage.server in husk.toml: \
             no such file or directory"
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn it_gets_a_socket_and_no_path_and_its_end_is_told() {
        let (folder, server, client) = spawn("ls -l /proc/$$/fd >&2; echo $# $1 $3 >&2; exit 7");
        let told = server.finish().await;
        let share = folder.path().join("share");
        assert!(
            told.starts_with("the file server has ended (exit status: 7)"),
            "{told}"
        );
        assert!(
            told.contains(&format!("7 --fd=3 {}", share.display())),
            "{told}"
        );
        assert_eq!(told.matches("socket:").count(), 1, "{told}");
        assert!(!folder.path().join("server").exists());
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_stays_is_killed_with_its_children() {
        let (_folder, server, client) = spawn("sleep 1000 & echo child $! >&2; trap '' TERM; wait");
        drop(client);
        let told = server.finish().await;
        assert!(told.contains("signal: 9 (SIGKILL)"), "{told}");
        let child = told.split_whitespace().last().unwrap();
        // Init, or whoever takes orphans, may not have seen it yet.
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    }
}
