//! Counters of the guest's cgroup in containerd's types. The guest has cgroup v2; containerd and what reads it expect
//! the type of the host's version, so v1 is made out of v2 where the host has v1.

use containerd_shim::protos::cgroups::metrics as v1;
use containerd_shim::protos::cgroups_v2::metrics as v2;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::util::convert_to_any;
use husk_protocol::agent::{Pressure, PressureStats, StatsContainerResponse};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::error::Error;

/// What the kernel shows as limit of a v1 memory cgroup that has none: LONG_MAX rounded down to pages.
const V1_UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

/// Which version of cgroups the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostCgroups {
    V1,
    V2,
}

impl HostCgroups {
    /// As containerd decides it: by what is mounted at /sys/fs/cgroup.
    pub(crate) fn detect() -> Self {
        match statfs("/sys/fs/cgroup") {
            Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC => Self::V2,
            _ => Self::V1,
        }
    }
}

/// The metrics message for the host's version.
pub(crate) fn encode(stats: &StatsContainerResponse, host: HostCgroups) -> Result<Any, Error> {
    let encoded = match host {
        HostCgroups::V1 => convert_to_any(Box::new(to_v1(stats))),
        HostCgroups::V2 => convert_to_any(Box::new(to_v2(stats))),
    };
    encoded.map_err(|source| Error::InvalidRequest {
        what: "counters",
        source: source.into(),
    })
}

fn to_v2(stats: &StatsContainerResponse) -> v2::Metrics {
    let of = |key: &str| stats.memory.stat.get(key).copied().unwrap_or_default();
    let event = |key: &str| stats.memory.events.get(key).copied().unwrap_or_default();
    let pids = v2::PidsStat {
        current: stats.pids.current,
        limit: stats.pids.limit,
        ..Default::default()
    };
    let cpu = v2::CPUStat {
        usage_usec: stats.cpu.usage_usec,
        user_usec: stats.cpu.user_usec,
        system_usec: stats.cpu.system_usec,
        nr_periods: stats.cpu.nr_periods,
        nr_throttled: stats.cpu.nr_throttled,
        throttled_usec: stats.cpu.throttled_usec,
        psi: psi(stats.cpu_pressure.as_ref()).into(),
        ..Default::default()
    };
    let memory = v2::MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        // Kernels since 5.9 count it by kind.
        workingset_refault: of("workingset_refault_anon")
            .saturating_add(of("workingset_refault_file")),
        workingset_activate: of("workingset_activate_anon")
            .saturating_add(of("workingset_activate_file")),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: stats.memory.usage,
        usage_limit: stats.memory.usage_limit,
        swap_usage: stats.memory.swap_usage,
        swap_limit: stats.memory.swap_limit,
        max_usage: stats.memory.max_usage,
        psi: psi(stats.memory_pressure.as_ref()).into(),
        ..Default::default()
    };
    let io = v2::IOStat {
        usage: stats
            .io
            .iter()
            .map(|entry| v2::IOEntry {
                major: entry.major,
                minor: entry.minor,
                rbytes: entry.rbytes,
                wbytes: entry.wbytes,
                rios: entry.rios,
                wios: entry.wios,
                ..Default::default()
            })
            .collect(),
        psi: psi(stats.io_pressure.as_ref()).into(),
        ..Default::default()
    };
    let memory_events = v2::MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        oom_group_kill: event("oom_group_kill"),
        ..Default::default()
    };
    let network = stats
        .network
        .iter()
        .map(|interface| v2::NetworkStat {
            name: interface.name.clone(),
            rx_bytes: interface.rx_bytes,
            rx_packets: interface.rx_packets,
            rx_errors: interface.rx_errors,
            rx_dropped: interface.rx_dropped,
            tx_bytes: interface.tx_bytes,
            tx_packets: interface.tx_packets,
            tx_errors: interface.tx_errors,
            tx_dropped: interface.tx_dropped,
            ..Default::default()
        })
        .collect();
    v2::Metrics {
        pids: Some(pids).into(),
        cpu: Some(cpu).into(),
        memory: Some(memory).into(),
        io: Some(io).into(),
        memory_events: Some(memory_events).into(),
        network,
        ..Default::default()
    }
}

fn psi(pressure: Option<&PressureStats>) -> Option<v2::PSIStats> {
    let data = |pressure: &Pressure| v2::PSIData {
        avg10: percent(pressure.avg10),
        avg60: percent(pressure.avg60),
        avg300: percent(pressure.avg300),
        total: pressure.total,
        ..Default::default()
    };
    pressure.map(|pressure| v2::PSIStats {
        some: pressure.some.as_ref().map(data).into(),
        full: pressure.full.as_ref().map(data).into(),
        ..Default::default()
    })
}

/// What is no number cannot be told as JSON, and would take all other counters along.
fn percent(value: f64) -> f64 {
    if value.is_finite() { value } else { 0.0 }
}

fn to_v1(stats: &StatsContainerResponse) -> v1::Metrics {
    let pids = v1::PidsStat {
        current: stats.pids.current,
        // v1: 0 is no limit.
        limit: match stats.pids.limit {
            u64::MAX => 0,
            limit => limit,
        },
        ..Default::default()
    };
    let nanoseconds = |microseconds: u64| microseconds.saturating_mul(1000);
    let cpu = v1::CPUStat {
        usage: Some(v1::CPUUsage {
            total: nanoseconds(stats.cpu.usage_usec),
            kernel: nanoseconds(stats.cpu.system_usec),
            user: nanoseconds(stats.cpu.user_usec),
            ..Default::default()
        })
        .into(),
        throttling: Some(v1::Throttle {
            periods: stats.cpu.nr_periods,
            throttled_periods: stats.cpu.nr_throttled,
            throttled_time: nanoseconds(stats.cpu.throttled_usec),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let oom = v1::MemoryOomControl {
        oom_kill: stats
            .memory
            .events
            .get("oom_kill")
            .copied()
            .unwrap_or_default(),
        ..Default::default()
    };
    let network = stats
        .network
        .iter()
        .map(|interface| v1::NetworkStat {
            name: interface.name.clone(),
            rx_bytes: interface.rx_bytes,
            rx_packets: interface.rx_packets,
            rx_errors: interface.rx_errors,
            rx_dropped: interface.rx_dropped,
            tx_bytes: interface.tx_bytes,
            tx_packets: interface.tx_packets,
            tx_errors: interface.tx_errors,
            tx_dropped: interface.tx_dropped,
            ..Default::default()
        })
        .collect();
    v1::Metrics {
        pids: Some(pids).into(),
        cpu: Some(cpu).into(),
        memory: Some(v1_memory(stats)).into(),
        blkio: Some(v1_blkio(stats)).into(),
        memory_oom_control: Some(oom).into(),
        network,
        ..Default::default()
    }
}

fn v1_memory(stats: &StatsContainerResponse) -> v1::MemoryStat {
    let memory = &stats.memory;
    let of = |key: &str| memory.stat.get(key).copied().unwrap_or_default();
    let entry = |usage: u64, limit: u64, max: u64| {
        Some(v1::MemoryEntry {
            usage,
            limit: limit.min(V1_UNLIMITED),
            max,
            ..Default::default()
        })
        .into()
    };
    let limit = memory.usage_limit.min(V1_UNLIMITED);
    // v1 counts memory and swap together.
    let with_swap_usage = memory.usage.saturating_add(memory.swap_usage);
    let with_swap_limit = memory.usage_limit.saturating_add(memory.swap_limit);
    v1::MemoryStat {
        cache: of("file"),
        rss: of("anon"),
        rss_huge: of("anon_thp"),
        mapped_file: of("file_mapped"),
        dirty: of("file_dirty"),
        writeback: of("file_writeback"),
        pg_fault: of("pgfault"),
        pg_maj_fault: of("pgmajfault"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        hierarchical_memory_limit: limit,
        hierarchical_swap_limit: with_swap_limit.min(V1_UNLIMITED),
        // A v2 counter is that of the whole subtree.
        total_cache: of("file"),
        total_rss: of("anon"),
        total_rss_huge: of("anon_thp"),
        total_mapped_file: of("file_mapped"),
        total_dirty: of("file_dirty"),
        total_writeback: of("file_writeback"),
        total_pg_fault: of("pgfault"),
        total_pg_maj_fault: of("pgmajfault"),
        total_inactive_anon: of("inactive_anon"),
        total_active_anon: of("active_anon"),
        total_inactive_file: of("inactive_file"),
        total_active_file: of("active_file"),
        total_unevictable: of("unevictable"),
        usage: entry(memory.usage, memory.usage_limit, memory.max_usage),
        swap: entry(with_swap_usage, with_swap_limit, 0),
        kernel: entry(of("kernel"), u64::MAX, 0),
        kernel_tcp: entry(of("sock"), u64::MAX, 0),
        ..Default::default()
    }
}

fn v1_blkio(stats: &StatsContainerResponse) -> v1::BlkIOStat {
    let entries = |read: fn(&husk_protocol::agent::IoStats) -> u64,
                   write: fn(&husk_protocol::agent::IoStats) -> u64| {
        stats
            .io
            .iter()
            .flat_map(|io| [("Read", read(io), io), ("Write", write(io), io)])
            .map(|(op, value, io)| v1::BlkIOEntry {
                op: op.to_owned(),
                device: format!("{}:{}", io.major, io.minor),
                major: io.major,
                minor: io.minor,
                value,
                ..Default::default()
            })
            .collect()
    };
    v1::BlkIOStat {
        io_service_bytes_recursive: entries(|io| io.rbytes, |io| io.wbytes),
        io_serviced_recursive: entries(|io| io.rios, |io| io.wios),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim::protos::protobuf::Message;
    use husk_protocol::agent::{CpuStats, IoStats, MemoryStats, NetworkStats, PidsStats};

    use super::*;

    fn stats() -> StatsContainerResponse {
        let map = |pairs: &[(&str, u64)]| {
            pairs
                .iter()
                .map(|&(key, value)| (key.to_owned(), value))
                .collect()
        };
        StatsContainerResponse {
            cpu: Some(CpuStats {
                usage_usec: 7,
                ..Default::default()
            })
            .into(),
            memory: Some(MemoryStats {
                usage: 4096,
                usage_limit: u64::MAX,
                swap_usage: 1,
                swap_limit: u64::MAX,
                stat: map(&[("anon", 1), ("file", 2)]),
                events: map(&[("oom_kill", 3)]),
                ..Default::default()
            })
            .into(),
            pids: Some(PidsStats {
                current: 2,
                limit: u64::MAX,
                ..Default::default()
            })
            .into(),
            io: vec![IoStats {
                major: 254,
                wbytes: 9,
                ..Default::default()
            }],
            cpu_pressure: Some(PressureStats {
                some: Some(Pressure {
                    avg10: f64::NAN,
                    avg60: 1.5,
                    total: 8,
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            network: vec![NetworkStats {
                name: "eth0".into(),
                tx_bytes: 5,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn v2_host_gets_v2() {
        let any = encode(&stats(), HostCgroups::V2).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 7);
        assert_eq!((metrics.memory.anon, metrics.memory.file), (1, 2));
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.memory_events.oom_kill, 3);
        let pressure = &metrics.cpu.psi.some;
        assert_eq!((pressure.avg10, pressure.avg60), (0.0, 1.5));
        assert_eq!(pressure.total, 8);
        assert!(metrics.memory.psi.is_none());
        assert_eq!(metrics.pids.limit, u64::MAX);
        assert_eq!(metrics.io.usage[0].wbytes, 9);
        assert_eq!(metrics.network[0].tx_bytes, 5);
    }

    #[test]
    fn v1_host_gets_v1_in_its_units() {
        let any = encode(&stats(), HostCgroups::V1).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage.total, 7000);
        assert_eq!((metrics.memory.rss, metrics.memory.cache), (1, 2));
        assert_eq!(metrics.memory.usage.limit, V1_UNLIMITED);
        assert_eq!(metrics.memory.swap.usage, 4097);
        assert_eq!(metrics.memory_oom_control.oom_kill, 3);
        assert_eq!(metrics.pids.limit, 0);
        let written = &metrics.blkio.io_service_bytes_recursive[1];
        assert_eq!((written.op.as_str(), written.value), ("Write", 9));
        assert_eq!(metrics.network[0].name, "eth0");
    }

    #[test]
    fn empty_answer_is_no_panic() {
        encode(&StatsContainerResponse::default(), HostCgroups::V1).unwrap();
        encode(&StatsContainerResponse::default(), HostCgroups::V2).unwrap();
    }
}
