//! Whether containerd would find the shim, and the one that belongs to this tool.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::report::Problem;

/// How containerd derives it from the runtime type `io.containerd.husk.v2`.
const BINARY: &str = "containerd-shim-husk-v2";

const INSTALL: &str = "\
Install it into a folder of containerd's PATH, for example /usr/local/bin. (What was searched is this tool's PATH.)";
const REPLACE: &str =
    "Shim, guest and this tool are built and installed together: install all of one version.";

/// Returns the program and its version.
pub(super) fn check(search_path: Option<&OsStr>) -> Result<(PathBuf, String), Problem> {
    let path = search_path
        .and_then(find)
        .ok_or_else(|| Problem::new(format!("there is no {BINARY} on the PATH"), INSTALL))?;
    let problem = |what: String| Problem::new(format!("{}: {what}", path.display()), REPLACE);
    let output = Command::new(&path)
        .arg("-v")
        .output()
        .map_err(|err| problem(format!("cannot be run: {err}")))?;
    if !output.status.success() {
        return Err(problem(format!("-v failed: {}", output.status)));
    }
    let version = version(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| problem("-v told no version".to_owned()))?;
    let own = env!("CARGO_PKG_VERSION");
    if version != own {
        return Err(problem(format!("is version {version}, this tool is {own}")));
    }
    Ok((path, version))
}

/// The first executable file of that name in a list of folders such as `$PATH`.
fn find(search_path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(search_path)
        .map(|folder| folder.join(BINARY))
        .find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The version in what `-v` prints, as every shim prints it: a line `Version: 1.2.3`.
fn version(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        line.trim()
            .strip_prefix("Version:")
            .map(|version| version.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::write_program;
    use super::*;

    fn check_fake(script: &str, mode: u32) -> Result<(PathBuf, String), Problem> {
        let folder = tempfile::tempdir().unwrap();
        write_program(&folder.path().join(BINARY), script, mode);
        check(Some(folder.path().as_os_str()))
    }

    #[test]
    fn shim_of_this_version_is_ok() {
        let script = format!(
            "[ \"$1\" = -v ] && printf 'shim:\\n  Version: {}\\n  Revision: x\\n'",
            env!("CARGO_PKG_VERSION")
        );
        assert!(check_fake(&script, 0o755).is_ok());
    }

    #[test]
    fn shim_of_another_version_is_named() {
        let problem = check_fake("echo '  Version: 0.0.0-other'", 0o755).unwrap_err();
        assert!(
            problem.what.contains("is version 0.0.0-other"),
            "{problem:?}"
        );
        assert_eq!(problem.remedy, REPLACE);
    }

    #[test]
    fn shim_that_fails_or_tells_nothing_is_a_problem() {
        assert!(
            check_fake("exit 3", 0o755)
                .unwrap_err()
                .what
                .contains("exit status: 3")
        );
        assert!(
            check_fake("true", 0o755)
                .unwrap_err()
                .what
                .contains("no version")
        );
    }

    #[test]
    fn file_that_is_not_executable_is_not_found() {
        let problem = check_fake("true", 0o644).unwrap_err();
        assert_eq!(problem.remedy, INSTALL);
    }

    #[test]
    fn no_path_finds_nothing() {
        assert!(check(None).is_err());
    }
}
