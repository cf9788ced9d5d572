//! Whether the file server that husk.toml names can be run.

use std::path::Path;
use std::process::Command;

use super::report::Problem;

const REMEDY: &str = "Install virtiofsd, or a program with its options; storage.server in husk.toml says where it is. Without the key, husk serves files itself.";

/// Returns what the program says of itself.
pub(super) fn check(path: &Path) -> Result<String, Problem> {
    let problem = |what: String| Problem::new(format!("{}: {what}", path.display()), REMEDY);
    let output = Command::new(path)
        .arg("--version")
        .env_clear()
        .output()
        .map_err(|err| problem(format!("cannot be run: {err}")))?;
    if !output.status.success() {
        return Err(problem(format!("--version failed: {}", output.status)));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.lines().next().unwrap_or_default();
    Ok(format!("{}, {version}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::write_program;
    use super::*;

    #[test]
    fn server_is_asked_for_its_version() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server");
        write_program(&path, "[ \"$*\" = --version ] && echo server 1.2", 0o755);
        let found = check(&path).unwrap();
        assert_eq!(found, format!("{}, server 1.2", path.display()));
    }

    #[test]
    fn server_that_cannot_be_run_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server");
        let problem = check(&path).unwrap_err();
        assert!(
            problem.what.contains("server: cannot be run"),
            "{problem:?}"
        );
        write_program(&path, "exit 3", 0o755);
        let problem = check(&path).unwrap_err();
        assert!(problem.what.contains("exit status: 3"), "{problem:?}");
        assert_eq!(problem.remedy, REMEDY);
    }
}
