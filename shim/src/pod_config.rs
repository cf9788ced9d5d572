//! A pod as containerd's sandbox service describes it, turned into what containerd otherwise makes of it itself: the OCI
//! configuration of the container that stands for the pod, and the files of /etc that its containers share.

use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim::protos::protobuf::Message;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use husk_protocol::cri::{DNSConfig, IDMapping, NamespaceMode, PodSandboxConfig};
use oci_spec::runtime::{Mount, Spec};
use serde_json::{Value, json};

use crate::error::Error;
use crate::pod::{CONTAINER_TYPE, CPU_PERIOD, CPU_QUOTA, MEMORY, SANDBOX_ID};
use crate::storage::failed;

/// The folder of a bundle in which the files for the pod's containers are.
const FILES: &str = "pod";

const HOSTS: &str = "hosts";
const HOSTNAME: &str = "hostname";
const RESOLV_CONF: &str = "resolv.conf";

/// Begins the names of annotations by which containerd describes a pod.
const OF_CONTAINERD: &str = "io.kubernetes.cri.";

/// Which groups may use ICMP sockets. In a user namespace not all of them exist.
const PING: &str = "net.ipv4.ping_group_range";

/// What containerd 2 sets in a pod's own network, unless the pod sets it: low ports and ping are for all users.
const DEFAULT_SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    (PING, "0 2147483647"),
];

/// What `CreateSandbox` says.
#[derive(Debug)]
pub(crate) struct Described<'a> {
    pub(crate) id: &'a str,
    /// Empty for a pod in the host's network.
    pub(crate) network_namespace: &'a str,
    pub(crate) annotations: &'a HashMap<String, String>,
    pub(crate) config: PodSandboxConfig,
}

/// The description of the pod that is in the options of a request; the default one if there are none.
///
/// # Errors
/// `UnknownOptions`, `InvalidRequest`
pub(crate) fn parse(options: Option<&Any>) -> Result<PodSandboxConfig, Error> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(PodSandboxConfig::new());
    };
    if !any.type_url.ends_with("PodSandboxConfig") {
        return Err(Error::UnknownOptions(any.type_url.clone()));
    }
    PodSandboxConfig::parse_from_bytes(&any.value).map_err(|source| Error::InvalidRequest {
        what: "description of the pod",
        source: source.into(),
    })
}

impl Described<'_> {
    /// Writes it all to the bundle.
    ///
    /// # Errors
    /// `Storage`
    pub(crate) fn write(&self, bundle: &Path) -> Result<(), Error> {
        let files = bundle.join(FILES);
        create_dir(&files)?;
        write(&bundle.join("config.json"), self.oci_spec().to_string())?;
        write(&files.join(HOSTNAME), format!("{}\n", self.config.hostname))?;
        // As containerd does for its own: what the host says, unless the pod has a wish.
        write(&files.join(HOSTS), read("/etc/hosts")?)?;
        let resolv_conf = match self.config.dns_config.as_ref() {
            Some(dns) => resolv_conf(dns),
            None => read("/etc/resolv.conf")?,
        };
        write(&files.join(RESOLV_CONF), resolv_conf)
    }

    fn oci_spec(&self) -> Value {
        let linux = self.config.linux.get_or_default();
        let security = linux.security_context.get_or_default();
        let options = security.namespace_options.get_or_default();
        // What is left out is the host's, which is refused as it is in a configuration of containerd's own.
        let own = [
            ("pid", options.pid),
            ("ipc", options.ipc),
            ("uts", NamespaceMode::POD.into()),
            ("mount", NamespaceMode::POD.into()),
        ];
        let mut namespaces: Vec<Value> = own
            .into_iter()
            .filter(|(_, mode)| mode.enum_value() != Ok(NamespaceMode::NODE))
            .map(|(kind, _)| json!({"type": kind}))
            .collect();
        let own_network = options.network.enum_value() != Ok(NamespaceMode::NODE);
        if own_network {
            namespaces.push(match self.network_namespace {
                "" => json!({"type": "network"}),
                path => json!({"type": "network", "path": path}),
            });
        }
        let user = options.userns_options.as_ref();
        let user = user.filter(|user| user.mode.enum_value() == Ok(NamespaceMode::POD));
        if user.is_some() {
            namespaces.push(json!({"type": "user"}));
        }
        let mut sysctls = linux.sysctls.clone();
        if own_network {
            let defaults = DEFAULT_SYSCTLS.iter();
            for &(name, value) in defaults.filter(|(name, _)| user.is_none() || *name != PING) {
                sysctls
                    .entry(name.to_owned())
                    .or_insert_with(|| value.to_owned());
            }
        }
        // What containerd says of a pod, a pod cannot say of itself.
        let of_pod = self.config.annotations.iter();
        let mut annotations: HashMap<&str, String> = of_pod
            .filter(|(name, _)| !name.starts_with(OF_CONTAINERD))
            .chain(self.annotations)
            .map(|(name, value)| (name.as_str(), value.clone()))
            .collect();
        annotations.extend([
            (CONTAINER_TYPE, "sandbox".to_owned()),
            (SANDBOX_ID, self.id.to_owned()),
        ]);
        if let Some(resources) = linux.resources.as_ref() {
            annotations.extend([
                (CPU_PERIOD, resources.cpu_period.to_string()),
                (CPU_QUOTA, resources.cpu_quota.to_string()),
                (MEMORY, resources.memory_limit_in_bytes.to_string()),
            ]);
        }
        json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"args": ["pause"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "hostname": self.config.hostname,
            "annotations": annotations,
            "linux": {
                "namespaces": namespaces,
                "sysctl": sysctls,
                "cgroupsPath": cgroups_path(&linux.cgroup_parent, self.id),
                "uidMappings": user.map(|user| mappings(&user.uids)),
                "gidMappings": user.map(|user| mappings(&user.gids))
            }
        })
    }
}

/// The control group of the pod's sandbox, as containerd writes it: a path, or for systemd slice, prefix and name.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    let slice = parent.rsplit('/').next().unwrap_or_default();
    match parent {
        "" => None,
        _ if slice.ends_with(".slice") => Some(format!("{slice}:cri-containerd:{id}")),
        _ => Some(format!("{parent}/{id}")),
    }
}

fn mappings(of_cri: &[IDMapping]) -> Vec<Value> {
    let mappings = of_cri.iter();
    mappings
        .map(|ids| {
            json!({"containerID": ids.container_id, "hostID": ids.host_id, "size": ids.length})
        })
        .collect()
}

/// Gives a container of the pod `sandbox` the files that are in the sandbox's bundle, if there are any: instead of those
/// that containerd has only for pods that it makes itself, and where it mounts none. So with the pod's /dev/shm, which
/// otherwise would be the container's own.
pub(crate) fn supply(spec: &mut Spec, sandbox: &str, bundle: &Path) {
    let files = bundle.join(FILES);
    if !files.exists() {
        return;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let supplied = mount
            .source()
            .as_deref()
            .and_then(|source| own_file(source, sandbox, bundle));
        if supplied.is_some() {
            mount.set_source(supplied);
        }
        if mount.destination() == Path::new("/dev/shm") && mount.typ().as_deref() == Some("tmpfs") {
            mount
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(files.join(sandbox).join("shm")))
                .set_options(Some(["rbind", "rw"].map(str::to_owned).into()));
        }
    }
    for name in [HOSTS, HOSTNAME, RESOLV_CONF] {
        let destination = Path::new("/etc").join(name);
        if mounts
            .iter()
            .all(|mount| *mount.destination() != destination)
        {
            let mut mount = Mount::default();
            mount
                .set_destination(destination)
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(files.join(name)))
                .set_options(Some(["rbind", "rprivate", "rw"].map(str::to_owned).into()));
            mounts.push(mount);
        }
    }
    spec.set_mounts(Some(mounts));
}

fn own_file(source: &Path, sandbox: &str, bundle: &Path) -> Option<PathBuf> {
    let name = [HOSTS, HOSTNAME, RESOLV_CONF]
        .into_iter()
        .find(|name| source.ends_with(Path::new(sandbox).join(name)))?;
    (!source.exists()).then(|| bundle.join(FILES).join(name))
}

/// See resolv.conf(5).
fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    let mut line = |key: &str, values: &[String]| {
        if !values.is_empty() {
            writeln!(text, "{key} {}", values.join(" ")).expect("a string takes all");
        }
    };
    line("search", &dns.searches);
    for server in &dns.servers {
        line("nameserver", std::slice::from_ref(server));
    }
    line("options", &dns.options);
    text
}

/// Empty if there is none.
fn read(path: &str) -> Result<String, Error> {
    match std::fs::read_to_string(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(failed("read", Path::new(path))),
    }
}

fn write(path: &Path, content: String) -> Result<(), Error> {
    std::fs::write(path, content).map_err(failed("write", path))
}

fn create_dir(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(failed("create", path))
}

#[cfg(test)]
mod tests {
    use husk_protocol::cri::NamespaceOption;
    use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

    use super::*;
    use crate::network::Place;
    use crate::pod::{Kind, Limits};

    fn described<'a>(
        config: PodSandboxConfig,
        annotations: &'a HashMap<String, String>,
    ) -> Described<'a> {
        Described {
            id: "p",
            network_namespace: "/run/netns/n",
            annotations,
            config,
        }
    }

    fn namespace_options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        security.namespace_options.mut_or_insert_default()
    }

    fn spec(config: PodSandboxConfig) -> Spec {
        serde_json::from_value(described(config, &HashMap::new()).oci_spec()).unwrap()
    }

    #[test]
    fn a_pod_is_the_sandbox_of_its_containers() {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".to_owned();
        let linux = config.linux.mut_or_insert_default();
        linux
            .sysctls
            .insert("net.core.somaxconn".to_owned(), "1".to_owned());
        let resources = linux.resources.mut_or_insert_default();
        (resources.cpu_period, resources.cpu_quota) = (100_000, 150_000);
        resources.memory_limit_in_bytes = 1 << 30;
        let spec = spec(config);
        assert_eq!(Kind::of(&spec).unwrap(), Kind::Sandbox);
        let limits = Limits {
            millicpus: Some(1500),
            memory_bytes: Some(1 << 30),
        };
        assert_eq!(Limits::of_sandbox(&spec).unwrap(), limits);
        assert_eq!(spec.hostname().as_deref(), Some("web"));
        let sysctl = spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
        assert_eq!(sysctl["net.core.somaxconn"], "1");
        assert!(matches!(
            Place::of(&spec),
            Place::Namespace(path) if path == Path::new("/run/netns/n")
        ));
    }

    #[test]
    fn low_ports_and_ping_are_for_all_users_unless_the_pod_says_otherwise() {
        const PORTS: &str = "net.ipv4.ip_unprivileged_port_start";
        let sysctls = |config| spec(config).linux().as_ref()?.sysctl().clone();
        let found = sysctls(PodSandboxConfig::new()).unwrap();
        assert_eq!((&*found[PORTS], &*found[PING]), ("0", "0 2147483647"));

        let mut config = PodSandboxConfig::new();
        let linux = config.linux.mut_or_insert_default();
        linux.sysctls.insert(PORTS.to_owned(), "80".to_owned());
        namespace_options(&mut config)
            .userns_options
            .mut_or_insert_default();
        let found = sysctls(config).unwrap();
        assert_eq!(found[PORTS], "80");
        assert!(!found.contains_key(PING));

        let mut config = PodSandboxConfig::new();
        namespace_options(&mut config).network = NamespaceMode::NODE.into();
        assert!(sysctls(config).unwrap_or_default().is_empty());
    }

    #[test]
    fn a_pod_cannot_speak_for_containerd() {
        let mut config = PodSandboxConfig::new();
        for name in [MEMORY, "io.husk.log-level"] {
            config.annotations.insert(name.to_owned(), "1".to_owned());
        }
        let spec = spec(config);
        let annotations = spec.annotations().as_ref().unwrap();
        assert!(!annotations.contains_key(MEMORY));
        assert!(annotations.contains_key("io.husk.log-level"));
    }

    #[test]
    fn what_is_of_the_host_is_left_out() {
        let mut config = PodSandboxConfig::new();
        let options = namespace_options(&mut config);
        options.pid = NamespaceMode::NODE.into();
        options.ipc = NamespaceMode::NODE.into();
        let spec = spec(config);
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        let kinds: Vec<_> = namespaces.iter().map(LinuxNamespace::typ).collect();
        let [uts, mount, network] = [
            LinuxNamespaceType::Uts,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Network,
        ];
        assert_eq!(kinds, [uts, mount, network]);
    }

    #[test]
    fn users_and_control_group_are_those_of_the_pod() {
        let mut config = PodSandboxConfig::new();
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod7".to_owned();
        let options = namespace_options(&mut config);
        let user = options.userns_options.mut_or_insert_default();
        let mut ids = IDMapping::new();
        (ids.host_id, ids.length) = (65536, 1000);
        user.uids.push(ids);
        let spec = spec(config);
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(
            linux.cgroups_path().as_deref(),
            Some(Path::new("/kubepods/pod7/p"))
        );
        let ids = &linux.uid_mappings().as_ref().unwrap()[0];
        assert_eq!(
            (ids.host_id(), ids.container_id(), ids.size()),
            (65536, 0, 1000)
        );
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(
            namespaces
                .iter()
                .any(|one| one.typ() == LinuxNamespaceType::User)
        );
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod7.slice", "p").as_deref(),
            Some("kubepods-pod7.slice:cri-containerd:p")
        );
        assert_eq!(cgroups_path("", "p"), None);
    }

    #[test]
    fn a_pod_in_the_hosts_network_asks_for_it() {
        let mut config = PodSandboxConfig::new();
        let options = namespace_options(&mut config);
        options.network = NamespaceMode::NODE.into();
        assert!(matches!(Place::of(&spec(config)), Place::Host));
    }

    #[test]
    fn options_are_those_of_a_pod() {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".to_owned();
        let any = |type_url: &str, value: Vec<u8>| Any {
            type_url: type_url.to_owned(),
            value,
            ..Any::default()
        };
        let good = any(
            "runtime.v1.PodSandboxConfig",
            config.write_to_bytes().unwrap(),
        );
        assert_eq!(parse(Some(&good)).unwrap(), config);
        assert_eq!(parse(None).unwrap(), PodSandboxConfig::new());
        let other = any("runtime.v1.ContainerConfig", Vec::new());
        assert!(matches!(parse(Some(&other)), Err(Error::UnknownOptions(_))));
        let cut = any("runtime.v1.PodSandboxConfig", vec![0x12, 9]);
        assert!(matches!(
            parse(Some(&cut)),
            Err(Error::InvalidRequest { .. })
        ));
    }

    #[test]
    fn wishes_for_dns_are_written_as_the_resolver_reads_them() {
        let mut dns = DNSConfig::new();
        dns.servers = vec!["10.0.0.10".to_owned(), "fd00::a".to_owned()];
        dns.searches = vec![
            "ns.svc.cluster.local".to_owned(),
            "svc.cluster.local".to_owned(),
        ];
        dns.options = vec!["ndots:5".to_owned()];
        assert_eq!(
            resolv_conf(&dns),
            "search ns.svc.cluster.local svc.cluster.local\n\
             nameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
    }

    #[test]
    fn files_that_containerd_has_not_come_from_the_bundle() {
        let bundle = tempfile::tempdir().unwrap();
        let config = PodSandboxConfig::new();
        described(config, &HashMap::new())
            .write(bundle.path())
            .unwrap();
        let theirs = tempfile::tempdir().unwrap();
        let sandbox = theirs.path().join("p");
        std::fs::create_dir(&sandbox).unwrap();
        std::fs::write(sandbox.join("hostname"), "theirs").unwrap();
        let source = |name: &str| sandbox.join(name);
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "mounts": [
                {"destination": "/etc/hosts", "type": "bind", "source": source("hosts")},
                {"destination": "/etc/hostname", "type": "bind", "source": source("hostname")},
                {"destination": "/data", "type": "bind", "source": "/srv/hosts"}
            ]
        }))
        .unwrap();
        supply(&mut spec, "p", bundle.path());
        let sources: Vec<_> = spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| mount.source().clone().unwrap())
            .collect();
        let ours = |name: &str| bundle.path().join("pod").join(name);
        assert!(ours("hosts").exists());
        let expected = [
            ours("hosts"),
            source("hostname"),
            "/srv/hosts".into(),
            ours("resolv.conf"),
        ];
        assert_eq!(sources, expected);
    }

    #[test]
    fn a_pod_that_containerd_has_made_is_left_alone() {
        let bundle = tempfile::tempdir().unwrap();
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.1.0"})).unwrap();
        supply(&mut spec, "p", bundle.path());
        assert_eq!(spec.mounts(), &None);
    }
}
