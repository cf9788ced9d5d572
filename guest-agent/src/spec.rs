//! From the specification that the shim sends to the one that libcontainer runs: what the guest knows better than the
//! host is put in, what the guest does not have is taken out, and what libcontainer would do differently from runc is
//! spelled out.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::Pid;
use oci_spec::runtime::{
    Capabilities, Hooks, Linux, LinuxCapabilities, LinuxIdMapping, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResources, LinuxSeccomp, Mount, PosixRlimitBuilder, PosixRlimitType,
    Process, Spec, User,
};
use pathrs::Root;
use pathrs::flags::OpenFlags;
use serde_json::json;

use crate::cgroup::Cgroup;
use crate::devices::{self, Node};
use crate::error::{During, Error, Result};
use crate::finish::{self, Finish};
use crate::pause;
use crate::storage;

/// Most of a container's `/etc/passwd` that is read: more users than any image has.
const MAX_PASSWD_BYTES: u64 = 1 << 20;

/// The first port that may be bound without rights over the network.
const PRIVILEGED_PORTS: &str = "net.ipv4.ip_unprivileged_port_start";

/// What containerd gives a sandbox: of a pod it is to be the last that the OOM killer takes.
const SANDBOX_OOM_SCORE_ADJ: i32 = -998;

/// A specification that is ready for libcontainer, and what the agent keeps of it.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) spec: Spec,
    /// Parameters of the network: the guest's, because the guest is the pod's network namespace.
    pub(crate) network_sysctls: Vec<(String, String)>,
}

/// Prepares the specification of a container. Devices are looked up with `lookup`.
pub(crate) fn prepare(
    mut spec: Spec,
    container_id: &str,
    terminal: bool,
    lookup: impl Fn(&Path) -> Option<Node>,
) -> Result<Prepared> {
    let root = spec
        .root()
        .as_ref()
        .map(|root| root.path().clone())
        .ok_or_else(|| missing("root"))?;
    fs::metadata(&root).during(format!("finding the root file system {}", root.display()))?;
    let mounts = spec.mounts().clone().unwrap_or_default();
    if let Some(process) = spec.process() {
        check_user(&spec, process.user())?;
    }
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or_else(|| missing("process"))?;
    prepare_process(process, terminal, &root, None);
    limit_locked_memory(process);
    let cwd = process.cwd().clone();
    let mut finish = Finish::of(&mut spec)?;
    if !make_working_directory(&cwd, &root, &mounts) {
        finish.make(&cwd);
    }
    let mut hooks = spec.hooks().as_ref().and_then(guest_hooks);
    if let Some(hook) = finish.hook(&root)? {
        hooks
            .get_or_insert_default()
            .set_create_container(Some(vec![hook]));
    }
    spec.set_hooks(hooks);

    let linux = spec.linux_mut().as_mut().ok_or_else(|| missing("linux"))?;
    devices::adapt(linux, lookup)?;
    set_namespaces(linux);
    linux.set_cgroups_path(Some(Cgroup::name(container_id).into()));
    if let Some(resources) = linux.resources_mut() {
        translate_limits(resources);
    }
    if linux.seccomp().as_ref().is_some_and(has_listener) {
        return Err(Error::Invalid(
            "a seccomp listener is on the host, where a guest cannot send descriptors".to_owned(),
        ));
    }
    let network_sysctls = take_network_sysctls(linux);
    if has_user_namespace(&spec) {
        bind_sysfs(spec.mounts_mut().as_deref_mut().unwrap_or_default());
    }
    Ok(Prepared {
        spec,
        network_sysctls,
    })
}

/// Prepares the specification of a pod's sandbox, whose root is the empty folder `root`. Of what is given, the namespaces,
/// the host name and the sysctls count; the process is the agent's own program, which needs no rights.
pub(crate) fn prepare_sandbox(given: &Spec, container_id: &str, root: &Path) -> Result<Prepared> {
    let given_linux = given.linux().as_ref().ok_or_else(|| missing("linux"))?;
    let protection = given.process().as_ref().and_then(Process::oom_score_adj);
    let process = json!({
        "cwd": "/",
        "args": [pause::NAME.to_string_lossy()],
        "user": { "uid": 0, "gid": 0 },
        "capabilities": {},
        "noNewPrivileges": true,
        "oomScoreAdj": protection.unwrap_or(SANDBOX_OOM_SCORE_ADJ),
    });
    let spec = json!({
        "ociVersion": given.version(),
        "root": { "path": root },
        "process": process,
        "hostname": given.hostname(),
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
        ],
        "linux": {
            "namespaces": given_linux.namespaces(),
            "uidMappings": given_linux.uid_mappings(),
            "gidMappings": given_linux.gid_mappings(),
            "sysctl": given_linux.sysctl(),
        },
    });
    let mut spec: Spec = serde_json::from_value(spec).map_err(|source| Error::Malformed {
        what: "the sandbox's specification",
        source,
    })?;
    let linux = spec.linux_mut().as_mut().ok_or_else(|| missing("linux"))?;
    set_namespaces(linux);
    linux.set_cgroups_path(Some(Cgroup::name(container_id).into()));
    let network_sysctls = take_network_sysctls(linux);
    Ok(Prepared {
        spec,
        network_sysctls,
    })
}

/// Prepares a process: the first one, or one of exec, for which `container` is the first process' specification.
/// `root` is where the container's `/etc/passwd` is found.
pub(crate) fn prepare_process(
    process: &mut Process,
    terminal: bool,
    root: &Path,
    container: Option<&Process>,
) {
    process.set_terminal(Some(terminal));
    // libcontainer takes a false for a true when it orders seccomp and capabilities.
    process.set_no_new_privileges(process.no_new_privileges().filter(|set| *set));
    // The guest kernel has neither; containerd names profiles of the host's.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    // Nothing may inherit the agent's own protection.
    let inherited = container.and_then(Process::oom_score_adj);
    process.set_oom_score_adj(process.oom_score_adj().or(inherited).or(Some(0)));
    // As runc has it: those of the container, or else none. libcontainer would leave all of them.
    if process.capabilities().is_none() {
        let inherited = container.and_then(|container| container.capabilities().clone());
        process.set_capabilities(inherited.or_else(|| Some(no_capabilities())));
    }
    set_home(process, root);
}

/// The root of a process, as a folder: the entry of proc(5) itself is a link, which a [`Root`] does not follow.
pub(crate) fn root_of(pid: Pid) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root/."))
}

/// Whether the folder `path` exists below `root`, as the container would resolve it.
pub(crate) fn has_folder(root: &Path, path: &Path) -> bool {
    Root::open(root)
        .and_then(|root| root.resolve(path))
        .and_then(|handle| handle.reopen(OpenFlags::O_DIRECTORY | OpenFlags::O_CLOEXEC))
        .is_ok()
}

fn no_capabilities() -> LinuxCapabilities {
    // The default are some.
    let mut none = LinuxCapabilities::default();
    none.set_bounding(Some(Capabilities::new()))
        .set_effective(Some(Capabilities::new()))
        .set_inheritable(Some(Capabilities::new()))
        .set_permitted(Some(Capabilities::new()))
        .set_ambient(Some(Capabilities::new()));
    none
}

/// HOME as runc sets it. libcontainer would ask glibc, whose name service of a static program loads libraries from the
/// container.
fn set_home(process: &mut Process, root: &Path) {
    let uid = process.user().uid();
    let env = process.env_mut().get_or_insert_default();
    if env.iter().any(|entry| {
        entry
            .strip_prefix("HOME=")
            .is_some_and(|home| !home.is_empty())
    }) {
        return;
    }
    // No such file, or not a text: nobody has a home, as with runc.
    let passwd = read_small(root, "/etc/passwd").unwrap_or_default();
    env.retain(|entry| !entry.starts_with("HOME="));
    env.push(format!("HOME={}", home_of(&passwd, uid)));
}

/// Reads a file of a container. The container may have put there what it likes: a FIFO must not stop the agent, nor an
/// endless device fill its memory.
fn read_small(root: &Path, path: &str) -> Option<String> {
    let flags = OpenFlags::O_RDONLY | OpenFlags::O_NONBLOCK | OpenFlags::O_NOCTTY;
    let file = Root::open(root).ok()?.open_subpath(path, flags).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(MAX_PASSWD_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

fn home_of(passwd: &str, uid: u32) -> &str {
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).and_then(|field| field.parse().ok()) == Some(uid))
        .and_then(|fields| fields.get(5).copied())
        .filter(|home| !home.is_empty())
        .unwrap_or("/")
}

/// libcgroups raises the limit of locked memory to load a BPF program, and the container would inherit that.
fn limit_locked_memory(process: &mut Process) {
    let mut rlimits = process.rlimits().clone().unwrap_or_default();
    if rlimits
        .iter()
        .any(|limit| limit.typ() == PosixRlimitType::RlimitMemlock)
    {
        return;
    }
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK)
        && let Ok(limit) = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitMemlock)
            .soft(soft)
            .hard(hard)
            .build()
    {
        rlimits.push(limit);
        process.set_rlimits(Some(rlimits));
    }
}

/// runc makes the first process' working directory if there is none: in the image, or in the folder that is bound there.
/// False if there is to be something else, which is not mounted yet.
fn make_working_directory(cwd: &Path, root: &Path, mounts: &[Mount]) -> bool {
    let mount = mounts
        .iter()
        .filter(|mount| cwd.starts_with(mount.destination()))
        .max_by_key(|mount| mount.destination().as_os_str().len());
    let (root, folder) = match mount {
        None => (root, cwd),
        Some(mount) => {
            let inside = cwd.strip_prefix(mount.destination()).unwrap_or(cwd);
            match mount.source() {
                Some(source) if finish::is_bind(mount) => (source.as_path(), inside),
                // Its root will be there.
                _ => return inside.as_os_str().is_empty(),
            }
        }
    };
    let made = Root::open(root)
        .and_then(|root| root.mkdir_all(folder, &fs::Permissions::from_mode(0o755)));
    if let Err(error) = made {
        // Nothing may be written there: what matters is whether the process can enter it.
        tracing::debug!(%error, "the working directory was not made");
    }
    true
}

/// The hooks that are programs of the container; the shim has run, or will run, those of the host.
fn guest_hooks(hooks: &Hooks) -> Option<Hooks> {
    let mut kept = Hooks::default();
    kept.set_start_container(hooks.start_container().clone());
    (kept != Hooks::default()).then_some(kept)
}

fn set_namespaces(linux: &mut Linux) {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    // The guest is the network namespace.
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    // A host with cgroup v1 asks for none, and its containers would see all of the guest's.
    if !namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup)
        && let Ok(cgroup) = LinuxNamespaceBuilder::default()
            .typ(LinuxNamespaceType::Cgroup)
            .build()
    {
        namespaces.push(cgroup);
    }
    linux.set_namespaces(Some(namespaces));
}

/// Whether root of the container is another user of the guest.
pub(crate) fn has_user_namespace(spec: &Spec) -> bool {
    spec.linux()
        .iter()
        .filter_map(|linux| linux.namespaces().as_ref())
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User)
}

/// Who user `id` of a container is in the guest.
pub(crate) fn uid_in_guest(container: &Spec, id: u32) -> Result<u32> {
    id_in_guest(container, Linux::uid_mappings, id).ok_or_else(|| unmapped("user", id))
}

/// What group `id` of a container is in the guest.
pub(crate) fn gid_in_guest(container: &Spec, id: u32) -> Result<u32> {
    id_in_guest(container, Linux::gid_mappings, id).ok_or_else(|| unmapped("group", id))
}

/// Refuses a user that the container's user namespace does not have: the kernel would only call it invalid.
pub(crate) fn check_user(container: &Spec, user: &User) -> Result<()> {
    uid_in_guest(container, user.uid())?;
    gid_in_guest(container, user.gid())?;
    for gid in user.additional_gids().iter().flatten() {
        gid_in_guest(container, *gid)?;
    }
    Ok(())
}

/// Without a user namespace, an id is the same in the guest.
fn id_in_guest(
    container: &Spec,
    mappings: impl Fn(&Linux) -> &Option<Vec<LinuxIdMapping>>,
    id: u32,
) -> Option<u32> {
    if !has_user_namespace(container) {
        return Some(id);
    }
    let linux = container.linux().as_ref()?;
    mappings(linux).iter().flatten().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id())?;
        (offset < mapping.size()).then(|| mapping.host_id().checked_add(offset))?
    })
}

fn unmapped(kind: &str, id: u32) -> Error {
    Error::Invalid(format!(
        "{kind} {id} is not in the container's user namespace: its mappings say nothing of it"
    ))
}

/// sysfs shows devices of the network, and so only who owns the network may mount it. The guest's is not of a user
/// namespace: a container with one gets a mount that the agent has made.
fn bind_sysfs(mounts: &mut [Mount]) {
    for mount in mounts
        .iter_mut()
        .filter(|mount| mount.typ().as_deref() == Some("sysfs"))
    {
        mount.set_typ(Some("bind".to_owned()));
        mount.set_source(Some(storage::SYSFS.into()));
        mount
            .options_mut()
            .get_or_insert_default()
            .push("bind".to_owned());
    }
}

/// Puts limits that libcgroups gets wrong into the words of cgroup v2, which it passes on as they are.
pub(crate) fn translate_limits(resources: &mut LinuxResources) {
    forbid_swap(resources);
    weigh_io(resources);
}

/// The weight of I/O as runc converts it: linearly, from 10..1000 to 1..10000. In libcgroups the multiplication overflows.
fn weigh_io(resources: &mut LinuxResources) {
    let Some(block_io) = resources.block_io_mut() else {
        return;
    };
    let Some(weight) = block_io.weight().filter(|weight| *weight != 0) else {
        return;
    };
    block_io.set_weight(None);
    let weight = 1 + u32::from(weight).saturating_sub(10) * 9999 / 990;
    resources
        .unified_mut()
        .get_or_insert_default()
        .entry("io.weight".to_owned())
        .or_insert_with(|| weight.to_string());
}

/// A limit of memory and swap together that equals that of memory alone forbids swap. libcgroups takes the difference, a
/// zero, for "unset".
fn forbid_swap(resources: &mut LinuxResources) {
    let Some(memory) = resources.memory() else {
        return;
    };
    if memory
        .limit()
        .is_some_and(|limit| limit > 0 && memory.swap() == Some(limit))
    {
        let unified = resources.unified_mut().get_or_insert_default();
        unified
            .entry("memory.swap.max".to_owned())
            .or_insert_with(|| "0".to_owned());
    }
}

/// Whether the first process is the init of a PID namespace of its own, and so takes all others with it when it ends.
pub(crate) fn has_pid_namespace(spec: &Spec) -> bool {
    spec.linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .is_some_and(|namespaces| {
            namespaces.iter().any(|namespace| {
                namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none()
            })
        })
}

fn has_listener(seccomp: &LinuxSeccomp) -> bool {
    seccomp.listener_path().is_some()
}

fn take_network_sysctls(linux: &mut Linux) -> Vec<(String, String)> {
    let (network, others) = linux
        .sysctl()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .partition(|(name, _)| name.starts_with("net.") || name.starts_with("net/"));
    linux.set_sysctl(Some(others));
    let mut network: HashMap<_, _> = network;
    let makes_user_namespace =
        linux.namespaces().iter().flatten().any(|namespace| {
            namespace.typ() == LinuxNamespaceType::User && namespace.path().is_none()
        });
    if makes_user_namespace {
        // Its root could bind them if the network were its own. No program of the guest is outside of the pod, whose only
        // network this is.
        network
            .entry(PRIVILEGED_PORTS.to_owned())
            .or_insert_with(|| "0".to_owned());
    }
    network.into_iter().collect()
}

fn missing(what: &str) -> Error {
    Error::Invalid(format!("the specification has no `{what}`"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(root: &Path, changes: &Value) -> Spec {
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "root": { "path": root },
            "process": {
                "user": { "uid": 1000, "gid": 1000 },
                "args": ["sh"],
                "env": ["PATH=/bin"],
                "cwd": "/work/here",
            },
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "network" }, { "type": "mount" }] },
        });
        merge(&mut spec, changes);
        serde_json::from_value(spec).expect("a fair specification")
    }

    fn merge(into: &mut Value, changes: &Value) {
        match (into, changes) {
            (Value::Object(into), Value::Object(changes)) => {
                for (key, change) in changes {
                    merge(into.entry(key).or_insert(Value::Null), change);
                }
            }
            (into, change) => *into = change.clone(),
        }
    }

    /// Of 2000 users and groups.
    fn user_namespace() -> Value {
        json!({
            "namespaces": [{ "type": "user" }],
            "uidMappings": [{ "containerID": 0, "hostID": 100_000, "size": 2000 }],
            "gidMappings": [{ "containerID": 0, "hostID": 200_000, "size": 2000 }],
        })
    }

    fn rootfs() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir(root.path().join("etc")).expect("a folder");
        let passwd = "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n";
        fs::write(root.path().join("etc/passwd"), passwd).expect("a file");
        root
    }

    fn prepared(changes: &Value) -> Result<Prepared> {
        let root = rootfs();
        prepare(spec(root.path(), changes), "c1", false, |_| None)
    }

    fn process(prepared: &Prepared) -> &Process {
        prepared.spec.process().as_ref().expect("it has one")
    }

    #[test]
    fn the_guest_is_the_network_namespace() {
        let prepared = prepared(&json!({})).expect("a fair specification");
        let linux = prepared.spec.linux().as_ref().expect("it has one");
        let types: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(oci_spec::runtime::LinuxNamespace::typ)
            .collect();
        assert_eq!(
            types,
            [
                LinuxNamespaceType::Pid,
                LinuxNamespaceType::Mount,
                LinuxNamespaceType::Cgroup
            ]
        );
        assert!(has_pid_namespace(&prepared.spec));
    }

    #[test]
    fn sysctls_of_the_network_are_the_guests() {
        let sysctls =
            json!({ "linux": { "sysctl": { "net.core.somaxconn": "9", "kernel.msgmax": "1" } } });
        let prepared = prepared(&sysctls).expect("a fair specification");
        assert_eq!(
            prepared.network_sysctls,
            [("net.core.somaxconn".to_owned(), "9".to_owned())]
        );
        let linux = prepared.spec.linux().as_ref().expect("it has one");
        assert_eq!(linux.sysctl().as_ref().map(|left| left.len()), Some(1));
    }

    #[test]
    fn no_swap_beside_the_memory_means_no_swap() {
        let memory = json!({ "memory": { "limit": 64, "swap": 64 } });
        let mut resources = serde_json::from_value(memory).expect("fair resources");
        forbid_swap(&mut resources);
        let unified = resources.unified().as_ref().expect("set");
        assert_eq!(unified["memory.swap.max"], "0");
    }

    #[test]
    fn folder_is_resolved_as_the_container_does() {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir(root.path().join("inside")).expect("a folder in it");
        std::os::unix::fs::symlink("/inside", root.path().join("link")).expect("a link");
        fs::write(root.path().join("file"), "").expect("a file");
        assert!(has_folder(root.path(), Path::new("/link")));
        assert!(has_folder(root.path(), Path::new("/")));
        let of_process = root_of(Pid::this());
        assert!(has_folder(&of_process, Path::new("/usr")));
        assert!(!has_folder(root.path(), Path::new("/file")));
        assert!(!has_folder(root.path(), root.path()));
    }

    #[test]
    fn home_is_looked_up_in_the_container() {
        let prepared = prepared(&json!({})).expect("a fair specification");
        let env = process(&prepared).env().as_ref().expect("it has some");
        assert!(env.contains(&"HOME=/home/me".to_owned()));
    }

    #[test]
    fn home_that_is_given_stays() {
        let given = json!({ "process": { "env": ["HOME=/given"] } });
        let prepared = prepared(&given).expect("a fair specification");
        assert_eq!(
            process(&prepared).env().as_deref(),
            Some(&["HOME=/given".to_owned()][..])
        );
    }

    #[test]
    fn unknown_user_lives_in_the_root() {
        assert_eq!(home_of("root:x:0:0:root:/root:/bin/sh\nbroken\n", 7), "/");
    }

    #[test]
    fn only_a_file_is_read_for_the_home() {
        let root = rootfs();
        let passwd = root.path().join("etc/passwd");
        assert!(read_small(root.path(), "/etc/passwd").is_some());
        fs::remove_file(&passwd).expect("it was there");
        nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
        assert_eq!(read_small(root.path(), "/etc/passwd"), None);
        fs::remove_file(&passwd).expect("it was there");
        fs::write(&passwd, vec![b'x'; 3 << 20]).expect("a file");
        let read = read_small(root.path(), "/etc/passwd").expect("a file");
        assert_eq!(read.len(), 1 << 20);
    }

    #[test]
    fn working_directory_is_made() {
        let root = rootfs();
        prepare(spec(root.path(), &json!({})), "c1", false, |_| None)
            .expect("a fair specification");
        assert!(root.path().join("work/here").is_dir());
    }

    #[test]
    fn working_directory_in_a_bound_folder_is_made_there() {
        let (root, volume) = (rootfs(), tempfile::tempdir().expect("a folder"));
        let mounts = json!([
            { "destination": "/work", "type": "bind", "source": volume.path() },
            { "destination": "/work/tmp", "type": "tmpfs" },
        ]);
        prepare(
            spec(root.path(), &json!({ "mounts": mounts })),
            "c1",
            false,
            |_| None,
        )
        .expect("a fair specification");
        assert!(volume.path().join("here").is_dir());
        assert!(!root.path().join("work/here").exists());
    }

    #[test]
    fn no_new_privileges_that_is_false_is_as_good_as_absent() {
        let changes = json!({ "process": { "noNewPrivileges": false, "apparmorProfile": "cri" } });
        let prepared = prepared(&changes).expect("a fair specification");
        assert_eq!(process(&prepared).no_new_privileges(), None);
        assert_eq!(process(&prepared).apparmor_profile(), &None);
        assert_eq!(process(&prepared).oom_score_adj(), Some(0));
    }

    #[test]
    fn hooks_of_the_host_are_left_to_the_host() {
        let hook = json!([{ "path": "/hook" }]);
        let changes = json!({ "hooks": { "createRuntime": hook, "startContainer": hook } });
        let prepared = prepared(&changes).expect("a fair specification");
        let hooks = prepared.spec.hooks().as_ref().expect("one is the guest's");
        assert!(hooks.create_runtime().is_none());
        assert!(hooks.start_container().is_some());
    }

    #[test]
    fn sysfs_of_a_user_namespace_is_the_agents() {
        let mut changes = json!({
            "mounts": [{ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] }],
        });
        let mount = |changes: &Value| {
            let prepared = prepared(changes).expect("a fair specification");
            serde_json::to_value(prepared.spec.mounts()).expect("plain data")[0].clone()
        };
        assert_eq!(mount(&changes), changes["mounts"][0]);
        changes["linux"] = user_namespace();
        let expected = json!({
            "destination": "/sys", "type": "bind", "source": "/run/husk/sys", "options": ["ro", "bind"],
        });
        assert_eq!(mount(&changes), expected);
    }

    #[test]
    fn weight_of_io_is_that_of_cgroup_v2() {
        for (given, weight) in [(10, "1"), (16, "61"), (500, "4950"), (1000, "10000")] {
            let mut resources: LinuxResources =
                serde_json::from_value(json!({ "blockIO": { "weight": given } }))
                    .expect("fair resources");
            translate_limits(&mut resources);
            let unified = resources.unified().as_ref().expect("it is there");
            assert_eq!(unified["io.weight"], weight, "of {given}");
            let block_io = resources.block_io().as_ref().expect("kept");
            assert_eq!(block_io.weight(), None);
        }
    }

    #[test]
    fn ports_are_free_to_root_of_a_user_namespace() {
        let sysctls = |changes: &Value| {
            prepared(changes)
                .expect("a fair specification")
                .network_sysctls
        };
        let free = |port: &str| vec![(PRIVILEGED_PORTS.to_owned(), port.to_owned())];
        assert_eq!(sysctls(&json!({})), []);
        let mut changes = json!({ "linux": user_namespace() });
        assert_eq!(sysctls(&changes), free("0"));
        changes["linux"]["sysctl"] = json!({ PRIVILEGED_PORTS: "80" });
        assert_eq!(sysctls(&changes), free("80"));
        let mut of_pod = json!({ "linux": user_namespace() });
        of_pod["linux"]["namespaces"][0]["path"] = json!("/x");
        assert_eq!(sysctls(&of_pod), []);
    }

    #[test]
    fn ids_of_a_user_namespace_are_others_in_the_guest() {
        let with = prepared(&json!({ "linux": user_namespace() })).expect("fair");
        assert_eq!(uid_in_guest(&with.spec, 1000).expect("mapped"), 101_000);
        assert_eq!(gid_in_guest(&with.spec, 1999).expect("mapped"), 201_999);
        let error = gid_in_guest(&with.spec, 2000).expect_err("it is one too many");
        assert!(
            error.to_string().starts_with("group 2000 is not in"),
            "{error}"
        );
        let without = prepared(&json!({})).expect("fair");
        assert_eq!(uid_in_guest(&without.spec, 2000).expect("all are"), 2000);
    }

    #[test]
    fn user_outside_of_the_user_namespace_is_refused() {
        for (user, named) in [
            (json!({ "uid": 2000, "gid": 0 }), "user 2000"),
            (json!({ "uid": 0, "gid": 2000 }), "group 2000"),
            (
                json!({ "uid": 0, "gid": 0, "additionalGids": [1, 2000] }),
                "group 2000",
            ),
        ] {
            let mut changes = json!({ "linux": user_namespace() });
            changes["process"] = json!({ "user": user });
            let error = prepared(&changes).expect_err("it is nobody").to_string();
            assert!(error.starts_with(named), "{error}");
        }
    }

    #[test]
    fn capabilities_are_the_containers_or_none() {
        let kill = json!({ "bounding": ["CAP_KILL"] });
        let spec = |process| prepared(&json!({ "process": process })).expect("fair");
        let (without, with) = (spec(json!({})), spec(json!({ "capabilities": kill })));
        let of = |process: &Process| {
            serde_json::to_value(process.capabilities()).expect("plain data")["bounding"].clone()
        };
        assert_eq!(of(process(&without)), json!([]));
        assert_eq!(of(process(&with)), kill["bounding"]);
        let mut exec = Process::default();
        exec.set_capabilities(None);
        prepare_process(&mut exec, false, rootfs().path(), Some(process(&with)));
        assert_eq!(of(&exec), kill["bounding"]);
    }

    #[test]
    fn sandbox_is_its_namespaces_name_and_sysctls() {
        let given = json!({
            "ociVersion": "1.1.0",
            "root": { "path": "/of/the/pause/image" },
            "process": { "cwd": "/x", "args": ["/pause"], "user": { "uid": 65535, "gid": 65535 } },
            "hostname": "pod",
            "mounts": [{ "destination": "/dev/shm", "type": "bind", "source": "/of/the/host" }],
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "uts" }, { "type": "network" }],
                "sysctl": { "net.core.somaxconn": "9", "kernel.shm_rmid_forced": "1" },
                "maskedPaths": ["/proc/kcore"],
                "resources": { "cpu": { "shares": 2 } },
            },
        });
        let given: Spec = serde_json::from_value(given).expect("a fair specification");
        let prepared = prepare_sandbox(&given, "pod1", Path::new("/root")).expect("fair");
        let spec = serde_json::to_value(&prepared.spec).expect("plain data");
        assert_eq!(spec["root"]["path"], "/root");
        assert_eq!(spec["hostname"], "pod");
        assert_eq!(spec["process"]["oomScoreAdj"], -998);
        let linux = &spec["linux"];
        assert_eq!(
            linux["namespaces"],
            json!([{ "type": "pid" }, { "type": "uts" }, { "type": "cgroup" }])
        );
        assert_eq!(linux["sysctl"], json!({ "kernel.shm_rmid_forced": "1" }));
        assert!(linux.get("maskedPaths").is_none());
        assert!(linux.get("resources").is_none());
        assert_eq!(
            prepared.network_sysctls,
            [("net.core.somaxconn".to_owned(), "9".to_owned())]
        );
        assert!(has_pid_namespace(&prepared.spec));
    }

    #[test]
    fn pid_namespace_of_the_pod_does_not_end_with_a_container() {
        let path = "/run/husk/pod/ns/pid";
        let changes = json!({ "linux": { "namespaces": [{ "type": "pid", "path": path }] } });
        let prepared = prepared(&changes).expect("a fair specification");
        assert!(!has_pid_namespace(&prepared.spec));
    }

    #[test]
    fn specification_without_root_is_refused() {
        let changes = json!({ "root": null });
        let error = prepared(&changes).expect_err("it has no root");
        assert_eq!(error.to_string(), "the specification has no `root`");
    }
}
