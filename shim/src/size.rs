//! How large a VM is: at its start, and later, as its containers come, go, and are allowed more or less.

use std::io::ErrorKind;

use crate::error::Error;
use crate::pod::Limits;

/// Added to the memory limit for the least size of a VM: the guest's kernel, its page tables and
/// the agent live in the same memory, and must not make the limit unreachable.
const GUEST_OVERHEAD_MIB: u64 = 128;

/// The least memory that a guest boots and runs a container with, as for `vm.memory_mib` of the configuration.
const LEAST_MIB: u64 = 64;

/// What the shim and the worker need beside the guest's memory.
const WORKER_MIB: u64 = 32;

const MEMINFO: &str = "/proc/meminfo";

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmSize {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
}

/// The sizes that a VM may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmSizes {
    /// At its start, and never less.
    pub(crate) start: VmSize,
    /// With what it can be given later.
    pub(crate) most: VmSize,
}

impl VmSize {
    /// What the host has, which no VM exceeds for the sake of a container's limit.
    pub(crate) fn of_host() -> Result<Self, Error> {
        let vcpus = std::thread::available_parallelism()
            .map_or(1, |count| u8::try_from(count.get()).unwrap_or(u8::MAX));
        let failed = |source| Error::Storage {
            operation: "read",
            path: MEMINFO.into(),
            source,
        };
        let meminfo = std::fs::read_to_string(MEMINFO).map_err(failed)?;
        let total_kib = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
            .and_then(|total| total.parse::<u64>().ok())
            .ok_or_else(|| failed(ErrorKind::InvalidData.into()))?;
        Ok(Self {
            vcpus,
            memory_mib: u32::try_from(total_kib / 1024).unwrap_or(u32::MAX),
        })
    }

    /// What containers need that may use this much in all; nothing for what has no limit.
    fn for_limits(limits: Limits) -> Self {
        let memory_mib = limits.memory_bytes.map_or(0, |bytes| {
            bytes.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB)
        });
        let vcpus = limits.millicpus.unwrap_or(0).div_ceil(1000);
        Self {
            vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
            memory_mib: u32::try_from(memory_mib).unwrap_or(u32::MAX),
        }
    }

    fn or_larger(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.max(other.vcpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }

    fn or_smaller(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.min(other.vcpus),
            memory_mib: self.memory_mib.min(other.memory_mib),
        }
    }

    /// With no more memory than a guest may have whose pod's cgroup is `allowed` that on the host, in bytes. It leaves some
    /// for the VM's worker: a guest that has used up its memory can still choose what to kill, while the host would take
    /// the VM.
    fn within(self, allowed: Option<u64>) -> Self {
        let most = allowed.map_or(u32::MAX, |bytes| {
            u32::try_from((bytes >> 20).saturating_sub(WORKER_MIB)).unwrap_or(u32::MAX)
        });
        Self {
            memory_mib: self.memory_mib.min(most),
            ..self
        }
    }
}

impl VmSizes {
    /// For a VM whose containers may use `limits`: at its start never smaller than configured, nor, for a limit's sake,
    /// larger than the host; and later no larger than configured or the host, unless it starts so. `allowed` is the memory
    /// that the pod's cgroup may use on the host, in bytes.
    ///
    /// # Errors
    /// `TooLittleMemory` if what is allowed is not enough for a VM.
    pub(crate) fn new(
        limits: Limits,
        config: &husk_config::Vm,
        host: VmSize,
        allowed: Option<u64>,
    ) -> Result<Self, Error> {
        if let Some(allowed_mib) = allowed.map(|bytes| bytes >> 20)
            && allowed_mib < LEAST_MIB + WORKER_MIB
        {
            return Err(Error::TooLittleMemory {
                allowed_mib,
                needed_mib: LEAST_MIB + WORKER_MIB,
            });
        }
        let configured = VmSize {
            vcpus: config.vcpus(),
            memory_mib: config.memory_mib(),
        };
        let start = VmSize::for_limits(limits)
            .or_smaller(host)
            .or_larger(configured)
            .within(allowed);
        let most = VmSize {
            vcpus: config.max_vcpus(),
            memory_mib: config.max_memory_mib().unwrap_or(u32::MAX),
        };
        Ok(Self {
            start,
            most: most.or_smaller(host).or_larger(start),
        })
    }

    /// The one that suits containers that may use `limits` in all.
    pub(crate) fn fit(&self, limits: Limits, allowed: Option<u64>) -> VmSize {
        VmSize::for_limits(limits)
            .within(allowed)
            .or_smaller(self.most)
            .or_larger(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const HOST: VmSize = VmSize {
        vcpus: 8,
        memory_mib: 8192,
    };

    fn limits(millicpus: u64, memory_mib: u64) -> Limits {
        Limits {
            millicpus: Some(millicpus).filter(|&cpus| cpus > 0),
            memory_bytes: Some(memory_mib)
                .filter(|&mib| mib > 0)
                .map(|mib| mib.saturating_mul(MIB)),
        }
    }

    fn size(vcpus: u8, memory_mib: u32) -> VmSize {
        VmSize { vcpus, memory_mib }
    }

    fn sizes(limits: Limits, allowed: Option<u64>) -> Result<VmSizes, Error> {
        VmSizes::new(
            limits,
            husk_config::Config::default().vm(),
            HOST,
            allowed.map(|mib| mib * MIB),
        )
    }

    #[test]
    fn limits_enlarge_the_vm_and_never_shrink_it() {
        let start = |millicpus, memory| sizes(limits(millicpus, memory), None).unwrap().start;
        assert_eq!(start(0, 0), size(1, 512));
        assert_eq!(start(0, 64), size(1, 512));
        // All of the default would be for the container, and nothing for the guest.
        assert_eq!(start(0, 512), size(1, 512 + 128));
        assert_eq!(start(0, 1024), size(1, 1024 + 128));
        // What some clients send for "no limit".
        assert_eq!(start(0, u64::MAX).memory_mib, 8192);
        assert_eq!(start(2500, 0), size(3, 512));
        assert_eq!(start(9000, 0).vcpus, 8);
    }

    #[test]
    fn vm_stays_within_what_its_cgroup_allows() {
        let memory = |allowed| {
            let sizes = sizes(Limits::default(), Some(allowed));
            sizes.map(|sizes| sizes.start.memory_mib)
        };
        assert_eq!(memory(8192).unwrap(), 512);
        assert_eq!(memory(256).unwrap(), 224);
        let err = memory(40).unwrap_err().to_string();
        assert!(err.contains("40 MiB") && err.contains("96 MiB"), "{err}");
    }

    #[test]
    fn growth_ends_at_what_is_configured_and_at_the_host() {
        let most = |text: &str, limits| {
            let config = husk_config::Config::from_toml(text, "test").unwrap();
            VmSizes::new(limits, config.vm(), HOST, None).unwrap().most
        };
        assert_eq!(most("", Limits::default()), size(4, 8192));
        let text = "[vm]\nmax_vcpus = 100\nmax_memory_mib = 2048";
        assert_eq!(most(text, Limits::default()), size(8, 2048));
        // It may start larger: then it does not grow.
        assert_eq!(most(text, limits(0, 4096)), size(8, 4096 + 128));
        assert_eq!(most("", limits(6000, 0)), size(6, 8192));
    }

    #[test]
    fn vm_follows_its_containers_between_its_start_and_the_most() {
        let sizes = sizes(limits(1500, 1024), None).unwrap();
        let fit = |limits, allowed: Option<u64>| sizes.fit(limits, allowed.map(|mib| mib * MIB));
        assert_eq!(fit(Limits::default(), None), size(2, 1152));
        assert_eq!(fit(limits(200, 64), None), size(2, 1152));
        assert_eq!(fit(limits(2100, 2048), None), size(3, 2048 + 128));
        assert_eq!(fit(limits(99_000, 99_000), None), size(4, 8192));
        assert_eq!(fit(limits(0, 4096), Some(2032)), size(2, 2000));
        assert_eq!(fit(limits(0, 4096), Some(1000)), size(2, 1152));
    }
}
