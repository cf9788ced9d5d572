//! One sandbox: the VM and its containers. The `ctr` container is the case of one, a pod of Kubernetes that of many.
//!
//! The verbs of the task service are methods of [`Sandbox`], each in its file below [`crate::task`]. Locks are held for
//! look-ups only, never over an `.await`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use containerd_shim::event::Event;
use log::warn;
use tokio::sync::{Notify, OnceCell, watch};

use crate::cgroup::PodCgroup;
use crate::container::Container;
use crate::error::Error;
use crate::events::Events;
use crate::growth::Demands;
use crate::network::{Network, Wanted};
use crate::size::VmSizes;
use crate::storage::Share;
use crate::vm::Vm;

/// A VM that is to be booted.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) config: husk_config::Config,
    pub(crate) sizes: VmSizes,
    pub(crate) network: Wanted<'a>,
}

/// The VM, booted by the first container that needs it; those that come meanwhile wait for the same boot.
type VmCell = Arc<OnceCell<Arc<Vm>>>;

#[derive(Debug)]
pub(crate) struct Sandbox {
    namespace: String,
    share: Share,
    events: Events,
    containers: Mutex<HashMap<String, Slot>>,
    demands: Demands,
    cgroup: OnceLock<PodCgroup>,
    vm: Mutex<VmCell>,
    /// containerd has given up the containers that are being created, and does not come back.
    abandoned: watch::Sender<bool>,
    shut_down: watch::Sender<bool>,
}

#[derive(Debug)]
enum Slot {
    /// Reserved by a `Create` that is under way.
    Creating,
    Created(Arc<Container>),
}

impl Sandbox {
    pub(crate) fn new(namespace: &str, share: Share, events: Events) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            share,
            events,
            containers: Mutex::default(),
            demands: Demands::default(),
            cgroup: OnceLock::new(),
            vm: Mutex::default(),
            abandoned: watch::Sender::new(false),
            shut_down: watch::Sender::new(false),
        })
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(crate) fn share(&self) -> &Share {
        &self.share
    }

    pub(crate) fn publish(&self, event: impl Event) {
        self.events.publish(event);
    }

    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// The container `id`. One that is still being created does not exist yet.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.containers).get(id) {
            Some(Slot::Created(container)) => Ok(container.clone()),
            Some(Slot::Creating) | None => Err(Error::ContainerNotFound { id: id.to_owned() }),
        }
    }

    /// Reserves `id` for a container that is going to be created.
    pub(crate) fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation, Error> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(Error::ContainerExists { id: id.to_owned() });
        }
        containers.insert(id.to_owned(), Slot::Creating);
        Ok(Reservation {
            sandbox: self.clone(),
            id: id.to_owned(),
            committed: false,
        })
    }

    /// All of them, but for those that are being created.
    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers)
            .values()
            .filter_map(|slot| match slot {
                Slot::Created(container) => Some(container.clone()),
                Slot::Creating => None,
            })
            .collect()
    }

    pub(crate) fn remove(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.containers).is_empty()
    }

    /// Moves the shim, and what it will start, to the group of the host that `path` names; once. A host on which that does
    /// not work has the pod nevertheless.
    pub(crate) fn enter_cgroup(&self, path: &Path) {
        if self.cgroup.get().is_some() {
            return;
        }
        match PodCgroup::enter(path) {
            Ok(Some(group)) => {
                // The creator of a first container is alone.
                let _ = self.cgroup.set(group);
            }
            Ok(None) => {}
            Err(err) => warn!("cannot move to the cgroup {}: {err}", path.display()),
        }
    }

    pub(crate) fn demands(&self) -> &Demands {
        &self.demands
    }

    /// The group of the host that the pod is in.
    pub(crate) fn cgroup(&self) -> Option<&PodCgroup> {
        self.cgroup.get()
    }

    /// The sandbox's VM; boots `machine` if there is none yet. `give_up` ends a boot that is under way with the error
    /// `Abandoned`.
    ///
    /// # Panics
    /// When there is neither.
    pub(crate) async fn vm(
        &self,
        machine: Option<Machine<'_>>,
        give_up: &Notify,
    ) -> Result<Arc<Vm>, Error> {
        let cell = lock(&self.vm).clone();
        let vm = cell
            .get_or_try_init(async || {
                let Machine {
                    config,
                    sizes,
                    network,
                } = machine.expect("there is a VM, which stays while a container is created");
                let network = Network::set_up(&network).await?;
                Vm::boot(&config, sizes, &self.share.exported(), network, give_up)
                    .await
                    .map(Arc::new)
            })
            .await?
            .clone();
        match vm.end().reason() {
            Some(reason) => Err(Error::VmEnded(reason.to_string())),
            None => Ok(vm),
        }
    }

    /// The VM, if there is one.
    pub(crate) fn running_vm(&self) -> Option<Arc<Vm>> {
        lock(&self.vm).get().cloned()
    }

    /// Ends the VM if no container uses it. The next container gets a new one.
    pub(crate) async fn stop_unused_vm(&self) {
        let cell = {
            let mut vm = lock(&self.vm);
            if !lock(&self.containers).is_empty() {
                return;
            }
            std::mem::take(&mut *vm)
        };
        if let Some(vm) = cell.get() {
            vm.stop().await;
        }
    }

    /// Whether a container exists, as opposed to one that is being created.
    pub(crate) fn has_containers(&self) -> bool {
        lock(&self.containers)
            .values()
            .any(|slot| matches!(slot, Slot::Created(_)))
    }

    /// Whether there is no container but `id`, nor is one being created.
    pub(crate) fn has_no_other(&self, id: &str) -> bool {
        lock(&self.containers).keys().all(|other| other == id)
    }

    /// Makes those that are creating containers give up.
    pub(crate) fn abandon(&self) {
        self.abandoned.send_replace(true);
    }

    pub(crate) async fn wait_abandoned(&self) {
        // The sender lives as long as `self`.
        let _ = self
            .abandoned
            .subscribe()
            .wait_for(|&abandoned| abandoned)
            .await;
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        *self.abandoned.borrow()
    }

    /// Makes [`Sandbox::wait_shut_down`] return.
    pub(crate) fn shut_down(&self) {
        self.shut_down.send_replace(true);
    }

    pub(crate) async fn wait_shut_down(&self) {
        // The sender lives as long as `self`.
        let _ = self
            .shut_down
            .subscribe()
            .wait_for(|&shut_down| shut_down)
            .await;
    }
}

/// An id that a container is being created for. Dropping it gives the id back.
#[derive(Debug)]
pub(crate) struct Reservation {
    sandbox: Arc<Sandbox>,
    id: String,
    committed: bool,
}

impl Reservation {
    /// The container exists from now on.
    pub(crate) fn commit(mut self, container: Arc<Container>) {
        self.committed = true;
        lock(&self.sandbox.containers).insert(self.id.clone(), Slot::Created(container));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.committed {
            self.sandbox.remove(&self.id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
