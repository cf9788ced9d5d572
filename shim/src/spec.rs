//! What becomes of the OCI configuration on its way from the bundle to the guest.
//!
//! The host's part is taken out (bind sources, hooks of the runtime namespace, and all that names a thing of the host
//! that the guest does not have); the rest goes to the agent as it is. Pure functions: storage mounts, hooks run, and
//! the agent creates elsewhere.

use std::path::{Path, PathBuf};

use husk_protocol::SHARE_MOUNT_POINT;
use oci_spec::runtime::{
    Hook, Hooks, Linux, LinuxNamespaceType, LinuxResources, Mount, Process, Spec,
};

use crate::error::Error;

/// Where in the shared folder of a container its root file system is.
pub(crate) const ROOTFS: &str = "rootfs";

/// Where in the shared folder of a container its bind mounts are, numbered.
pub(crate) const MOUNTS: &str = "mounts";

/// Added to a container's memory limit for the least size of its VM: the guest's kernel, its page tables and
/// the agent live in the same memory, and must not make the limit unreachable.
const GUEST_OVERHEAD_MIB: u64 = 128;

/// A configuration divided between guest and host.
#[derive(Debug)]
pub(crate) struct Divided {
    /// For the agent.
    pub(crate) guest: Spec,
    /// The folder of the root file system on the host where containerd mounts none, relative to the bundle.
    pub(crate) root: PathBuf,
    /// To be mounted below the container's share, the n-th at `mounts/<n>`.
    pub(crate) binds: Vec<Bind>,
    /// To be run by the shim.
    pub(crate) hooks: HostHooks,
}

/// A bind mount of the specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    pub(crate) recursive: bool,
    pub(crate) read_only: bool,
    /// Whether mounts that the host makes later below the source are to appear.
    pub(crate) follows_host: bool,
}

/// The hooks that run in the runtime's namespace, which is the host's.
#[derive(Debug, Default)]
pub(crate) struct HostHooks {
    pub(crate) prestart: Vec<Hook>,
    pub(crate) create_runtime: Vec<Hook>,
    pub(crate) poststart: Vec<Hook>,
    pub(crate) poststop: Vec<Hook>,
}

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmSize {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
}

/// Divides the specification of container `id`.
///
/// # Errors
/// `UnsupportedSpec` for what cannot be done in a VM.
pub(crate) fn divide(mut spec: Spec, id: &str) -> Result<Divided, Error> {
    let share = Path::new(SHARE_MOUNT_POINT).join(id);

    let mut root = spec
        .root()
        .clone()
        .ok_or_else(|| Error::UnsupportedSpec("has no root".to_owned()))?;
    let host_root = root.path().clone();
    root.set_path(share.join(ROOTFS));
    spec.set_root(Some(root));

    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut binds = Vec::new();
    for mount in mounts.iter_mut().filter(|mount| is_bind(mount)) {
        let guest_source = share.join(MOUNTS).join(binds.len().to_string());
        binds.push(bind(mount)?);
        mount.set_source(Some(guest_source));
    }
    spec.set_mounts(Some(mounts));

    let hooks = spec
        .hooks_mut()
        .as_mut()
        .map(take_host_hooks)
        .unwrap_or_default();
    if let Some(process) = spec.process_mut() {
        drop_host_labels(process);
    }
    if let Some(linux) = spec.linux_mut() {
        drop_host_linux(linux)?;
    }
    Ok(Divided {
        guest: spec,
        root: host_root,
        binds,
        hooks,
    })
}

/// Takes out of `process` the labels of security modules that are the host's: the guest's kernel has none.
pub(crate) fn drop_host_labels(process: &mut Process) {
    process.set_selinux_label(None);
    process.set_apparmor_profile(None);
}

/// Takes out of `resources` what counts or names devices and processors of the host.
pub(crate) fn drop_host_resources(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        // Numbers of the host's processors and memory nodes.
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    if let Some(block_io) = resources.block_io_mut() {
        // Major and minor numbers of the host's disks.
        block_io.set_weight_device(None);
        block_io.set_throttle_read_bps_device(None);
        block_io.set_throttle_write_bps_device(None);
        block_io.set_throttle_read_iops_device(None);
        block_io.set_throttle_write_iops_device(None);
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
}

/// The size for a VM whose first container is `spec`: never smaller than configured, never more vCPUs than the host has.
pub(crate) fn vm_size(spec: &Spec, config: &husk_config::Vm, host: VmSize) -> VmSize {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());

    let limit_mib = resources
        .and_then(|resources| resources.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .map(|bytes| bytes.div_ceil(1 << 20));
    let memory_mib = limit_mib.map_or(config.memory_mib(), |mib| {
        u32::try_from(mib.saturating_add(GUEST_OVERHEAD_MIB))
            .unwrap_or(u32::MAX)
            .min(host.memory_mib)
            .max(config.memory_mib())
    });

    let wanted_cpus = resources
        .and_then(|resources| resources.cpu().as_ref())
        .and_then(|cpu| {
            let quota = u64::try_from(cpu.quota()?).ok()?;
            let period = cpu.period().filter(|&period| period > 0)?;
            Some(u8::try_from(quota.div_ceil(period)).unwrap_or(u8::MAX))
        })
        .unwrap_or(0);
    let vcpus = wanted_cpus.min(host.vcpus).max(config.vcpus());
    VmSize { vcpus, memory_mib }
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

fn bind(mount: &Mount) -> Result<Bind, Error> {
    let source = mount.source().clone().ok_or_else(|| {
        Error::UnsupportedSpec(format!(
            "has a bind mount to {} without a source",
            mount.destination().display()
        ))
    })?;
    Ok(Bind {
        source,
        destination: mount.destination().clone(),
        recursive: has_option(mount, &["rbind"]),
        read_only: has_option(mount, &["ro", "rro"]),
        follows_host: !has_option(mount, &["private", "rprivate"]),
    })
}

fn take_host_hooks(hooks: &mut Hooks) -> HostHooks {
    let prestart = hooks.prestart_mut().take();
    HostHooks {
        prestart: prestart.unwrap_or_default(),
        create_runtime: hooks.create_runtime_mut().take().unwrap_or_default(),
        poststart: hooks.poststart_mut().take().unwrap_or_default(),
        poststop: hooks.poststop_mut().take().unwrap_or_default(),
    }
}

fn drop_host_linux(linux: &mut Linux) -> Result<(), Error> {
    if let Some(namespaces) = linux.namespaces_mut() {
        // The VM is the network namespace.
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
        if let Some((namespace, path)) = namespaces
            .iter()
            .find_map(|namespace| Some((namespace, namespace.path().as_ref()?)))
        {
            return Err(Error::UnsupportedSpec(format!(
                "asks for the {} namespace {} of the host, which a container in a VM cannot enter",
                namespace.typ(),
                path.display()
            )));
        }
    }
    if let Some(resources) = linux.resources_mut() {
        drop_host_resources(resources);
    }
    if let Some(path) = linux
        .seccomp()
        .as_ref()
        .and_then(|seccomp| seccomp.listener_path().as_ref())
    {
        return Err(Error::UnsupportedSpec(format!(
            "names {} of the host as seccomp listener, to which a guest cannot pass descriptors",
            path.display()
        )));
    }
    // The agent chooses the place in the guest's hierarchy.
    linux.set_cgroups_path(None);
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    linux.set_net_devices(None);
    linux.set_memory_policy(None);
    Ok(())
}

#[cfg(test)]
mod tests {
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

    fn guest_json(divided: &Divided) -> Value {
        serde_json::to_value(&divided.guest).unwrap()
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
    fn binds_are_numbered_and_other_mounts_stay() {
        let divided = divide(
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
            read_only: true,
            follows_host: true,
        };
        let hosts = Bind {
            source: "/etc/hosts".into(),
            destination: "/etc/hosts".into(),
            recursive: false,
            read_only: false,
            follows_host: false,
        };
        assert_eq!(divided.binds, [data, hosts]);
        let mounts = &guest_json(&divided)["mounts"];
        assert_eq!(mounts[0]["source"], "proc");
        assert_eq!(mounts[1]["source"], "/run/husk/share/x/mounts/0");
        assert_eq!(mounts[1]["options"], json!(["rbind", "ro"]));
        assert_eq!(mounts[2]["source"], "/run/husk/share/x/mounts/1");
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
    fn seccomp_listener_of_the_host_is_refused() {
        let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/listener"});
        let err = divide(spec(json!({"linux": {"seccomp": seccomp}})), "x").unwrap_err();
        assert!(err.to_string().contains("/run/listener"), "{err}");
    }

    #[test]
    fn hooks_are_divided() {
        let hook = |name: &str| json!([{"path": format!("/bin/{name}")}]);
        let divided = divide(
            spec(json!({"hooks": {
                "prestart": hook("a"), "createRuntime": hook("b"), "createContainer": hook("c"),
                "startContainer": hook("d"), "poststart": hook("e"), "poststop": hook("f")
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
            json!({"createContainer": [{"path": "/bin/c"}], "startContainer": [{"path": "/bin/d"}]})
        );
    }

    fn sized(resources: &Value, host_cpus: u8) -> VmSize {
        let config = husk_config::Config::default();
        vm_size(
            &spec(json!({"linux": {"resources": resources}})),
            config.vm(),
            VmSize {
                vcpus: host_cpus,
                memory_mib: 8192,
            },
        )
    }

    #[test]
    fn limits_enlarge_the_vm_and_never_shrink_it() {
        let default = VmSize {
            vcpus: 1,
            memory_mib: 512,
        };
        assert_eq!(sized(&json!({}), 8), default);
        assert_eq!(sized(&json!({"memory": {"limit": 64 << 20}}), 8), default);
        assert_eq!(sized(&json!({"memory": {"limit": -1}}), 8), default);
        // All of the default would be for the container, and nothing for the guest.
        assert_eq!(
            sized(&json!({"memory": {"limit": 512 << 20}}), 8).memory_mib,
            512 + 128
        );
        assert_eq!(
            sized(&json!({"memory": {"limit": 1u64 << 30}}), 8),
            VmSize {
                vcpus: 1,
                memory_mib: 1024 + 128
            }
        );
        // What some clients send for "no limit".
        assert_eq!(
            sized(&json!({"memory": {"limit": i64::MAX - 4095}}), 8).memory_mib,
            8192
        );
        assert_eq!(
            sized(&json!({"cpu": {"quota": 250_000, "period": 100_000}}), 8),
            VmSize {
                vcpus: 3,
                memory_mib: 512
            }
        );
        assert_eq!(
            sized(&json!({"cpu": {"quota": 900_000, "period": 100_000}}), 4).vcpus,
            4
        );
        assert_eq!(
            sized(&json!({"cpu": {"quota": -1, "period": 100_000}}), 4),
            default
        );
    }
}
