//! What happens to a pod's network after its VM has booted: an interface that comes up in the namespace is plugged into the
//! VM, one that goes is unplugged, and what is set later is set in the guest, too. The kernel's notifications say when to
//! look; what is there says what to do, so that it does not matter how many of them there were.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::StreamExt;
use husk_protocol::agent::UpdateNetworkRequest;
use log::{info, warn};
use rtnetlink::{Handle, MulticastGroup};
use tokio::time::Instant;

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

/// What failed is tried again after this, and so often until all is done: a guest under load may have been too
/// slow, and what it refuses once it may refuse for ever.
const RETRY_AFTER: Duration = Duration::from_secs(15);
const MOST_RETRIES: u32 = 4;

/// When what failed is tried again.
#[derive(Debug)]
struct Retry {
    at: Option<Instant>,
    left: u32,
}

impl Retry {
    fn new() -> Self {
        Self {
            at: None,
            left: MOST_RETRIES,
        }
    }

    /// It was tried, and all is `done`, or is not. Other news do not put off what is planned.
    fn plan(&mut self, done: bool, now: Instant) {
        if done {
            *self = Self::new();
        } else if self.at.is_none() && self.left > 0 {
            self.left -= 1;
            self.at = Some(now + RETRY_AFTER);
        }
    }
}

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
    /// Those that the VM cannot have, by their indices, and what was said of them.
    pub(super) unusable: HashMap<u32, String>,
    /// The indices of those that could not be plugged in, until that is tried again.
    pub(super) unplugged: HashSet<u32>,
    /// What the guest was told last.
    pub(super) told: UpdateNetworkRequest,
}

impl Follow {
    /// Serves for ever.
    pub(crate) async fn serve(mut self, worker: Worker, agent: Agent) {
        let mut retry = Retry::new();
        loop {
            let news = self.news.next();
            let woken = match retry.at {
                Some(at) => tokio::time::timeout_at(at, news).await,
                None => Ok(news.await),
            };
            match woken {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(_) => {
                    retry.at = None;
                    self.unplugged.clear();
                }
            }
            // What has come meanwhile is seen by the same look.
            while self.news.try_recv().is_ok() {}
            let caught_up = self.catch_up(&worker, &agent).await;
            if let Err(err) = &caught_up {
                self.complain(err);
            }
            retry.plan(
                caught_up.is_ok() && self.unplugged.is_empty(),
                Instant::now(),
            );
        }
    }

    fn complain(&self, err: &Error) {
        let path = self.namespace.path().display();
        warn!(
            "the guest does not follow network namespace {path}: {}",
            chain(err)
        );
    }

    async fn catch_up(&mut self, worker: &Worker, agent: &Agent) -> Result<(), Error> {
        let links = scan::links(&self.netlink).await.map_err(self.failed())?;
        let (there, unusable) = scan::usable(&links);
        let unusable: HashMap<_, _> = unusable
            .into_iter()
            .map(|(index, reason)| (index, reason.to_string()))
            .collect();
        for (index, reason) in &unusable {
            if self.unusable.get(index) != Some(reason) {
                warn!("{reason}");
            }
        }
        self.unusable = unusable;
        self.unplugged
            .retain(|index| links.iter().any(|link| link.header.index == *index));
        let is_gone =
            |one: &mut Interface| !links.iter().any(|link| link.header.index == one.index);
        for gone in self.fixed.extract_if(.., is_gone) {
            info!("{gone} is gone; its device stays");
        }
        // What cannot be done with one interface keeps nothing from the others.
        let gone: Vec<_> = self.plugged.extract_if(.., is_gone).collect();
        for gone in gone {
            info!("{gone} is gone");
            if let Err(err) = worker.remove_nic(gone.mac).await {
                self.complain(&err);
            }
        }
        for interface in there {
            let is_known = |one: &Interface| one.index == interface.index;
            if let Some(known) = self.known().find(|one| is_known(one)) {
                // It may have got another name; its device keeps its MAC address.
                let mac = known.mac;
                *known = Interface { mac, ..interface };
            } else if !self.unplugged.contains(&interface.index) {
                if let Err(err) = self.plug(&interface, worker).await {
                    // Not to be tried with every change of something else, such as its own tap's coming and going.
                    self.unplugged.insert(interface.index);
                    self.complain(&err);
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
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_tried_again_a_few_times_whatever_else_happens() {
        let start = Instant::now();
        let mut retry = Retry::new();
        retry.plan(false, start);
        let at = Some(start + RETRY_AFTER);
        assert_eq!(retry.at, at);
        retry.plan(false, start + RETRY_AFTER / 2);
        assert_eq!(retry.at, at);
        for _ in 1..MOST_RETRIES {
            retry.at = None;
            retry.plan(false, start);
            assert!(retry.at.is_some());
        }
        retry.at = None;
        retry.plan(false, start);
        assert_eq!(retry.at, None);
        retry.plan(true, start);
        retry.plan(false, start);
        assert_eq!(retry.at, at);
    }
}
