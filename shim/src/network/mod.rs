//! The network of a pod: what is in its network namespace becomes that of the guest, whatever CNI plug-ins have made it.
//!
//! ```text
//!             the pod's network namespace                          the guest
//!  peer ◄───► eth0 ──── ingress: redirect ────► tap0_husk ◄──────► eth0: same name, MAC, MTU, addresses, routes,
//!             eth0 ◄─── redirect :ingress ───── tap0_husk          rules and permanent neighbours
//! ```
//!
//! The namespace keeps its configuration, of which the guest gets a copy, and of what changes later, too ([`Follow`]); packets no longer reach it. Nothing else on
//! the host is changed, and [`remove`] takes it all back, be it called by the shim that did it or by the `delete` action
//! after that shim was killed: what is ours in a namespace is known by its name.

mod error;
mod follow;
mod forward;
mod namespace;
mod redirect;
mod scan;
mod settings;
mod steer;
mod tap;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use husk_config::{Datapath, HostNetwork};
use husk_protocol::agent::UpdateNetworkRequest;
use husk_vmm::config::NicConfig;
use log::{info, warn};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::agent::Agent;
use crate::error::{Error, chain};
use crate::vm::End;
use crate::vmm::Worker;
pub(crate) use error::NetworkError;
use follow::Follow;
use forward::Forward;
use namespace::Namespace;
use scan::Interface;
use tokio::task::JoinHandle;

/// Most pairs of queues of a device, each of which costs the host a thread.
const MAX_QUEUE_PAIRS: usize = 16;

/// Descriptors that the devices of a VM may take, of the 64 that fit beside the message that boots it.
const MAX_DESCRIPTORS: usize = 48;

/// Where the network of a container is, as its OCI configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a network namespace that somebody has made for it.
    Namespace(PathBuf),
    /// Nowhere: it is to have a new namespace, in which there would be nothing.
    Nowhere,
    /// In the host's network namespace.
    Host,
}

impl Place {
    /// Of the first container of a sandbox: the others share its network.
    pub(crate) fn of(spec: &Spec) -> Self {
        let namespace = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref())
            .and_then(|all| {
                all.iter()
                    .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
            });
        match namespace.map(|namespace| namespace.path()) {
            Some(Some(path)) => Self::Namespace(path.clone()),
            Some(None) => Self::Nowhere,
            None => Self::Host,
        }
    }
}

/// What a VM's network is made from.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) place: Place,
    pub(crate) config: husk_config::Network,
    /// The VM's processors, for as many queues.
    pub(crate) vcpus: u8,
    /// A file to name the namespace in before anything in it is changed, for the `delete` action.
    pub(crate) record: &'a Path,
}

/// A pod's network, connected to devices that wait for a VM.
#[derive(Debug, Default)]
pub(crate) struct Network {
    /// Where something is changed, and the record of it.
    changed: Option<(Namespace, PathBuf)>,
    nics: Vec<Nic>,
    guest: UpdateNetworkRequest,
    forward: Option<Forward>,
    follow: Option<Follow>,
    /// What goes on changing something.
    following: Mutex<Option<JoinHandle<()>>>,
    took: Duration,
}

/// A virtio-net device and what it is connected to.
#[derive(Debug)]
struct Nic {
    config: NicConfig,
    taps: Vec<OwnedFd>,
    vhosts: Vec<OwnedFd>,
}

impl Network {
    /// Connects the pod's interfaces to taps. On failure nothing is left.
    pub(crate) async fn set_up(wanted: &Wanted<'_>) -> Result<Self, Error> {
        match &wanted.place {
            Place::Nowhere => Ok(Self::default()),
            Place::Host => refuse_host(wanted.config),
            Place::Namespace(path) => {
                let failed = |source| Error::Network {
                    namespace: path.clone(),
                    source,
                };
                let namespace = Namespace::open(path).map_err(failed)?;
                if namespace.is_own().map_err(failed)? {
                    return refuse_host(wanted.config);
                }
                Self::copy(namespace, wanted).await.map_err(failed)
            }
        }
    }

    async fn copy(namespace: Namespace, wanted: &Wanted<'_>) -> Result<Self, NetworkError> {
        let begin = Instant::now();
        let forward = match Forward::listen(&namespace).await {
            Ok(forward) => Some(forward),
            Err(err) => {
                let path = namespace.path().display();
                warn!(
                    "ports of the pod are not forwarded: network namespace {path}: {}",
                    chain(&err)
                );
                None
            }
        };
        // It hears of what changes after the first look.
        let (netlink, news) = namespace.subscribe(follow::GROUPS).await?;
        let found = scan::scan(&netlink).await?;
        if found.interfaces.is_empty() {
            info!(
                "network namespace {} has no interface that is up: the guest has only loopback",
                namespace.path().display()
            );
        }
        std::fs::write(wanted.record, namespace.path().as_os_str().as_bytes()).map_err(
            |source| NetworkError::Record {
                path: wanted.record.display().to_string(),
                source,
            },
        )?;
        match connect(&namespace, &netlink, &found.interfaces, wanted).await {
            Ok(nics) => {
                let guest = settings::request(&found);
                let follow = Follow {
                    namespace: namespace.clone(),
                    netlink,
                    news,
                    config: wanted.config,
                    vcpus: wanted.vcpus,
                    fixed: found.interfaces,
                    plugged: Vec::new(),
                    unusable: HashMap::new(),
                    unplugged: HashSet::new(),
                    told: guest.clone(),
                };
                Ok(Self {
                    guest,
                    changed: Some((namespace, wanted.record.to_owned())),
                    nics,
                    forward,
                    follow: Some(follow),
                    following: Mutex::default(),
                    took: begin.elapsed(),
                })
            }
            Err(err) => {
                take_back(&namespace, wanted.record).await;
                Err(err)
            }
        }
    }

    /// The devices for the VM.
    pub(crate) fn nics(&self) -> Vec<NicConfig> {
        self.nics.iter().map(|nic| nic.config.clone()).collect()
    }

    /// Their descriptors, in the order in which the worker wants them.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.nics.iter().flat_map(Nic::descriptors)
    }

    /// Closes the descriptors, of which the worker has its own copies: the taps last as long as those.
    pub(crate) fn close(&mut self) {
        self.nics.clear();
    }

    /// What the agent has to set; `None` if there is nothing to set.
    pub(crate) fn guest(&self) -> Option<&UpdateNetworkRequest> {
        (!self.guest.interfaces.is_empty()).then_some(&self.guest)
    }

    /// Forwards ports to the guest, and keeps its network like the namespace's, until the VM has ended.
    pub(crate) fn serve(&mut self, worker: &Worker, agent: &Agent, end: &End) {
        if let Some(forward) = self.forward.take() {
            tokio::spawn(until(end.clone(), forward.serve(worker.clone())));
        }
        if let Some(follow) = self.follow.take() {
            let work = follow.serve(worker.clone(), agent.clone());
            self.following = Mutex::new(Some(tokio::spawn(until(end.clone(), work))));
        }
    }

    /// How long it took to set it up.
    pub(crate) fn took(&self) -> Duration {
        self.took
    }

    /// Gives the namespace back as it was. To be called when the VM has ended; may be called more than once.
    pub(crate) async fn remove(&self) {
        let following = self
            .following
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = following {
            task.abort();
            // It has ended, however that was.
            let _ = task.await;
        }
        if let Some((namespace, record)) = &self.changed {
            take_back(namespace, record).await;
        }
    }
}

async fn until(end: End, work: impl Future<Output = ()>) {
    tokio::select! {
        () = work => {}
        _ = end.wait() => {}
    }
}

/// Takes away what a shim that is gone has left in the namespace that its record names.
pub(crate) async fn remove_recorded(record: &Path) {
    // Without a record nothing was changed.
    if let Ok(path) = std::fs::read(record) {
        // Where the namespace is gone, so is all that was in it.
        if let Ok(namespace) = Namespace::open(Path::new(OsStr::from_bytes(&path))) {
            take_back(&namespace, record).await;
        }
    }
}

/// Without the record nobody does it a second time, when the namespace may be another VM's.
async fn take_back(namespace: &Namespace, record: &Path) {
    let removed = async { redirect::remove(&namespace.connect().await?).await };
    if let Err(err) = removed.await {
        let path = namespace.path().display();
        warn!("network namespace {path}: {}", chain(&err));
        return;
    }
    match std::fs::remove_file(record) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            warn!("cannot remove {}: {err}", record.display());
        }
        _ => {}
    }
}

fn refuse_host(config: husk_config::Network) -> Result<Network, Error> {
    match config.host_network() {
        HostNetwork::Isolate => {
            info!("the host's network is asked for: the guest has only loopback");
            Ok(Network::default())
        }
        HostNetwork::Refuse => Err(Error::UnsupportedSpec(
            "asks for the network of the host (hostNetwork, --net-host), which a VM cannot have: leave that out, or set \
             network.host_network = \"isolate\" in husk.toml to run it without any network but loopback"
                .to_owned(),
        )),
    }
}

async fn connect(
    namespace: &Namespace,
    netlink: &rtnetlink::Handle,
    interfaces: &[Interface],
    wanted: &Wanted<'_>,
) -> Result<Vec<Nic>, NetworkError> {
    let vhost = has_vhost(wanted.config.datapath())?;
    let pairs = queue_pairs(wanted.vcpus, interfaces.len(), vhost);
    let mut nics = Vec::new();
    for interface in interfaces {
        nics.push(Nic::connect(namespace, netlink, interface, pairs, vhost).await?);
    }
    Ok(nics)
}

impl Nic {
    /// Connects an interface with a tap for a device with so many `pairs` of queues.
    async fn connect(
        namespace: &Namespace,
        netlink: &rtnetlink::Handle,
        interface: &Interface,
        pairs: usize,
        vhost: bool,
    ) -> Result<Self, NetworkError> {
        let tap = namespace
            .inside(move || tap::open(pairs))
            .await?
            .map_err(|source| NetworkError::Tap {
                interface: interface.name.clone(),
                source,
            })?;
        redirect::connect(netlink, interface, &tap.name).await?;
        let vhosts = (0..if vhost { pairs } else { 0 })
            .map(|_| tap::open_vhost().map_err(NetworkError::Vhost))
            .collect::<Result<_, _>>()?;
        info!(
            "{interface} of network namespace {} is the guest's by {}, with {pairs} pairs of queues{}",
            namespace.path().display(),
            tap.name,
            if vhost { " of vhost-net" } else { "" }
        );
        Ok(Self {
            config: NicConfig {
                mac: interface.mac,
                mtu: interface.mtu,
                queue_pairs: u8::try_from(pairs).expect("at most MAX_QUEUE_PAIRS"),
                vhost,
            },
            taps: tap.queues,
            vhosts,
        })
    }

    /// In the order in which the worker wants them.
    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.taps.iter().chain(&self.vhosts).map(AsFd::as_fd)
    }
}

/// Whether the host's datapath is to be used.
fn has_vhost(datapath: Datapath) -> Result<bool, NetworkError> {
    match datapath {
        Datapath::Worker => Ok(false),
        Datapath::Auto => Ok(tap::open_vhost().is_ok()),
        Datapath::Vhost => tap::open_vhost().map(|_| true).map_err(NetworkError::Vhost),
    }
}

/// As many pairs as the VM has processors, if the descriptors for so many can be passed.
fn queue_pairs(vcpus: u8, nics: usize, vhost: bool) -> usize {
    let descriptors = nics.max(1) * if vhost { 2 } else { 1 };
    usize::from(vcpus)
        .min(MAX_DESCRIPTORS / descriptors)
        .clamp(1, MAX_QUEUE_PAIRS)
}
