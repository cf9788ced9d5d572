//! What libcontainer leaves undone of a container's file systems: how mounts propagate, and a working directory on one that
//! was empty before.
//!
//! It is done by the agent's own program in a role of its own: a createContainer hook, which libcontainer runs in the
//! container's namespaces when everything is mounted and the root is not changed yet. Most containers need none.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{Hook, HookBuilder, Mount, Spec};
use pathrs::Root;
use serde::{Deserialize, Serialize};

use crate::error::{During, Error, Result};
use crate::launch::OWN_PROGRAM;

/// The role of the agent's program in which it does this.
pub(crate) const FINISHER: &str = "finisher";

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finish {
    /// The container's root, in the namespace of the agent.
    root: PathBuf,
    /// To be made.
    working_directory: Option<PathBuf>,
    /// Mount points, in the container, and the names of how they are to propagate.
    propagation: Vec<(PathBuf, String)>,
}

impl Finish {
    /// What `spec` asks for that libcontainer does not do. Options that it does not know are put into words that it knows,
    /// or refused.
    pub(crate) fn of(spec: &mut Spec) -> Result<Self> {
        let rootfs_is_shared = prepare_rootfs_propagation(spec)?;
        let mut finish = Self::default();
        for mount in spec.mounts_mut().iter_mut().flatten() {
            let destination = mount.destination().clone();
            for option in mount.options_mut().iter_mut().flatten() {
                match option.as_str() {
                    // The same for the one mount that it is.
                    "nosymfollow" => *option = "rnosymfollow".to_owned(),
                    "symfollow" => *option = "rsymfollow".to_owned(),
                    "tmpcopyup" => {
                        return Err(Error::Invalid(format!(
                            "the option tmpcopyup of the mount {} is not supported: mount what is to be in it, or \
                             copy it in the container",
                            destination.display()
                        )));
                    }
                    name => {
                        let Some(flags) = propagation(name) else {
                            continue;
                        };
                        // Private, as all mounts of a guest are, unless they share with the root.
                        if rootfs_is_shared
                            || flags.intersects(MsFlags::MS_SHARED | MsFlags::MS_UNBINDABLE)
                        {
                            finish
                                .propagation
                                .push((destination.clone(), name.to_owned()));
                        }
                    }
                }
            }
        }
        Ok(finish)
    }

    /// Has the working directory made, on a mount that is not there yet.
    pub(crate) fn make(&mut self, working_directory: &Path) {
        self.working_directory = Some(working_directory.to_owned());
    }

    /// The hook of a container with this root; `None` if there is nothing to do.
    pub(crate) fn hook(mut self, root: &Path) -> Result<Option<Hook>> {
        if self == Self::default() {
            return Ok(None);
        }
        root.clone_into(&mut self.root);
        let order = serde_json::to_string(&self).map_err(|source| Error::Malformed {
            what: "an order",
            source,
        })?;
        let hook = HookBuilder::default()
            .path(OWN_PROGRAM)
            .args([OWN_PROGRAM, FINISHER, &order].map(str::to_owned))
            .build();
        hook.map(Some)
            .map_err(|error| Error::Invalid(error.to_string()))
    }

    fn carry_out(&self) -> Result<()> {
        let root = Root::open(&self.root).map_err(unresolved(&self.root))?;
        if let Some(folder) = &self.working_directory {
            root.mkdir_all(folder, &fs::Permissions::from_mode(0o755))
                .map_err(unresolved(folder))?;
        }
        for (point, name) in &self.propagation {
            let at: OwnedFd = root.resolve(point).map_err(unresolved(point))?.into();
            mount(
                None::<&str>,
                Path::new(&format!("/proc/self/fd/{}", at.as_raw_fd())),
                None::<&str>,
                propagation(name).unwrap_or(MsFlags::empty()),
                None::<&str>,
            )
            .during(format!("making the mount {} {name}", point.display()))?;
        }
        Ok(())
    }
}

/// The role: does what `order` says.
pub(crate) fn main(order: &str) -> ExitCode {
    let done = serde_json::from_str::<Finish>(order)
        .map_err(|source| Error::Malformed {
            what: "an order",
            source,
        })
        .and_then(|finish| finish.carry_out());
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the container's.
            eprintln!("husk-agent: {}", crate::error::chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// What an option of a mount says about how it propagates (mount(8)).
fn propagation(option: &str) -> Option<MsFlags> {
    let (name, depth) = match option.strip_prefix('r') {
        Some(name) => (name, MsFlags::MS_REC),
        None => (option, MsFlags::empty()),
    };
    let kind = match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(kind | depth)
}

/// libcontainer always changes the root with all that is mounted below, and has no names for that. Returns whether it
/// is shared.
fn prepare_rootfs_propagation(spec: &mut Spec) -> Result<bool> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(false);
    };
    let Some(wanted) = linux.rootfs_propagation().clone() else {
        return Ok(false);
    };
    let flags = propagation(&wanted).ok_or_else(|| {
        Error::Invalid(format!(
            "the rootfsPropagation {wanted:?} is none of shared, slave, private and unbindable, with or without an \
             r before it"
        ))
    })?;
    if flags.contains(MsFlags::MS_REC) {
        linux.set_rootfs_propagation(Some(wanted[1..].to_owned()));
    }
    Ok(flags.contains(MsFlags::MS_SHARED))
}

fn unresolved(path: &Path) -> impl FnOnce(pathrs::error::Error) -> Error {
    let what = format!("finding {} in the container", path.display());
    move |error| Error::Io {
        what,
        source: std::io::Error::other(error.to_string()),
    }
}

/// Whether a mount shows something that exists before the container does.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind")
        || options.any(|option| option == "bind" || option == "rbind")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(options: &Value, rootfs_propagation: &Value) -> Spec {
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "mounts": [{ "destination": "/m", "type": "tmpfs", "source": "tmpfs", "options": options }],
            "linux": {},
        });
        if !rootfs_propagation.is_null() {
            spec["linux"]["rootfsPropagation"] = rootfs_propagation.clone();
        }
        serde_json::from_value(spec).expect("a fair specification")
    }

    #[test]
    fn container_that_asks_for_nothing_particular_needs_no_hook() {
        for propagation in [json!(null), json!("rslave"), json!("private")] {
            let mut spec = spec(&json!(["ro", "rprivate", "slave"]), &propagation);
            let finish = Finish::of(&mut spec).expect("all is known");
            assert_eq!(finish.hook(Path::new("/r")).expect("plain data"), None);
        }
    }

    #[test]
    fn propagation_that_differs_is_done_by_the_hook() {
        let wanted = |options: Value, root: Value| {
            let finish = Finish::of(&mut spec(&options, &root)).expect("all is known");
            finish.propagation
        };
        let one = |name: &str| vec![(PathBuf::from("/m"), name.to_owned())];
        assert_eq!(wanted(json!(["rshared"]), json!(null)), one("rshared"));
        assert_eq!(
            wanted(json!(["unbindable"]), json!(null)),
            one("unbindable")
        );
        assert_eq!(wanted(json!(["private"]), json!("rshared")), one("private"));
    }

    #[test]
    fn hook_carries_the_order() {
        let mut finish = Finish::default();
        finish.make(Path::new("/work"));
        let hook = finish.hook(Path::new("/r")).expect("plain data");
        let args = hook.expect("something to do").args().clone();
        let args = args.expect("it has some");
        assert_eq!(args[1], FINISHER);
        let order: Finish = serde_json::from_str(&args[2]).expect("an order");
        assert_eq!(order.root, Path::new("/r"));
        assert_eq!(order.working_directory.as_deref(), Some(Path::new("/work")));
    }

    #[test]
    fn words_that_libcontainer_lacks_are_put_into_its_own() {
        let mut spec = spec(&json!(["nosymfollow"]), &json!("rshared"));
        Finish::of(&mut spec).expect("all is known");
        let spec = serde_json::to_value(&spec).expect("plain data");
        assert_eq!(spec["mounts"][0]["options"], json!(["rnosymfollow"]));
        assert_eq!(spec["linux"]["rootfsPropagation"], "shared");
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        let error = Finish::of(&mut spec(&json!(["tmpcopyup"]), &json!(null)));
        let error = error.expect_err("not supported").to_string();
        assert!(
            error.contains("tmpcopyup") && error.contains("/m"),
            "{error}"
        );
        let error = Finish::of(&mut spec(&json!([]), &json!("rsomehow")));
        let error = error.expect_err("unknown").to_string();
        assert!(error.contains("rsomehow"), "{error}");
    }

    #[test]
    fn working_directory_is_made_below_the_root() {
        let root = tempfile::tempdir().expect("a folder");
        let finish = Finish {
            root: root.path().to_owned(),
            working_directory: Some("/a/b".into()),
            propagation: Vec::new(),
        };
        finish.carry_out().expect("it can be made");
        assert!(root.path().join("a/b").is_dir());
    }
}
