//! The last steps of a container's process before it becomes the user's program: finding the program, waiting at the
//! gate, confining itself, execve. libcontainer calls this inside the container's namespaces.
//!
//! libcontainer has an executor of its own, but that one insists on PATH, forgets the order of the environment, and
//! cannot tell the agent whether the program was executed.

use std::collections::HashMap;
use std::env;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use libcontainer::capabilities;
use libcontainer::syscall::linux::LinuxSyscall;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Process, Spec, User};
use rustix::fs::Access;

use super::Reporter;
use crate::launch::{Confinement, OWN_PROGRAM, Report};
use crate::pause;

/// What execvp(3) searches without a PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The user's program, and what to do before it runs.
#[derive(Clone, Debug)]
pub(super) struct Program {
    reporter: Reporter,
    gate: Option<Arc<OwnedFd>>,
    confinement: Option<Confinement>,
    /// That of the confinement's identity, while the agent's /proc could still be seen.
    user_namespace: Option<Arc<OwnedFd>>,
    /// The agent's own program, to be run in the place of the user's in a pod's sandbox.
    pause: Option<Arc<File>>,
    /// Found by `validate`, used by `exec`: between them, the process gives up rights that finding it may need.
    path: Arc<Mutex<PathBuf>>,
}

impl Program {
    pub(super) fn new(
        reporter: Reporter,
        gate: Option<OwnedFd>,
        confinement: Option<Confinement>,
    ) -> io::Result<Self> {
        let user_namespace = confinement
            .as_ref()
            .and_then(|confinement| confinement.identity.as_ref())
            .map(|identity| File::open(format!("/proc/{}/ns/user", identity.with)))
            .transpose()?;
        Ok(Self {
            reporter,
            gate: gate.map(Arc::new),
            confinement,
            user_namespace: user_namespace.map(|namespace| Arc::new(namespace.into())),
            pause: None,
            path: Arc::default(),
        })
    }

    /// That of a pod's sandbox.
    pub(super) fn pause(reporter: Reporter) -> io::Result<Self> {
        let own_program = File::open(OWN_PROGRAM)?;
        Ok(Self {
            pause: Some(Arc::new(own_program)),
            ..Self::new(reporter, None, None)?
        })
    }

    /// libcontainer reports this too, in more words; the agent keeps the first report.
    fn fail(&self, message: &str) {
        self.reporter.tell(&Report::Failed {
            message: message.to_owned(),
        });
    }

    fn confine(&self) -> Result<(), String> {
        let Some(confinement) = &self.confinement else {
            return Ok(());
        };
        if let (Some(namespace), Some(identity)) = (&self.user_namespace, &confinement.identity) {
            become_user(namespace.as_fd(), &identity.user)
                .map_err(|error| format!("the user: {}", describe(error)))?;
            // Changing the user has put them out of effect.
            capabilities::reset_effective(&LinuxSyscall)
                .map_err(|error| format!("the capabilities: {}", crate::error::chain(&error)))?;
        }
        if let Some(seccomp) = &confinement.seccomp {
            libcontainer::seccomp::initialize_seccomp(seccomp)
                .map_err(|error| format!("the seccomp filter: {}", crate::error::chain(&error)))?;
        }
        if let Some(capabilities) = &confinement.late_capabilities {
            capabilities::drop_privileges(capabilities, &LinuxSyscall)
                .map_err(|error| format!("the capabilities: {}", crate::error::chain(&error)))?;
        }
        Ok(())
    }

    fn execute(&self, process: &Process) -> Result<(), String> {
        if let Some(own_program) = &self.pause {
            self.reporter.tell(&Report::Executing);
            let error = pause::execute(own_program);
            return Err(format!("the pod's sandbox: {}", describe(error)));
        }
        let path = self
            .path
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let name = path.display().to_string();
        let path = CString::new(path.as_os_str().as_bytes());
        let strings = |strings: &Option<Vec<String>>| -> Result<Vec<CString>, _> {
            strings
                .iter()
                .flatten()
                .map(|text| CString::new(text.as_str()))
                .collect()
        };
        let (Ok(path), Ok(args), Ok(env)) = (path, strings(process.args()), strings(process.env()))
        else {
            return Err(format!(
                "exec {name}: an argument or variable contains a NUL"
            ));
        };
        // Rust's runtime ignores SIGPIPE, which execve would hand on.
        // SAFETY: the default action is no handler whose code could be unfit to run.
        if let Err(error) = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) } {
            return Err(format!("exec {name}: {}", describe(error)));
        }
        self.reporter.tell(&Report::Executing);
        let Err(error) = nix::unistd::execve(&path, &args, &env);
        Err(format!("exec {name}: {}", describe(error)))
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        if self.pause.is_some() {
            return Ok(());
        }
        let process = spec.process().as_ref();
        let name = process.and_then(|process| process.args().as_ref()?.first());
        let found = match (process, name) {
            (Some(process), Some(name)) => find(name, &search_path(process)),
            _ => Err("the process has no program: args is empty".to_owned()),
        };
        match found {
            Ok(path) => *self.path.lock().unwrap_or_else(PoisonError::into_inner) = path,
            Err(message) => {
                self.fail(&message);
                return Err(ExecutorValidationError::ArgValidationError(message));
            }
        }
        if let Some(gate) = &self.gate {
            // Nothing is sent: the agent closes its end.
            let _closed = gate.try_clone().map(|gate| File::from(gate).read(&mut [0]));
        }
        Ok(())
    }

    fn setup_envs(&self, _envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // `exec` passes the environment as the specification orders it.
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Some(process) = spec.process() else {
            return Err(ExecutorError::InvalidArg);
        };
        let Err(message) = self.confine().and_then(|()| self.execute(process)) else {
            return Ok(());
        };
        self.fail(&message);
        Err(ExecutorError::Other(message))
    }
}

/// Enters a user namespace, with every capability in it, and becomes one of its users.
fn become_user(namespace: BorrowedFd<'_>, user: &User) -> nix::Result<()> {
    // From here on it is in reach of the container's root, and has still the agent's memory.
    prctl::set_dumpable(false)?;
    setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setgroups(&groups)?;
    setresgid(gid, gid, gid)?;
    // The capabilities are given up once the filter is installed.
    prctl::set_keepcaps(true)?;
    setresuid(uid, uid, uid)?;
    prctl::set_keepcaps(false)
}

fn search_path(process: &Process) -> String {
    process
        .env()
        .iter()
        .flatten()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH)
        .to_owned()
}

/// Finds a program as a shell would. Errors are in runc's words, which people search for.
fn find(name: &str, search_path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(error) => Err(format!(
                "exec: \"{name}\": stat {name}: {}",
                describe(error)
            )),
        };
    }
    let mut refused = None;
    for folder in env::split_paths(search_path) {
        let folder = if folder.as_os_str().is_empty() {
            PathBuf::from(".")
        } else {
            folder
        };
        let path = folder.join(name);
        match check(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                refused.get_or_insert(error);
            }
            Err(_) => {}
        }
    }
    Err(match refused {
        Some(error) => format!("exec: \"{name}\": {}", describe(error)),
        None => format!("exec: \"{name}\": executable file not found in $PATH"),
    })
}

/// Whether this process, as the user that it is by now, may execute a file.
fn check(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    rustix::fs::accessat(
        rustix::fs::CWD,
        path,
        Access::EXEC_OK,
        rustix::fs::AtFlags::EACCESS,
    )?;
    Ok(())
}

/// The system's text without Rust's error number, in lower case as Go has it.
fn describe(error: impl Into<io::Error>) -> String {
    let error = error.into();
    match error.raw_os_error() {
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_lowercase(),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn folder() -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, mode) in [("runs", 0o755), ("text", 0o644)] {
            let path = folder.path().join(name);
            fs::write(&path, "").expect("a file");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("ours");
        }
        fs::create_dir(folder.path().join("dir")).expect("a folder");
        let path = folder.path().display().to_string();
        (folder, path)
    }

    #[test]
    fn program_is_found_in_path() {
        let (folder, path) = folder();
        let found = find("runs", &format!("/nowhere:{path}")).expect("it is there");
        assert_eq!(found, folder.path().join("runs"));
    }

    #[test]
    fn missing_program_is_named_as_runc_does() {
        let error = find("xyz", "/nowhere").expect_err("it is not there");
        assert_eq!(error, "exec: \"xyz\": executable file not found in $PATH");
        let error = find("/no/xyz", "").expect_err("it is not there");
        assert_eq!(
            error,
            "exec: \"/no/xyz\": stat /no/xyz: no such file or directory"
        );
    }

    #[test]
    fn file_that_may_not_be_executed_is_refused() {
        let (_folder, path) = folder();
        for name in ["text", "dir"] {
            let error = find(name, &path).expect_err("it does not run");
            assert_eq!(error, format!("exec: \"{name}\": permission denied"));
        }
    }
}
