//! What happens to a pod's network after its VM has booted: an interface that comes up in the namespace is plugged into the
//! VM, one that goes is unplugged, and what is set later is set in the guest, too. The kernel's notifications say when to
//! look; what is there says what to do, so that it does not matter how many of them there were.

use std::collections::HashSet;

use futures::StreamExt;
use husk_protocol::agent::UpdateNetworkRequest;
use log::{info, warn};
use rtnetlink::{Handle, MulticastGroup};

use super::namespace::{Namespace, News};
use super::scan::{self, Interface};
use super::{NetworkError, Nic, redirect, settings};
use crate::agent::Agent;
use crate::error::{Error, chain};
use crate::vmm::Worker;

/// What a guest is told of. Neighbours are not among it: most of what the kernel tells of them is no setting.
pub(super) const GROUPS: &[MulticastGroup] = &[
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// Keeps a guest's network like that of its namespace.
#[derive(Debug)]
pub(crate) struct Follow {
    pub(super) namespace: Namespace,
    pub(super) netlink: Handle,
    pub(super) news: News,
    pub(super) config: husk_config::Network,
    /// The VM's processors, for as many queues.
    pub(super) vcpus: u8,
    /// The interfaces that the VM has had since its start. Their devices stay.
    pub(super) fixed: Vec<Interface>,
    /// Those that were plugged in.
    pub(super) plugged: Vec<Interface>,
    /// The indices of those that the VM cannot have, which was said.
    pub(super) refused: HashSet<u32>,
    /// What the guest was told last.
    pub(super) told: UpdateNetworkRequest,
}

impl Follow {
    /// Serves for ever.
    pub(crate) async fn serve(mut self, worker: Worker, agent: Agent) {
        while self.news.next().await.is_some() {
            // What has come meanwhile is seen by the same look.
            while self.news.try_recv().is_ok() {}
            if let Err(err) = self.catch_up(&worker, &agent).await {
                let path = self.namespace.path().display();
                warn!(
                    "the guest does not follow network namespace {path}: {}",
                    chain(&err)
                );
            }
        }
    }

    async fn catch_up(&mut self, worker: &Worker, agent: &Agent) -> Result<(), Error> {
        let links = scan::links(&self.netlink).await.map_err(self.failed())?;
        let (there, unusable) = scan::usable(&links);
        for (index, reason) in unusable {
            if self.refused.insert(index) {
                warn!("{reason}");
            }
        }
        let is_gone =
            |one: &mut Interface| !links.iter().any(|link| link.header.index == one.index);
        for gone in self.fixed.extract_if(.., is_gone) {
            info!("{gone} is gone; its device stays");
        }
        // What cannot be done with one interface keeps nothing from the others.
        let mut failed = None;
        for gone in self.plugged.extract_if(.., is_gone) {
            info!("{gone} is gone");
            if let Err(err) = worker.remove_nic(gone.mac).await {
                failed.get_or_insert(err);
            }
        }
        for interface in there {
            let is_known = |one: &Interface| one.index == interface.index;
            if let Some(known) = self.known().find(|one| is_known(one)) {
                // It may have got another name; its device keeps its MAC address.
                let mac = known.mac;
                *known = Interface { mac, ..interface };
            } else if !self.refused.contains(&interface.index) {
                if let Err(err) = self.plug(&interface, worker).await {
                    // Not to be tried with every change of something else.
                    self.refused.insert(interface.index);
                    failed.get_or_insert(err);
                } else {
                    self.plugged.push(interface);
                }
            }
        }
        let interfaces = self.known().map(|one| one.clone()).collect();
        let found = scan::read(&self.netlink, interfaces).await;
        let request = settings::request(&found.map_err(self.failed())?);
        if request != self.told {
            agent.update_network(&request).await?;
            self.told = request;
        }
        failed.map_or(Ok(()), Err)
    }

    fn known(&mut self) -> impl Iterator<Item = &mut Interface> {
        self.fixed.iter_mut().chain(&mut self.plugged)
    }

    async fn plug(&self, interface: &Interface, worker: &Worker) -> Result<(), Error> {
        let vhost = super::has_vhost(self.config.datapath()).map_err(self.failed())?;
        let pairs = super::queue_pairs(self.vcpus, 1, vhost);
        let nic = Nic::connect(&self.namespace, &self.netlink, interface, pairs, vhost)
            .await
            .map_err(self.failed())?;
        let files: Vec<_> = nic.descriptors().collect();
        let added = worker.add_nic(nic.config.clone(), &files).await;
        if added.is_err()
            && let Err(err) = redirect::disconnect(&self.netlink, interface).await
        {
            warn!("{interface} stays redirected: {}", chain(&err));
        }
        added
    }

    fn failed(&self) -> impl FnOnce(NetworkError) -> Error + use<> {
        let namespace = self.namespace.path().to_owned();
        move |source| Error::Network { namespace, source }
    }
}
