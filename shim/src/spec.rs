//! What becomes of the OCI configuration on its way from the bundle to the guest.
//!
//! The host's part is taken out (bind sources, hooks of the runtime namespace, and all that names a thing of the host
//! that the guest does not have); the rest goes to the agent as it is. Pure functions: storage mounts, hooks run, and
//! the agent creates elsewhere.

use std::io;
use std::path::{Path, PathBuf};

use husk_protocol::{DISK_MOUNTS, POD_NAMESPACES, POD_VOLUMES, SHARE_MOUNT_POINT};
use oci_spec::runtime::{
    Hook, Hooks, Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespace,
    LinuxNamespaceType, LinuxResources, LinuxSeccomp, LinuxSeccompAction, LinuxSyscall,
    LinuxThrottleDevice, Mount, Process, Spec,
};

use crate::error::Error;
use crate::pod::Kind;
use crate::storage::{IdMaps, OwnVolume, Source};

/// Where in the shared folder of a container its root file system is.
pub(crate) const ROOTFS: &str = "rootfs";

/// A configuration divided between guest and host.
#[derive(Debug)]
pub(crate) struct Divided {
    /// For the agent.
    pub(crate) guest: Spec,
    /// The folder of the root file system on the host where containerd mounts none, relative to the bundle.
    pub(crate) root: PathBuf,
    /// To be mounted by virtio-fs; see [`Divided::place`].
    pub(crate) binds: Vec<Bind>,
    /// Which of the specification's mounts the binds are.
    places: Vec<usize>,
    /// Of the guest's own, for the agent to make.
    pub(crate) volumes: Vec<OwnVolume>,
    /// Disks of the host that the container is to have.
    pub(crate) devices: Vec<BlockDevice>,
    /// To be run by the shim.
    pub(crate) hooks: HostHooks,
}

/// A bind mount of the specification.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Bind {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    pub(crate) recursive: bool,
    pub(crate) access: Access,
    /// Whether mounts that the host makes later below the source are to appear.
    pub(crate) follows_host: bool,
    /// Whose its files are to be; `None` leaves them as they are.
    pub(crate) owners: Option<Owners>,
}

/// A block device of the host that a container is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// In the container.
    pub(crate) path: PathBuf,
    pub(crate) major: u64,
    pub(crate) minor: u64,
    pub(crate) read_only: bool,
}

/// Whose the files of a mount are to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Owners {
    pub(crate) ids: IdMaps,
    /// Whether that goes for what is mounted below it, too.
    pub(crate) recursive: bool,
}

/// What may be done below a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    Write,
    /// The mount is read-only, but not what else is mounted below it.
    Read,
    /// All is read-only.
    ReadAll,
}

/// The hooks that run in the runtime's namespace, which is the host's.
#[derive(Debug, Default)]
pub(crate) struct HostHooks {
    pub(crate) prestart: Vec<Hook>,
    pub(crate) create_runtime: Vec<Hook>,
    pub(crate) poststart: Vec<Hook>,
    pub(crate) poststop: Vec<Hook>,
}

impl Divided {
    /// Says that the root file system of container `id` is on a disk.
    pub(crate) fn root_is_on_disk(&mut self, id: &str) {
        if let Some(root) = self.guest.root_mut() {
            root.set_path(Path::new(DISK_MOUNTS).join(id));
        }
    }

    /// Says where in the shared folder the binds are, in their order.
    pub(crate) fn place<'a>(&mut self, paths: impl Iterator<Item = &'a str>) {
        let mounts = self.guest.mounts_mut().as_deref_mut().unwrap_or_default();
        for (&place, path) in self.places.iter().zip(paths) {
            mounts[place].set_source(Some(Path::new(SHARE_MOUNT_POINT).join(path)));
        }
    }
}

/// The PID namespace of a container of the guest, if it is its pod's.
pub(crate) fn pods_processes(guest: &mut Spec) -> Option<&mut LinuxNamespace> {
    let namespaces = guest.linux_mut().as_mut()?.namespaces_mut().as_mut()?;
    namespaces
        .iter_mut()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_some())
}

/// Divides the specification of container `id`. The sources of its mounts are looked at by `look`, which is told whether
/// one is the pod's /dev/shm.
///
/// # Errors
/// `UnsupportedSpec` for what cannot be done in a VM, `Bind` for a source that cannot be looked at.
pub(crate) fn divide(
    mut spec: Spec,
    id: &str,
    kind: &Kind,
    look: impl Fn(&Path, bool) -> io::Result<Source>,
) -> Result<Divided, Error> {
    let mut root = spec
        .root()
        .clone()
        .ok_or_else(|| Error::UnsupportedSpec("has no root".to_owned()))?;
    let host_root = root.path().clone();
    root.set_path(Path::new(SHARE_MOUNT_POINT).join(id).join(ROOTFS));
    spec.set_root(Some(root));

    let hooks = spec
        .hooks_mut()
        .as_mut()
        .map_or_else(|| Ok(HostHooks::default()), take_host_hooks)?;
    if let Some(process) = spec.process_mut() {
        drop_host_labels(process);
    }
    let container_ids = spec.linux().as_ref().and_then(|linux| {
        IdMaps::of(
            linux.uid_mappings().as_deref()?,
            linux.gid_mappings().as_deref()?,
        )
    });
    let devices = spec.linux().as_ref().map(block_devices);
    // A sandbox runs no program that could use one.
    let devices = devices
        .filter(|_| *kind != Kind::Sandbox)
        .unwrap_or_default();
    if let Some(linux) = spec.linux_mut() {
        drop_host_linux(linux, kind, &devices)?;
    }
    if *kind == Kind::Sandbox {
        // It has no files of its own, and those for the others come with the others.
        spec.set_mounts(None);
    }
    let mut divided = Divided {
        guest: spec,
        root: host_root,
        binds: Vec::new(),
        places: Vec::new(),
        volumes: Vec::new(),
        devices,
        hooks,
    };
    divide_mounts(&mut divided, kind, container_ids.as_ref(), look)?;
    Ok(divided)
}

fn divide_mounts(
    divided: &mut Divided,
    kind: &Kind,
    container_ids: Option<&IdMaps>,
    look: impl Fn(&Path, bool) -> io::Result<Source>,
) -> Result<(), Error> {
    let mounts = divided
        .guest
        .mounts_mut()
        .as_deref_mut()
        .unwrap_or_default();
    for (place, mount) in mounts.iter_mut().enumerate() {
        let owners = take_owners(mount, container_ids)?;
        if !is_bind(mount) {
            continue;
        }
        let bind = bind(mount, owners)?;
        let source =
            look(&bind.source, kind.is_shm(&bind.source)).map_err(|source| Error::Bind {
                source_path: bind.source.clone(),
                destination: bind.destination.display().to_string(),
                source,
            })?;
        match source {
            Source::Shared { has_mounts } => {
                if has_mounts && bind.access == Access::Read {
                    // What is mounted below stays writable, which the guest, for which all is one mount, would prevent.
                    retain_options(mount, |option| option != "ro");
                }
                divided.binds.push(bind);
                divided.places.push(place);
            }
            Source::Own {
                volume: mut own,
                folder,
            } => {
                let volume = &mut own.volume;
                if let Some(Owners { ids, .. }) = &bind.owners {
                    if volume.direct.is_some() {
                        return Err(Error::UnsupportedSpec(format!(
                            "wants other owners (idmap) for the mount {}, a disk that the guest mounts, whose files have owners already",
                            mount.destination().display()
                        )));
                    }
                    // No file of it is on the host: what is made with the right owner needs no other one shown.
                    (volume.uid, volume.gid) = ids
                        .uid(volume.uid)
                        .zip(ids.gid(volume.gid))
                        .ok_or_else(|| unmapped(mount.destination()))?;
                }
                let path = Path::new(POD_VOLUMES).join(&volume.name).join(folder);
                mount.set_source(Some(path));
                divided.volumes.push(own);
            }
            // The guest's of the same name.
            Source::Device => {}
            Source::Socket => {
                return Err(Error::UnsupportedSpec(format!(
                    "mounts {}, a unix socket of the host, to which nothing in a VM can connect",
                    bind.source.display()
                )));
            }
        }
    }
    Ok(())
}

/// The disks of the host among the devices of a specification: those that a rule of their own lets the container read. The
/// host's others, which a container that may use every device has listed, are not meant for a guest.
fn block_devices(linux: &Linux) -> Vec<BlockDevice> {
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default();
    let mut devices: Vec<BlockDevice> = Vec::new();
    for device in linux.devices().iter().flatten() {
        // The last that is about it counts.
        let access = rules
            .iter()
            .rfind(|rule| is_about(rule, device))
            .filter(|rule| rule.allow())
            .and_then(|rule| rule.access().as_deref())
            .unwrap_or_default();
        let numbers = (u64::try_from(device.major()), u64::try_from(device.minor()));
        if let (LinuxDeviceType::B, true, (Ok(major), Ok(minor))) =
            (device.typ(), access.contains('r'), numbers)
            && !devices.iter().any(|other| other.path == *device.path())
        {
            devices.push(BlockDevice {
                path: device.path().clone(),
                major,
                minor,
                read_only: !access.contains('w'),
            });
        }
    }
    devices
}

fn is_about(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    rule.typ() == Some(device.typ())
        && rule.major() == Some(device.major())
        && rule.minor() == Some(device.minor())
}

/// Takes out of `process` the labels of security modules that are the host's: the guest's kernel has none.
pub(crate) fn drop_host_labels(process: &mut Process) {
    process.set_selinux_label(None);
    process.set_apparmor_profile(None);
}

/// Those of `limits` that are for one of `disks`; `None` if there are none.
fn of_disks(
    limits: &[LinuxThrottleDevice],
    disks: &[BlockDevice],
) -> Option<Vec<LinuxThrottleDevice>> {
    let is_for = |limit: &LinuxThrottleDevice, disk: &BlockDevice| {
        let numbers = (u64::try_from(limit.major()), u64::try_from(limit.minor()));
        numbers == (Ok(disk.major), Ok(disk.minor))
    };
    let kept: Vec<_> = limits
        .iter()
        .filter(|limit| disks.iter().any(|disk| is_for(limit, disk)))
        .copied()
        .collect();
    (!kept.is_empty()).then_some(kept)
}

/// Takes out of `resources` what counts or names devices and processors of the host, but for `disks`, which the guest has.
pub(crate) fn drop_host_resources(resources: &mut LinuxResources, disks: &[BlockDevice]) {
    if let Some(cpu) = resources.cpu_mut() {
        // Numbers of the host's processors and memory nodes.
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    if let Some(block_io) = resources.block_io_mut() {
        block_io.set_weight_device(None);
        let kept = |limits: &Option<Vec<LinuxThrottleDevice>>| of_disks(limits.as_deref()?, disks);
        let read_bps = kept(block_io.throttle_read_bps_device());
        block_io.set_throttle_read_bps_device(read_bps);
        let write_bps = kept(block_io.throttle_write_bps_device());
        block_io.set_throttle_write_bps_device(write_bps);
        let read_iops = kept(block_io.throttle_read_iops_device());
        block_io.set_throttle_read_iops_device(read_iops);
        let write_iops = kept(block_io.throttle_write_iops_device());
        block_io.set_throttle_write_iops_device(write_iops);
    }
    if let Some(unified) = resources.unified_mut() {
        // The same by another way.
        unified.retain(|file, _| {
            !file.starts_with("cpuset.") && !file.starts_with("io.") && !file.starts_with("rdma.")
        });
    }
    // Names of the host's interfaces, and its adapters.
    resources.set_network(None);
    resources.set_rdma(None);
    // Large pages that the host has set aside.
    resources.set_hugepage_limits(None);
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has_option(mount, &["bind", "rbind"])
}

fn has_option(mount: &Mount, wanted: &[&str]) -> bool {
    mount
        .options()
        .iter()
        .flatten()
        .any(|option| wanted.contains(&option.as_str()))
}

fn retain_options(mount: &mut Mount, keep: impl Fn(&str) -> bool) {
    if let Some(options) = mount.options_mut() {
        options.retain(|option| keep(option));
    }
}

/// Takes out of `mount` whose its files are to be, which the host's kernel sees to. A mount that does not say it itself
/// means the ids of the container.
fn take_owners(mount: &mut Mount, container_ids: Option<&IdMaps>) -> Result<Option<Owners>, Error> {
    let recursive = has_option(mount, &["ridmap"]);
    let wanted = recursive || has_option(mount, &["idmap"]);
    let (uids, gids) = (
        mount.uid_mappings_mut().take().unwrap_or_default(),
        mount.gid_mappings_mut().take().unwrap_or_default(),
    );
    retain_options(mount, |option| option != "idmap" && option != "ridmap");
    if !wanted && uids.is_empty() && gids.is_empty() {
        return Ok(None);
    }
    let destination = mount.destination().display();
    if !is_bind(mount) {
        return Err(Error::UnsupportedSpec(format!(
            "wants other owners (idmap) for the mount {destination}, which is no bind mount"
        )));
    }
    let ids = if uids.is_empty() && gids.is_empty() {
        container_ids.cloned()
    } else {
        IdMaps::of(&uids, &gids)
    };
    let ids = ids.ok_or_else(|| {
        Error::UnsupportedSpec(format!(
            "wants other owners (idmap) for the mount {destination} but says not which: both uidMappings and \
             gidMappings are needed, of the mount or of the container"
        ))
    })?;
    Ok(Some(Owners { ids, recursive }))
}

fn unmapped(destination: &Path) -> Error {
    Error::UnsupportedSpec(format!(
        "wants other owners (idmap) for the mount {}, but the mappings say nothing of the one that it has",
        destination.display()
    ))
}

fn bind(mount: &Mount, owners: Option<Owners>) -> Result<Bind, Error> {
    let destination = mount.destination();
    let source = mount.source().clone().ok_or_else(|| {
        Error::UnsupportedSpec(format!(
            "has a bind mount to {} without a source",
            destination.display()
        ))
    })?;
    if has_option(mount, &["shared", "rshared"]) {
        return Err(Error::UnsupportedSpec(format!(
            "wants mounts that the container makes below {} to appear on the host (Bidirectional), \
             which those made in a VM cannot",
            destination.display()
        )));
    }
    Ok(Bind {
        source,
        destination: destination.clone(),
        recursive: has_option(mount, &["rbind"]),
        access: if has_option(mount, &["rro"]) {
            Access::ReadAll
        } else if has_option(mount, &["ro"]) {
            Access::Read
        } else {
            Access::Write
        },
        follows_host: !has_option(mount, &["private", "rprivate"]),
        owners,
    })
}

fn take_host_hooks(hooks: &mut Hooks) -> Result<HostHooks, Error> {
    if let Some([hook, ..]) = hooks.create_container().as_deref() {
        return Err(Error::UnsupportedSpec(format!(
            "has {} as createContainer hook, a program of the host that is to run in the container's namespaces, \
             which are in a guest; a startContainer hook is a program of the container",
            hook.path().display()
        )));
    }
    let prestart = hooks.prestart_mut().take();
    Ok(HostHooks {
        prestart: prestart.unwrap_or_default(),
        create_runtime: hooks.create_runtime_mut().take().unwrap_or_default(),
        poststart: hooks.poststart_mut().take().unwrap_or_default(),
        poststop: hooks.poststop_mut().take().unwrap_or_default(),
    })
}

/// Gives each namespace of the specification the path that it has in the guest.
fn translate_namespaces(
    mut namespaces: Vec<LinuxNamespace>,
    kind: &Kind,
) -> Result<Vec<LinuxNamespace>, Error> {
    // The VM is the network namespace.
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    for namespace in &mut namespaces {
        let Some(path) = namespace.path() else {
            continue;
        };
        let of_pod = match namespace.typ() {
            LinuxNamespaceType::Ipc => Some("ipc"),
            LinuxNamespaceType::Pid => Some("pid"),
            LinuxNamespaceType::User => Some("user"),
            LinuxNamespaceType::Uts => Some("uts"),
            _ => None,
        };
        match (kind, of_pod) {
            // containerd has made one, of the ids that are given here too. The guest makes its own.
            (Kind::Sandbox, Some("user")) => {
                namespace.set_path(None);
            }
            // The namespaces of the process that stands for the sandbox on the host stand for those of the sandbox.
            (Kind::Member { .. }, Some(name)) => {
                namespace.set_path(Some(Path::new(POD_NAMESPACES).join(name)));
            }
            _ => {
                return Err(Error::UnsupportedSpec(format!(
                    "asks for the {} namespace {} of the host, which a container in a VM cannot enter",
                    namespace.typ(),
                    path.display()
                )));
            }
        }
    }
    Ok(namespaces)
}

/// A sandbox without a namespace shares the host's, as hostPID and hostIPC have it.
fn refuse_host_namespaces(namespaces: &[LinuxNamespace]) -> Result<(), Error> {
    for (wanted, field) in [
        (LinuxNamespaceType::Pid, "hostPID"),
        (LinuxNamespaceType::Ipc, "hostIPC"),
    ] {
        if !namespaces.iter().any(|namespace| namespace.typ() == wanted) {
            return Err(Error::UnsupportedSpec(format!(
                "shares the host's {wanted} namespace ({field}), which a pod in a VM cannot"
            )));
        }
    }
    Ok(())
}

/// A listener gets a descriptor for each process that it listens to, by which it reads the process's memory and answers for
/// its system calls. Those of a guest are in another kernel than a listener of the host.
fn refuse_listener(seccomp: &LinuxSeccomp) -> Result<(), Error> {
    let mut actions = seccomp
        .syscalls()
        .iter()
        .flatten()
        .map(LinuxSyscall::action)
        .chain([seccomp.default_action()]);
    let wanted = match seccomp.listener_path() {
        Some(path) => path.display().to_string(),
        None if actions.any(|action| action == LinuxSeccompAction::ScmpActNotify) => {
            "SCMP_ACT_NOTIFY".to_owned()
        }
        None => return Ok(()),
    };
    Err(Error::UnsupportedSpec(format!(
        "has a seccomp filter that notifies a listener of the host ({wanted}), to which a guest cannot pass descriptors"
    )))
}

/// libcontainer writes one range itself, and several by programs that the guest does not have.
fn check_user_namespace(linux: &Linux) -> Result<(), Error> {
    let wanted = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let [uids, gids] =
        [linux.uid_mappings(), linux.gid_mappings()].map(|ranges| ranges.iter().flatten().count());
    let trouble = match (wanted, uids, gids) {
        (false, 0, 0) | (true, 1, 1) => return Ok(()),
        (false, ..) => "has uidMappings or gidMappings, but no user namespace",
        (true, 0, _) | (true, _, 0) => {
            "has a user namespace but says not of which ids: both uidMappings and gidMappings are needed"
        }
        (true, ..) => {
            "has a user namespace with more than one range of ids (uidMappings, gidMappings), of which one is supported"
        }
    };
    Err(Error::UnsupportedSpec(trouble.to_owned()))
}

fn drop_host_linux(linux: &mut Linux, kind: &Kind, disks: &[BlockDevice]) -> Result<(), Error> {
    let mut namespaces =
        translate_namespaces(linux.namespaces().clone().unwrap_or_default(), kind)?;
    if *kind == Kind::Sandbox {
        refuse_host_namespaces(&namespaces)?;
        // With the host's network, containerd leaves the host's name to the pod as well; the VM has one of its own.
        if !namespaces
            .iter()
            .any(|namespace| namespace.typ() == LinuxNamespaceType::Uts)
        {
            let mut uts = LinuxNamespace::default();
            uts.set_typ(LinuxNamespaceType::Uts);
            namespaces.push(uts);
        }
    }
    linux.set_namespaces(Some(namespaces));
    if let Some(resources) = linux.resources_mut() {
        drop_host_resources(resources, disks);
    }
    if let Some(seccomp) = linux.seccomp() {
        refuse_listener(seccomp)?;
    }
    check_user_namespace(linux)?;
    // The agent chooses the place in the guest's hierarchy.
    linux.set_cgroups_path(None);
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    for (what, is_asked_for) in [
        ("netDevices", linux.net_devices().is_some()),
        ("memoryPolicy", linux.memory_policy().is_some()),
    ] {
        if is_asked_for {
            return Err(Error::UnsupportedSpec(format!(
                "asks for {what}, which names what the host has and the guest has not: leave it out"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use husk_protocol::agent::{DirectVolume, Volume};
    use serde_json::{Value, json};

    use super::*;

    fn spec(mut extra: Value) -> Spec {
        let base = json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {
                "cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0},
                "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "system_u"
            },
            "linux": {
                "cgroupsPath": "/default/x",
                "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "mount"}]
            }
        });
        for (key, value) in base.as_object().unwrap() {
            extra
                .as_object_mut()
                .unwrap()
                .entry(key.clone())
                .or_insert(value.clone());
        }
        serde_json::from_value(extra).unwrap()
    }

    fn shared(_: &Path, _: bool) -> io::Result<Source> {
        Ok(Source::Shared { has_mounts: false })
    }

    /// As a container that is alone in its VM.
    fn divide(spec: Spec, id: &str) -> Result<Divided, Error> {
        super::divide(spec, id, &Kind::Single, shared)
    }

    fn member() -> Kind {
        Kind::Member {
            sandbox: "pod".to_owned(),
        }
    }

    fn guest_json(divided: &Divided) -> Value {
        serde_json::to_value(&divided.guest).unwrap()
    }

    #[test]
    fn what_only_the_host_has_is_refused_by_name() {
        for (what, value) in [
            ("netDevices", json!({"eth9": {"name": "eth0"}})),
            ("memoryPolicy", json!({"mode": "MPOL_BIND", "nodes": "0"})),
        ] {
            let refused = spec(json!({"linux": {what: value}}));
            let err = divide(refused, "c").unwrap_err();
            assert!(err.to_string().contains(what), "{err}");
        }
    }

    fn with_devices(devices: &Value, rules: &Value, kind: &Kind) -> Vec<BlockDevice> {
        let spec = spec(json!({"linux": {
            "devices": devices,
            "resources": {"devices": rules},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}]
        }}));
        super::divide(spec, "c", kind, shared).unwrap().devices
    }

    #[test]
    fn disks_of_the_host_are_those_that_a_rule_allows() {
        let devices = json!([
            {"path": "/dev/data", "type": "b", "major": 7, "minor": 1},
            {"path": "/dev/old", "type": "b", "major": 7, "minor": 2},
            {"path": "/dev/listed", "type": "b", "major": 8, "minor": 0},
            {"path": "/dev/denied", "type": "b", "major": 8, "minor": 1},
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
        ]);
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "access": "rwm"},
            {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "mrw"},
            {"allow": true, "type": "b", "major": 7, "minor": 2, "access": "rm"},
            {"allow": true, "type": "b", "major": 8, "minor": 1, "access": "rwm"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}
        ]);
        let device = |path: &str, minor, read_only| BlockDevice {
            path: path.into(),
            major: 7,
            minor,
            read_only,
        };
        let wanted = [device("/dev/data", 1, false), device("/dev/old", 2, true)];
        assert_eq!(with_devices(&devices, &rules, &Kind::Single), wanted);
        assert_eq!(with_devices(&devices, &rules, &Kind::Sandbox), []);
    }

    #[test]
    fn limits_of_io_are_kept_for_disks_that_the_guest_gets() {
        let limits = json!([
            {"major": 7, "minor": 1, "rate": 1000},
            {"major": 8, "minor": 0, "rate": 1000}
        ]);
        let rule = json!({"allow": true, "type": "b", "major": 7, "minor": 1, "access": "rw"});
        let divided = divide(
            spec(json!({"linux": {
                "devices": [{"path": "/dev/data", "type": "b", "major": 7, "minor": 1}],
                "resources": {"devices": [rule], "blockIO": {
                    "weightDevice": [{"major": 7, "minor": 1, "weight": 10}],
                    "throttleReadBpsDevice": limits, "throttleWriteBpsDevice": limits,
                    "throttleReadIOPSDevice": limits, "throttleWriteIOPSDevice": [limits[1]]
                }}
            }})),
            "c",
        );
        let guest = guest_json(&divided.unwrap());
        let kept = json!([limits[0]]);
        assert_eq!(
            guest["linux"]["resources"]["blockIO"],
            json!({
                "throttleReadBpsDevice": kept, "throttleWriteBpsDevice": kept,
                "throttleReadIOPSDevice": kept
            })
        );
    }

    #[test]
    fn root_on_a_disk_is_where_the_agent_mounts_it() {
        let mut divided = divide(spec(json!({})), "x").unwrap();
        divided.root_is_on_disk("x");
        assert_eq!(
            guest_json(&divided)["root"],
            json!({"path": "/run/husk/disks/x", "readonly": true})
        );
    }

    #[test]
    fn root_points_into_the_share_and_stays_read_only() {
        let divided = divide(spec(json!({})), "x").unwrap();
        assert_eq!(divided.root, Path::new("rootfs"));
        let guest = guest_json(&divided);
        assert_eq!(
            guest["root"],
            json!({"path": "/run/husk/share/x/rootfs", "readonly": true})
        );
    }

    #[test]
    fn binds_are_placed_and_other_mounts_stay() {
        let mut divided = divide(
            spec(json!({"mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
                {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ro"]},
                {"destination": "/etc/hosts", "source": "/etc/hosts", "options": ["bind", "rprivate"]}
            ]})),
            "x",
        )
        .unwrap();
        let data = Bind {
            source: "/srv/data".into(),
            destination: "/data".into(),
            recursive: true,
            access: Access::Read,
            follows_host: true,
            owners: None,
        };
        let hosts = Bind {
            source: "/etc/hosts".into(),
            destination: "/etc/hosts".into(),
            recursive: false,
            access: Access::Write,
            follows_host: false,
            owners: None,
        };
        assert_eq!(divided.binds, [data, hosts]);
        divided.place([".volume-7", ".volume-2"].into_iter());
        let mounts = &guest_json(&divided)["mounts"];
        assert_eq!(mounts[0]["source"], "proc");
        assert_eq!(mounts[1]["source"], "/run/husk/share/.volume-7");
        assert_eq!(mounts[1]["options"], json!(["rbind", "ro"]));
        assert_eq!(mounts[2]["source"], "/run/husk/share/.volume-2");
        assert_eq!(mounts[2]["options"], json!(["bind", "rprivate"]));
    }

    #[test]
    fn bind_without_source_is_refused() {
        let err = divide(
            spec(json!({"mounts": [{"destination": "/data", "type": "bind"}]})),
            "x",
        )
        .unwrap_err();
        assert!(matches!(err, Error::UnsupportedSpec(_)));
    }

    #[test]
    fn what_belongs_to_the_host_is_dropped() {
        let guest = guest_json(
            &divide(
                spec(json!({"linux": {
                    "cgroupsPath": "/default/x",
                    "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/7/ns/net"}],
                    "intelRdt": {"closID": "a"},
                    "resources": {
                        "cpu": {"cpus": "8-11", "mems": "1", "shares": 512},
                        "network": {"classID": 1},
                        "unified": {"cpuset.cpus": "8-11", "io.max": "8:0 rbps=1", "memory.high": "7"},
                        "pids": {"limit": 5}
                    }
                }})),
                "x",
            )
            .unwrap(),
        );
        let linux = &guest["linux"];
        assert_eq!(linux["namespaces"], json!([{"type": "pid"}]));
        assert_eq!(linux["resources"]["cpu"], json!({"shares": 512}));
        assert_eq!(linux["resources"]["pids"], json!({"limit": 5}));
        assert_eq!(linux["resources"]["unified"], json!({"memory.high": "7"}));
        for gone in ["cgroupsPath", "intelRdt"] {
            assert!(linux.get(gone).is_none(), "{gone}");
        }
        assert!(linux["resources"].get("network").is_none());
        assert!(guest["process"].get("apparmorProfile").is_none());
        assert!(guest["process"].get("selinuxLabel").is_none());
    }

    #[test]
    fn namespace_of_the_host_is_refused() {
        let err = divide(
            spec(json!({"linux": {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}})),
            "x",
        )
        .unwrap_err();
        assert!(err.to_string().contains("/proc/1/ns/pid"), "{err}");
    }

    #[test]
    fn user_namespace_of_the_pod_is_the_sandboxes() {
        let namespaces = |namespace: Value, kind: &Kind| {
            let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
            let spec = spec(json!({"linux": {
                "namespaces": [namespace], "uidMappings": ids, "gidMappings": ids
            }}));
            let divided = super::divide(spec, "x", kind, shared)?;
            Ok::<_, Error>(guest_json(&divided)["linux"]["namespaces"].clone())
        };
        let own = json!({"type": "user"});
        assert_eq!(
            namespaces(own.clone(), &Kind::Single).unwrap(),
            json!([own])
        );
        let of_sandbox = json!({"type": "user", "path": "/proc/7/ns/user"});
        assert_eq!(
            namespaces(of_sandbox.clone(), &member()).unwrap(),
            json!([{"type": "user", "path": "/run/husk/pod/ns/user"}])
        );
        let made = serde_json::from_value(json!([of_sandbox])).unwrap();
        let made = translate_namespaces(made, &Kind::Sandbox).unwrap();
        assert_eq!(serde_json::to_value(made).unwrap(), json!([own]));
        let err = namespaces(of_sandbox, &Kind::Single).unwrap_err();
        assert!(err.to_string().contains("/proc/7/ns/user"), "{err}");
    }

    #[test]
    fn user_namespace_has_one_range_of_ids() {
        let one = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        let two = json!([one[0], {"containerID": 1000, "hostID": 1000, "size": 1}]);
        let (user, none) = (json!([{"type": "user"}]), json!([]));
        for (namespaces, uids, gids, trouble) in [
            (&user, &two, &one, "more than one range"),
            (&user, &one, &none, "says not of which ids"),
            (&none, &one, &one, "no user namespace"),
        ] {
            let spec = spec(json!({"linux": {
                "namespaces": namespaces, "uidMappings": uids, "gidMappings": gids
            }}));
            let err = divide(spec, "x").unwrap_err().to_string();
            assert!(err.contains(trouble), "{err}");
        }
    }

    /// A mount whose files are to belong to others, in a container whose root is the user 100000.
    fn with_owners(mount: &Value) -> Spec {
        let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        let mut mount = mount.clone();
        mount["destination"] = json!("/data");
        spec(json!({
            "mounts": [mount],
            "linux": {
                "namespaces": [{"type": "user"}],
                "uidMappings": mappings.clone(),
                "gidMappings": mappings,
            }
        }))
    }

    #[test]
    fn owners_of_a_mount_are_the_hosts_business() {
        let own = json!([{"containerID": 0, "hostID": 7, "size": 1}]);
        for (mount, uid, recursive) in [
            (json!({"options": ["rbind", "idmap"]}), 100_000, false),
            (json!({"options": ["rbind", "ridmap"]}), 100_000, true),
            (
                json!({"options": ["rbind"], "uidMappings": own.clone(), "gidMappings": own}),
                7,
                false,
            ),
        ] {
            let mut mount = mount;
            mount["source"] = json!("/srv");
            let divided = divide(with_owners(&mount), "x").unwrap();
            let owners = divided.binds[0].owners.as_ref().unwrap();
            assert_eq!(
                (owners.ids.uid(0), owners.recursive),
                (Some(uid), recursive)
            );
            let guest = &guest_json(&divided)["mounts"][0];
            assert_eq!(guest["options"], json!(["rbind"]));
            assert!(guest.get("uidMappings").is_none(), "{guest}");
        }
    }

    #[test]
    fn volume_in_memory_is_made_with_its_owner() {
        let mount = json!({"source": "/m", "options": ["rbind", "idmap"]});
        let look = |_: &Path, _: bool| {
            let volume = Volume {
                gid: 44,
                ..Volume::default()
            };
            let volume = OwnVolume { volume, disk: None };
            Ok(Source::Own {
                volume,
                folder: PathBuf::new(),
            })
        };
        let divided = super::divide(with_owners(&mount), "x", &Kind::Single, look).unwrap();
        let volume = &divided.volumes[0].volume;
        assert_eq!((volume.uid, volume.gid), (100_000, 100_044));
    }

    #[test]
    fn owners_that_nobody_names_are_refused() {
        for mount in [
            json!({"type": "tmpfs", "source": "tmpfs", "options": ["idmap"]}),
            json!({"source": "/srv", "options": ["bind"],
                   "uidMappings": [{"containerID": 0, "hostID": 7, "size": 1}]}),
        ] {
            let err = divide(with_owners(&mount), "x").unwrap_err().to_string();
            assert!(err.contains("idmap") && err.contains("/data"), "{err}");
        }
    }

    #[test]
    fn seccomp_listener_of_the_host_is_refused() {
        let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/listener"});
        let err = divide(spec(json!({"linux": {"seccomp": seccomp}})), "x").unwrap_err();
        assert!(err.to_string().contains("/run/listener"), "{err}");
        let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}
        ]});
        let err = divide(spec(json!({"linux": {"seccomp": seccomp}})), "x").unwrap_err();
        assert!(err.to_string().contains("SCMP_ACT_NOTIFY"), "{err}");
    }

    #[test]
    fn hooks_are_divided() {
        let hook = |name: &str| json!([{"path": format!("/bin/{name}")}]);
        let divided = divide(
            spec(json!({"hooks": {
                "prestart": hook("a"), "createRuntime": hook("b"), "startContainer": hook("d"),
                "poststart": hook("e"), "poststop": hook("f")
            }})),
            "x",
        )
        .unwrap();
        let paths = |hooks: &[Hook]| {
            hooks
                .iter()
                .map(|hook| hook.path().clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(paths(&divided.hooks.prestart), [Path::new("/bin/a")]);
        assert_eq!(paths(&divided.hooks.create_runtime), [Path::new("/bin/b")]);
        assert_eq!(paths(&divided.hooks.poststart), [Path::new("/bin/e")]);
        assert_eq!(paths(&divided.hooks.poststop), [Path::new("/bin/f")]);
        assert_eq!(
            guest_json(&divided)["hooks"],
            json!({"startContainer": [{"path": "/bin/d"}]})
        );
    }

    #[test]
    fn hook_that_is_a_program_of_the_host_in_the_guest_is_refused() {
        let hooks = json!({"createContainer": [{"path": "/bin/c"}]});
        let err = divide(spec(json!({"hooks": hooks})), "x").unwrap_err();
        assert!(err.to_string().contains("/bin/c"), "{err}");
    }

    fn mounted(mount: &Value, source: Source) -> Result<Divided, Error> {
        let spec = spec(json!({"mounts": [mount]}));
        let source = std::cell::Cell::new(Some(source));
        super::divide(spec, "x", &member(), |_, _| {
            source.take().ok_or(io::ErrorKind::InvalidData.into())
        })
    }

    #[test]
    fn disk_that_the_guest_mounts_keeps_its_owners() {
        let mount = json!({"source": "/m", "options": ["rbind", "idmap"]});
        let look = |_: &Path, _: bool| {
            let volume = Volume {
                direct: Some(DirectVolume::new()).into(),
                ..Volume::default()
            };
            let volume = OwnVolume { volume, disk: None };
            Ok(Source::Own {
                volume,
                folder: PathBuf::new(),
            })
        };
        let divided = super::divide(with_owners(&mount), "x", &Kind::Single, look);
        let err = divided.unwrap_err().to_string();
        assert!(err.contains("whose files have owners already"), "{err}");
    }

    #[test]
    fn volume_in_memory_is_the_guests() {
        let volume = OwnVolume {
            volume: Volume {
                name: "0:40".to_owned(),
                size: 7,
                ..Volume::default()
            },
            disk: None,
        };
        let source = Source::Own {
            volume: volume.clone(),
            folder: "sub".into(),
        };
        let mount = json!({
            "destination": "/cache", "type": "bind", "source": "/kubelet/cache",
            "options": ["rbind", "rprivate", "rw"]
        });
        let divided = mounted(&mount, source).unwrap();
        assert_eq!(divided.volumes, [volume]);
        assert!(divided.binds.is_empty());
        let mount = &guest_json(&divided)["mounts"][0];
        assert_eq!(mount["source"], "/run/husk/pod/volumes/0:40/sub");
        assert_eq!(mount["options"], json!(["rbind", "rprivate", "rw"]));
    }

    #[test]
    fn shm_of_the_pod_is_looked_at_as_such() {
        let shm =
            json!({"destination": "/dev/shm", "type": "bind", "source": "/sandboxes/pod/shm"});
        let asked = std::cell::Cell::new(false);
        super::divide(
            spec(json!({"mounts": [shm]})),
            "x",
            &member(),
            |path, is_shm| {
                asked.set(is_shm);
                shared(path, is_shm)
            },
        )
        .unwrap();
        assert!(asked.get());
    }

    #[test]
    fn device_is_the_guests_and_a_socket_nobodys() {
        let mount = json!({"destination": "/x", "type": "bind", "source": "/dev/null"});
        let divided = mounted(&mount, Source::Device).unwrap();
        assert!(divided.binds.is_empty());
        assert_eq!(guest_json(&divided)["mounts"][0]["source"], "/dev/null");
        let err = mounted(&mount, Source::Socket).unwrap_err().to_string();
        assert!(err.contains("/dev/null, a unix socket"), "{err}");
    }

    #[test]
    fn what_is_mounted_below_a_read_only_volume_stays_writable() {
        let options = |options: Value, has_mounts| {
            let mount = json!({
                "destination": "/x", "type": "bind", "source": "/x", "options": options
            });
            let divided = mounted(&mount, Source::Shared { has_mounts }).unwrap();
            let access = divided.binds[0].access;
            (access, guest_json(&divided)["mounts"][0]["options"].clone())
        };
        let (access, kept) = options(json!(["rbind", "ro"]), true);
        assert_eq!((access, kept), (Access::Read, json!(["rbind"])));
        let (access, kept) = options(json!(["rbind", "ro"]), false);
        assert_eq!((access, kept), (Access::Read, json!(["rbind", "ro"])));
        let (access, kept) = options(json!(["rbind", "rro"]), true);
        assert_eq!((access, kept), (Access::ReadAll, json!(["rbind", "rro"])));
    }

    #[test]
    fn bidirectional_mount_is_refused() {
        let mount = json!({
            "destination": "/x", "type": "bind", "source": "/x", "options": ["rbind", "rshared"]
        });
        let source = Source::Shared { has_mounts: false };
        let err = mounted(&mount, source).unwrap_err().to_string();
        assert!(err.contains("Bidirectional"), "{err}");
    }

    #[test]
    fn namespaces_of_the_sandbox_are_the_pods() {
        let namespaces = json!([
            {"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
            {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "network", "path": "/proc/7/ns/net"},
            {"type": "mount"}
        ]);
        let spec = spec(json!({"linux": {"namespaces": namespaces}}));
        let divided = super::divide(spec, "x", &member(), shared).unwrap();
        assert_eq!(
            guest_json(&divided)["linux"]["namespaces"],
            json!([
                {"type": "pid", "path": "/run/husk/pod/ns/pid"},
                {"type": "ipc", "path": "/run/husk/pod/ns/ipc"},
                {"type": "uts", "path": "/run/husk/pod/ns/uts"},
                {"type": "mount"}
            ])
        );
    }

    #[test]
    fn sandbox_has_no_mounts_and_not_the_hosts_namespaces() {
        let sandbox = |namespaces: Value| {
            let spec = spec(json!({
                "linux": {"namespaces": namespaces},
                "mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/absent"}]
            }));
            super::divide(spec, "x", &Kind::Sandbox, shared)
        };
        let divided = sandbox(json!([{"type": "pid"}, {"type": "ipc"}])).unwrap();
        assert!(divided.binds.is_empty());
        let guest = guest_json(&divided);
        assert!(guest.get("mounts").is_none());
        assert_eq!(guest["linux"]["namespaces"][2], json!({"type": "uts"}));
        let err = sandbox(json!([{"type": "ipc"}])).unwrap_err().to_string();
        assert!(err.contains("hostPID"), "{err}");
        let err = sandbox(json!([{"type": "pid"}])).unwrap_err().to_string();
        assert!(err.contains("hostIPC"), "{err}");
    }
}
