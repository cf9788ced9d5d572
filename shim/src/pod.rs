//! What containerd's CRI says in annotations: whether a container is a pod's sandbox or one of its containers, and what the
//! pod may use in all. `ctr` and others say nothing: their containers are alone in their VMs.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime::{LinuxResources, Spec};

use crate::error::Error;

pub(crate) const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
pub(crate) const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
pub(crate) const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
pub(crate) const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
pub(crate) const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The period of a quota that is given without, in microseconds: the kernel's own (cgroup v2, cpu.max).
const PERIOD_US: u64 = 100_000;

/// What a container is to its VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The only one.
    Single,
    /// The one that stands for the pod and holds its namespaces; it runs no program.
    Sandbox,
    /// One that joins a sandbox.
    Member {
        /// The sandbox's id.
        sandbox: String,
    },
}

impl Kind {
    /// The kind of the container with this specification.
    ///
    /// # Errors
    /// `UnsupportedSpec` for annotations that contradict each other.
    pub(crate) fn of(spec: &Spec) -> Result<Self, Error> {
        let annotation = |name| annotation(spec.annotations().as_ref(), name);
        match annotation(CONTAINER_TYPE) {
            None => Ok(Self::Single),
            Some("sandbox") => Ok(Self::Sandbox),
            Some("container") => match annotation(SANDBOX_ID) {
                Some(sandbox) if !sandbox.is_empty() => Ok(Self::Member {
                    sandbox: sandbox.to_owned(),
                }),
                _ => Err(Error::UnsupportedSpec(format!(
                    "is that of a container in a pod but names none: there is no annotation {SANDBOX_ID}"
                ))),
            },
            Some(other) => Err(Error::UnsupportedSpec(format!(
                "has {other:?} as {CONTAINER_TYPE}, which is neither sandbox nor container"
            ))),
        }
    }

    /// Whether `source` on the host is the /dev/shm that containerd has made for the pod.
    pub(crate) fn is_shm(&self, source: &Path) -> bool {
        match self {
            Self::Single | Self::Sandbox => false,
            Self::Member { sandbox } => source.ends_with(Path::new(sandbox).join("shm")),
        }
    }
}

/// The uid by which Kubernetes knows the pod, if there is one.
pub(crate) fn uid(spec: &Spec) -> Option<&str> {
    annotation(spec.annotations().as_ref(), SANDBOX_UID)
}

/// What containers may use; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Thousandths of a processor.
    pub(crate) millicpus: Option<u64>,
    pub(crate) memory_bytes: Option<u64>,
}

impl Limits {
    /// Those of the pod of a sandbox: the sum of what its containers may use, which kubelet tells beforehand.
    ///
    /// # Errors
    /// `UnsupportedSpec` for annotations that are no numbers.
    pub(crate) fn of_sandbox(spec: &Spec) -> Result<Self, Error> {
        let number = |name| {
            annotation(spec.annotations().as_ref(), name).map_or(Ok(0), |text| {
                text.parse::<i64>().map_err(|_| {
                    Error::UnsupportedSpec(format!("has {text:?} as {name}, which is no number"))
                })
            })
        };
        let (quota, period, memory) = (number(CPU_QUOTA)?, number(CPU_PERIOD)?, number(MEMORY)?);
        Ok(Self {
            millicpus: millicpus(quota, u64::try_from(period).unwrap_or(0)),
            memory_bytes: positive(memory),
        })
    }

    /// Those of one container.
    pub(crate) fn of_container(spec: &Spec) -> Self {
        spec.linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref())
            .map_or_else(Self::default, |resources| {
                Self::default().updated(resources)
            })
    }

    /// These, save for what `resources` says.
    pub(crate) fn updated(self, resources: &LinuxResources) -> Self {
        let quota = resources
            .cpu()
            .as_ref()
            .and_then(|cpu| Some((cpu.quota()?, cpu.period().unwrap_or(PERIOD_US))));
        let memory = resources
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit());
        Self {
            millicpus: quota.map_or(self.millicpus, |(quota, period)| millicpus(quota, period)),
            memory_bytes: memory.map_or(self.memory_bytes, positive),
        }
    }

    /// Those of two containers together. What has no limit is not counted: no machine is large enough for it.
    pub(crate) fn plus(self, other: Self) -> Self {
        self.joined(other, u64::saturating_add)
    }

    /// Of each, the larger one.
    pub(crate) fn or_larger(self, other: Self) -> Self {
        self.joined(other, u64::max)
    }

    fn joined(self, other: Self, join: impl Fn(u64, u64) -> u64) -> Self {
        let joined = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(join(one, other)),
            (one, other) => one.or(other),
        };
        Self {
            millicpus: joined(self.millicpus, other.millicpus),
            memory_bytes: joined(self.memory_bytes, other.memory_bytes),
        }
    }
}

fn millicpus(quota: i64, period: u64) -> Option<u64> {
    let quota = positive(quota)?;
    (period > 0).then(|| quota.saturating_mul(1000).div_ceil(period))
}

fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|&number| number > 0)
}

fn annotation<'a>(annotations: Option<&'a HashMap<String, String>>, name: &str) -> Option<&'a str> {
    annotations?.get(name).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(annotations: &Value) -> Spec {
        serde_json::from_value(json!({"ociVersion": "1.1.0", "annotations": annotations})).unwrap()
    }

    #[test]
    fn kind_is_told_by_annotations() {
        let kind = |annotations: Value| Kind::of(&spec(&annotations));
        assert_eq!(kind(json!({})).unwrap(), Kind::Single);
        // A group of `ctr`'s, which is no pod.
        assert_eq!(
            kind(json!({"io.kubernetes.cri.sandbox-id": "p"})).unwrap(),
            Kind::Single
        );
        let sandbox = json!({
            "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "p"
        });
        assert_eq!(kind(sandbox).unwrap(), Kind::Sandbox);
        let member = json!({
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"
        });
        let sandbox = "p".to_owned();
        assert_eq!(kind(member).unwrap(), Kind::Member { sandbox });
    }

    #[test]
    fn nonsense_in_annotations_is_named() {
        for (annotations, word) in [
            (
                json!({"io.kubernetes.cri.container-type": "pod"}),
                "\"pod\"",
            ),
            (
                json!({"io.kubernetes.cri.container-type": "container"}),
                "sandbox-id",
            ),
        ] {
            let err = Kind::of(&spec(&annotations)).unwrap_err().to_string();
            assert!(err.contains(word), "{err}");
        }
        let memory = spec(&json!({"io.kubernetes.cri.sandbox-memory": "much"}));
        let err = Limits::of_sandbox(&memory).unwrap_err().to_string();
        assert!(
            err.contains("\"much\"") && err.contains("sandbox-memory"),
            "{err}"
        );
    }

    #[test]
    fn limits_of_a_pod_are_in_its_annotations() {
        let limits = Limits::of_sandbox(&spec(&json!({
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-quota": "250000",
            "io.kubernetes.cri.sandbox-memory": "1048576"
        })));
        let expected = Limits {
            millicpus: Some(2500),
            memory_bytes: Some(1 << 20),
        };
        assert_eq!(limits.unwrap(), expected);
        // What kubelet says of a pod without limits.
        let none = Limits::of_sandbox(&spec(&json!({
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-quota": "0",
            "io.kubernetes.cri.sandbox-memory": "0"
        })));
        assert_eq!(none.unwrap(), Limits::default());
    }

    #[test]
    fn update_changes_what_it_names() {
        let updated = |limits: Limits, resources: Value| {
            limits.updated(&serde_json::from_value(resources).unwrap())
        };
        let both = Limits {
            millicpus: Some(500),
            memory_bytes: Some(1 << 20),
        };
        let cpu = json!({"cpu": {"quota": 100_000, "period": 100_000}});
        let expected = Limits {
            millicpus: Some(1000),
            ..both
        };
        assert_eq!(updated(both, cpu), expected);
        let unlimited = json!({"cpu": {"quota": -1, "period": 100_000}, "memory": {"limit": -1}});
        assert_eq!(updated(both, unlimited), Limits::default());
        assert_eq!(updated(both, json!({"cpu": {"shares": 2}})), both);
        let quota = updated(both, json!({"cpu": {"quota": 200_000}}));
        assert_eq!(quota.millicpus, Some(2000));
    }

    #[test]
    fn limits_of_a_pods_containers_add_up() {
        let limits = |millicpus, memory_bytes| Limits {
            millicpus,
            memory_bytes,
        };
        let one = limits(Some(300), None);
        let other = limits(Some(800), Some(7));
        assert_eq!(one.plus(other), limits(Some(1100), Some(7)));
        assert_eq!(one.or_larger(other), limits(Some(800), Some(7)));
        assert_eq!(one.plus(Limits::default()), one);
    }

    #[test]
    fn shm_of_the_pod_is_known_by_its_place() {
        let member = Kind::Member {
            sandbox: "p".to_owned(),
        };
        assert!(member.is_shm(Path::new("/run/containerd/cri/sandboxes/p/shm")));
        assert!(!member.is_shm(Path::new("/dev/shm")));
        assert!(!member.is_shm(Path::new("/run/containerd/cri/sandboxes/q/shm")));
        assert!(!Kind::Single.is_shm(Path::new("/sandboxes/p/shm")));
    }
}
