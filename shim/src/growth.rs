//! What the containers of a sandbox want of its VM. It grows before one is added that may use more than there is, or one is
//! allowed more; and shrinks, not below its start, when containers are allowed less or have ended. The host's OOM killer
//! takes it as it would take the best protected of them.

use std::collections::HashMap;

use log::warn;
use tokio::sync::Mutex;

use crate::cgroup::PodCgroup;
use crate::error::Error;
use crate::pod::Limits;
use crate::sandbox::Sandbox;
use crate::vm::Vm;

/// What one container wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) limits: Limits,
    /// proc(5): from -1000, never to be killed, to 1000.
    pub(crate) oom_score_adj: i32,
}

/// The demands of the containers that are being created or have not ended. Locked until the VM has been told: else of two
/// that change it at the same time the first one might be heard last.
#[derive(Debug, Default)]
pub(crate) struct Demands(Mutex<HashMap<String, Demand>>);

impl Sandbox {
    /// Container `id` is to get this: makes its VM suit all first. Without that, it wants what it wanted before.
    pub(crate) async fn demand(&self, vm: &Vm, id: &str, demand: Demand) -> Result<(), Error> {
        let mut demands = self.demands().0.lock().await;
        let before = demands.insert(id.to_owned(), demand);
        let fitted = self.fit(vm, &demands).await;
        if fitted.is_err() {
            match before {
                Some(before) => demands.insert(id.to_owned(), before),
                None => demands.remove(id),
            };
        }
        fitted
    }

    /// Container `id` has got this, and no more: the VM may shrink.
    pub(crate) async fn demand_only(&self, vm: &Vm, id: &str, demand: Demand) {
        let mut demands = self.demands().0.lock().await;
        demands.insert(id.to_owned(), demand);
        self.try_to_fit(vm, &demands).await;
    }

    /// What container `id` wants.
    pub(crate) async fn demanded(&self, id: &str) -> Demand {
        let demands = self.demands().0.lock().await;
        demands.get(id).copied().unwrap_or_default()
    }

    /// Container `id` wants nothing any more.
    pub(crate) async fn demand_nothing(&self, vm: &Vm, id: &str) {
        let mut demands = self.demands().0.lock().await;
        demands.remove(id);
        self.try_to_fit(vm, &demands).await;
    }

    async fn try_to_fit(&self, vm: &Vm, demands: &HashMap<String, Demand>) {
        match self.fit(vm, demands).await {
            Ok(()) | Err(Error::VmEnded(_)) => {}
            Err(err) => warn!("the VM cannot be changed: {}", err.chain()),
        }
    }

    async fn fit(&self, vm: &Vm, demands: &HashMap<String, Demand>) -> Result<(), Error> {
        let limits = demands
            .values()
            .fold(Limits::default(), |all, one| all.plus(one.limits));
        let allowed = self.cgroup().and_then(PodCgroup::memory_limit);
        vm.resize(vm.sizes().fit(limits, allowed)).await?;
        match demands.values().map(|demand| demand.oom_score_adj).min() {
            Some(score) => vm.set_oom_score_adj(score),
            None => Ok(()),
        }
    }
}
