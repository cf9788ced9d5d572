//! Hooks of the runtime's namespace: programs of the host that are run around a container's life, with its OCI state on
//! their standard input (OCI runtime specification, "POSIX-platform Hooks").

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use log::warn;
use oci_spec::runtime::Hook;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::Error;

/// What of a hook's standard error goes into the error message, in bytes.
const MAX_STDERR: usize = 1024;

/// The container as a hook sees it.
#[derive(Debug, Clone)]
pub(crate) struct HookState<'a> {
    pub(crate) oci_version: &'a str,
    pub(crate) id: &'a str,
    pub(crate) pid: u32,
    pub(crate) bundle: &'a Path,
}

impl HookState<'_> {
    fn json(&self, status: &str) -> Vec<u8> {
        json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status,
            "pid": self.pid,
            "bundle": self.bundle,
        })
        .to_string()
        .into_bytes()
    }
}

/// Runs `hooks` in their order and stops at the first that fails.
pub(crate) async fn run(
    hook: &'static str,
    hooks: &[Hook],
    state: &HookState<'_>,
    status: &str,
) -> Result<(), Error> {
    for entry in hooks {
        run_one(entry, state.json(status))
            .await
            .map_err(|source| Error::Hook {
                hook,
                path: entry.path().clone(),
                source,
            })?;
    }
    Ok(())
}

/// Runs all of `hooks`, and logs those that fail: what the specification wants of poststart and poststop.
pub(crate) async fn run_all(
    hook: &'static str,
    hooks: &[Hook],
    state: &HookState<'_>,
    status: &str,
) {
    for entry in hooks {
        if let Err(err) = run_one(entry, state.json(status)).await {
            warn!("{hook} hook {} failed: {err}", entry.path().display());
        }
    }
}

async fn run_one(hook: &Hook, state: Vec<u8>) -> io::Result<()> {
    let mut command = Command::new(hook.path());
    command
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    // The first argument is argv[0], as for execv.
    if let Some((name, arguments)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(arguments);
    }
    for variable in hook.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(name, value);
    }
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take().expect("stdin is piped");

    let run = async {
        let feed = async move {
            match stdin.write_all(&state).await {
                // A hook need not read its state.
                Err(err) if err.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                result => result,
            }
        };
        let (fed, output) = tokio::join!(feed, child.wait_with_output());
        fed?;
        output
    };
    let output = match hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
    {
        Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds), run)
            .await
            .map_err(|_| {
                io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("not done after {seconds} s"),
                )
            })??,
        None => run.await?,
    };
    if output.status.success() {
        return Ok(());
    }
    let stderr = output.stderr.get(..MAX_STDERR).unwrap_or(&output.stderr);
    Err(io::Error::other(format!(
        "{}: {}",
        output.status,
        String::from_utf8_lossy(stderr).trim()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        serde_json::from_value(json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["NAME=value"], "timeout": timeout
        }))
        .unwrap()
    }

    fn state(bundle: &Path) -> HookState<'_> {
        HookState {
            oci_version: "1.1.0",
            id: "x",
            pid: 7,
            bundle,
        }
    }

    #[tokio::test]
    async fn hook_gets_state_and_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("echo $NAME > {0}; cat >> {0}", out.display());
        run(
            "createRuntime",
            &[hook(&script, None)],
            &state(dir.path()),
            "creating",
        )
        .await
        .unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        let (env, json) = text.split_once('\n').unwrap();
        assert_eq!(env, "value");
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(json["id"], "x");
        assert_eq!(json["status"], "creating");
        assert_eq!(json["pid"], 7);
    }

    #[tokio::test]
    async fn failing_hook_stops_the_row_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let never = dir.path().join("never");
        let hooks = [
            hook("echo no such luck >&2; exit 3", None),
            hook(&format!("touch {}", never.display()), None),
        ];
        let err = run("prestart", &hooks, &state(dir.path()), "creating")
            .await
            .unwrap_err();
        assert!(err.chain().contains("no such luck"), "{}", err.chain());
        assert!(!never.exists());
    }

    #[tokio::test]
    async fn hook_that_outlives_its_timeout_fails() {
        let err = run(
            "prestart",
            &[hook("sleep 60", Some(0))],
            &state(Path::new("/")),
            "creating",
        )
        .await
        .unwrap_err();
        assert!(
            err.chain().contains("not done after 0 s"),
            "{}",
            err.chain()
        );
    }
}
